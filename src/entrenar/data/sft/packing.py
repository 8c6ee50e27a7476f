"""Put examples into rows of a fixed capacity, wasting little: best-fit decreasing.

The longest example comes first and goes into the row with the least room that still holds it; no row needs more than
11/9 of the fewest possible, plus a constant (Johnson et al. 1974). Rows with the same room are alike, so they are kept
in one list for each room, and the rooms that have a row are the bits of an integer: the least room of at least n is the
lowest bit that is left after a shift by n. That makes a million examples a matter of seconds.
"""

from collections.abc import Sequence

from entrenar.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`: each index once, no row longer than `capacity`.

    Raises: DataError for a length that is not in 1 … capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise DataError(f"example {index} must have 1 … {capacity} tokens to be packed, it has {length}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows
