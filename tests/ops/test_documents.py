"""`ops.documents`: spans from ids, positions and lengths from spans, with no loop over tokens."""

import pytest
import torch

from entrenar.errors import DataError
from entrenar.ops import Documents, document_spans

IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 3, 9]])
SPANS = (((0, 2), (2, 5), (5, 6)), ((0, 6),), ((0, 1), (1, 2), (2, 3), (3, 5), (5, 6)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_spans_are_the_runs_of_equal_ids(dtype: torch.dtype) -> None:
    """Each run of equal ids is a document, in plain integers."""
    spans = document_spans(IDS.to(dtype))
    assert spans == SPANS
    assert all(type(edge) is int for row in spans for span in row for edge in span)


def test_rows_without_tokens_have_no_document() -> None:
    """No token, no span."""
    assert document_spans(torch.zeros(2, 0, dtype=torch.int64)) == ((), ())
    assert Documents.from_spans(((), ())).positions.shape == (2, 0)


def test_each_token_knows_its_place_its_document_and_its_length() -> None:
    """Positions restart with each document; ids number the documents of a row; lengths are those of the documents."""
    documents = Documents.from_spans(SPANS)
    assert documents.spans == SPANS
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]
    assert documents.ids.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 4]]
    assert documents.lengths.tolist() == [[2, 2, 3, 3, 3, 1], [6, 6, 6, 6, 6, 6], [1, 1, 1, 2, 2, 1]]
    assert documents.positions.dtype == documents.lengths.dtype == torch.int64
    assert document_spans(documents.ids) == SPANS


def test_ids_that_decrease_are_refused_with_row_and_place() -> None:
    """An id that comes back would be two documents with one number."""
    message = r"^document ids must not decrease within a row, got 0 after 1 at position 2: number the documents .*$"
    with pytest.raises(DataError, match=message):
        document_spans(torch.tensor([[0, 0, 0], [0, 1, 0]]))
