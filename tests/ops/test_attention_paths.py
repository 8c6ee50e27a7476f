"""Attention takes the path it should: which kernel, cut how, in which dtype, copied when."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from entrenar import ops
from entrenar.ops.attention import (
    fused_attention,
    join,
    kernel_input,
    reference_attention,
    span_slices,
)

attention_file = importlib.import_module("entrenar.ops.attention")  # the package's name is the function's


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def whole(start: int, end: int, batch: slice) -> tuple[slice, slice, slice]:
    return batch, slice(None), slice(start, end)


def test_pieces_are_documents_else_rows_else_the_whole():
    """Documents cut each row; a wider dtype cuts rows; else one piece holds all."""
    assert span_slices(3, 5, (), by_row=False) == [whole(0, 5, slice(0, 3))]
    assert span_slices(3, 5, (), by_row=True) == [whole(0, 5, slice(row, row + 1)) for row in range(3)]
    spans = (((0, 2), (2, 5)), ((0, 5),))
    cut = [whole(0, 2, slice(0, 1)), whole(2, 5, slice(0, 1)), whole(0, 5, slice(1, 2))]
    assert span_slices(2, 5, spans, by_row=False) == cut
    assert span_slices(2, 5, spans, by_row=True) == cut


@pytest.mark.parametrize(("compute_dtype", "kernels"), [(torch.float32, 1), (torch.float64, 5)])
def test_rows_are_widened_one_at_a_time(compute_dtype, kernels, monkeypatch):
    """In its own dtype one kernel takes the whole batch; in a wider one each row is copied by itself."""
    calls = []
    monkeypatch.setattr(attention_file, "kernel_input", lambda x, dtype: calls.append(x) or kernel_input(x, dtype))
    q, k = draw(5, 2, 3, 4, dtype=torch.float32), draw(5, 1, 3, 4, dtype=torch.float32)
    out = ops.attention(q, k, k, compute_dtype=compute_dtype)
    assert len(calls) == 3 * kernels
    torch.testing.assert_close(out, reference_attention(q, k, k))  # also with more rows than heads


def test_products_run_in_the_compute_dtype():
    """bfloat16 inputs computed in float32 give the float32 result, rounded once."""
    q, k = draw(2, 4, 6, 8, dtype=torch.bfloat16), draw(2, 2, 6, 8, dtype=torch.bfloat16)
    wide = ops.attention(q.float(), k.float(), k.float()).bfloat16()
    assert torch.equal(ops.attention(q, k, k, compute_dtype=torch.float32), wide)


def test_a_single_part_and_a_fitting_layout_are_not_copied():
    """What the kernel can read as it lies is handed over as it lies."""
    x = draw(2, 3, 4, 5)
    assert join([x], [whole(0, 4, slice(0, 2))], x) is x
    strided = x.transpose(1, 2)
    assert kernel_input(strided, torch.float64).data_ptr() == x.data_ptr()
    assert kernel_input(x.mT, torch.float64).is_contiguous()


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (1, 4), (3, 4), (4, 6)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4)])
def test_the_fused_path_of_other_devices_equals_the_definition(queries, keys, heads, groups):
    """Square, single-query and cached shapes; as many heads as keys; grouped or not."""
    q, k, v = draw(2, heads, queries, 8), draw(2, groups, keys, 8), draw(2, groups, keys, 8) / 3
    torch.testing.assert_close(fused_attention(q, k, v, 0.3), reference_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize(("queries", "keys", "masked"), [(4, 4, False), (1, 4, False), (3, 4, True)])
def test_a_mask_is_made_only_where_the_kernels_own_flag_does_not_do(queries, keys, masked, monkeypatch):
    """A square and a single query need none of T x S numbers."""
    masks, kernel = [], attention_file.scaled_dot_product_attention
    monkeypatch.setattr(
        attention_file,
        "scaled_dot_product_attention",
        lambda *args, attn_mask, **kw: masks.append(attn_mask) or kernel(*args, attn_mask=attn_mask, **kw),
    )
    q, k = draw(2, 4, queries, 8), draw(2, 2, keys, 8)
    fused_attention(q, k, k, 0.3)
    assert [mask is not None for mask in masks] == [masked]


def test_documents_are_cut_on_other_devices_too(monkeypatch):
    """Where no flash kernel of the CPU runs, documents still never see each other."""
    documents = ops.Documents.from_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    seen = []
    monkeypatch.setattr(
        attention_file, "fused_attention_by_document", lambda q, _k, _v, scale, spans: seen.append((spans, scale)) or q
    )
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, device="cuda")
    ops.attention(q, q, q, documents=documents)
    assert seen == [(documents.spans, 0.25)]
