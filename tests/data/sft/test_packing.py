"""Best-fit-decreasing packing: exact, and close to the fewest rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.sft.packing import pack
from entrenar.errors import DataError


@pytest.mark.property
@pytest.mark.kills("data.sft.packing", "left = room - length", "left = room - length + (room > length)")
@given(st.integers(1, 200).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_each_example_comes_once_and_no_row_is_over_capacity(case):
    """Every index is in one row, and no row holds more than the capacity."""
    capacity, lengths = case
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)


@pytest.mark.property
@pytest.mark.kills("data.sft.packing", "(fitting & -fitting).bit_length()", "fitting.bit_length()")
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_each_example_goes_where_it_leaves_least(lengths):
    """The rows are those of the definition: longest first, each into the fullest row that still has room."""
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        room = [50 - sum(lengths[other] for other in row) for row in expected]
        fitting = [left for left in room if left >= lengths[index]]
        if fitting:
            expected[room.index(min(fitting))].append(index)
        else:
            expected.append([index])
    # Rows with the same room are alike, so what is decided is how full the rows become.
    packed = pack(lengths, 50)
    assert sorted(sum(lengths[i] for i in row) for row in packed) == sorted(
        sum(lengths[i] for i in row) for row in expected
    )


def test_perfect_fits_waste_nothing():
    """Lengths that pair up to the capacity fill every row."""
    rows = pack([60, 30, 40, 70, 55, 45], 100)
    assert sorted(sum([60, 30, 40, 70, 55, 45][i] for i in row) for row in rows) == [100, 100, 100]


def test_the_rows_depend_on_the_lengths_alone():
    """Twice the same lengths, twice the same rows; a million examples are a matter of seconds."""
    lengths = [(index * 7919) % 512 + 1 for index in range(50_000)]
    assert pack(lengths, 512) == pack(list(lengths), 512)


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_cannot_be_packed_is_refused(length):
    """An example without a token, or over the capacity, is named."""
    with pytest.raises(DataError, match=rf"example 1 must have 1 … 10 tokens to be packed, it has {length}"):
        pack([5, length], 10)
