"""Each rank holds its rows of every tensor: together they are the whole, in the order of the ranks (`train.pieces`)."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entrenar.train.pieces import fill, has_pieces, is_in_pieces, own_part, rows_of


class _Piece:
    """What this package uses of torch's DTensor: rank `number` of `count`, the second dimension of two of a mesh."""

    def __init__(self, part: Tensor, number: int, count: int) -> None:
        self._part = part
        self.placements = [SimpleNamespace(is_shard=lambda: False), SimpleNamespace(is_shard=lambda: True)]
        ranks, sizes = (7, number), (9, count)
        self.device_mesh = SimpleNamespace(get_local_rank=ranks.__getitem__, size=sizes.__getitem__)

    def to_local(self) -> Tensor:
        return self._part


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("rows", range(1, 12))
def test_the_rows_of_all_ranks_are_the_whole(rows: int, count: int) -> None:
    """No row is lost or held twice, also where rows do not divide by ranks; they lie as FSDP2 has them."""
    whole = torch.arange(2.0 * rows).view(rows, 2)
    parts = [rows_of(whole, _Piece(whole, number, count)) for number in range(count)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts), whole)
    most = -(-rows // count)
    assert [len(part) for part in parts] == [min(most, max(0, rows - most * number)) for number in range(count)]


def test_a_piece_is_filled_with_its_rows() -> None:
    """The memory of the part itself gets the bytes."""
    part = torch.zeros(2, 3)
    fill(_Piece(part, 1, 2), torch.arange(12.0).view(4, 3))  # type: ignore[arg-type]
    assert part.tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]


def test_a_whole_tensor_is_its_own_part() -> None:
    """Without pieces nothing is cut and nothing copied."""
    tensor = torch.ones(3)
    assert own_part(tensor) is tensor
    assert rows_of(tensor, torch.zeros(3)) is tensor
    assert not is_in_pieces(tensor)
    assert not has_pieces(nn.Linear(2, 2))
