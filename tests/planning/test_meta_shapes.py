"""The rules say what torch's kernels return."""

import pytest
import torch

from entrenar.planning.meta_shapes import rule_of

ATEN = torch.ops.aten
IS_CAUSAL = True


def calls():
    """Each operation with real arguments, in the layouts that a step has."""
    x = torch.randn(2, 6, 4)
    turned, low = torch.randn(2, 4, 6).transpose(1, 2), x.bfloat16()
    narrow = torch.randn(2, 6, 8)[..., :4]
    matrix, index = torch.randn(5, 3), torch.tensor([[0, 4], [2, 2]])
    q = torch.randn(2, 8, 4, 16).transpose(1, 2)
    keys = torch.randn(2, 8, 2, 16).transpose(1, 2)
    flash = ATEN._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = flash.default(q, keys, keys, 0.0, IS_CAUSAL)
    for other in (x, turned, narrow, torch.tensor(2.0)):
        yield ATEN.mul.Tensor, (x, other), {}
        yield ATEN.add.Tensor, (other, turned), {}
    yield ATEN.sub.Tensor, (low, x), {}
    yield ATEN.mul.Tensor, (low, torch.tensor(3.0)), {}
    yield ATEN.mul.Tensor, (low, 2.5), {}
    yield ATEN.div.Tensor, (torch.arange(4), 2.0), {}
    yield ATEN.mul.Tensor, (x, torch.randn(6, 1)), {}
    yield ATEN.floor_divide.default, (torch.arange(9), torch.tensor(4)), {}
    for unary in (ATEN.neg, ATEN.rsqrt, ATEN.silu, ATEN.sigmoid, ATEN.exp, ATEN.cos):
        yield unary.default, (turned,), {}
        yield unary.default, (narrow,), {}
    yield ATEN.silu_backward.default, (low, low), {}
    yield ATEN.ne.Scalar, (index, 2), {}
    yield ATEN.lt.Tensor, (x, turned), {}
    yield ATEN.where.self, (x > 0, x, torch.tensor(0.0)), {}
    yield ATEN.mean.dim, (x, [-1], True), {}
    yield ATEN.sum.default, (x,), {}
    yield ATEN.sum.dim_IntList, (x, [0, 1]), {}
    yield ATEN.sum.dim_IntList, (low, [1], True), {"dtype": torch.float32}
    yield ATEN.amax.default, (x, [-1], True), {}
    yield ATEN.linalg_vector_norm.default, (low,), {"dtype": torch.float32}
    for like in (ATEN.empty_like, ATEN.zeros_like, ATEN.ones_like):
        yield like.default, (turned,), {"dtype": torch.int16}
        yield like.default, (narrow,), {}
        yield like.default, (turned,), {"memory_format": torch.contiguous_format}
    yield ATEN._to_copy.default, (turned,), {"dtype": torch.bfloat16}
    yield ATEN.clone.default, (narrow,), {}
    yield ATEN.clone.default, (turned,), {"memory_format": torch.contiguous_format}
    yield ATEN.zeros.default, ([2, 3],), {"dtype": torch.float64}
    yield ATEN.new_empty.default, (x, [3, 2]), {"dtype": torch.float64}
    yield ATEN.new_full.default, (index, [3], -1), {"dtype": torch.float32}
    yield ATEN.mm.default, (matrix, matrix.mT), {}
    yield ATEN.bmm.default, (x, turned.mT), {}
    yield ATEN.addmm.default, (torch.zeros(5), matrix, matrix.mT), {}
    yield ATEN.embedding.default, (matrix, index), {}
    yield ATEN.embedding_dense_backward.default, (torch.randn(2, 2, 3), index, 5, -1, False), {}
    yield ATEN.index_select.default, (x, 1, torch.tensor([0, 0, 3])), {}
    yield ATEN.gather.default, (matrix, 1, torch.zeros(4, 2, dtype=torch.int64)), {}
    yield ATEN.cat.default, ([x, torch.empty(0), turned], 1), {}
    yield ATEN.stack.default, ([x, x], -1), {}
    yield flash.default, (q, keys, keys, 0.0, IS_CAUSAL), {}
    yield (
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
        (out, q, keys, keys, out, logsumexp, 0.0, IS_CAUSAL),
        {},
    )


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call[0]._schema.name.removeprefix("aten::"))
def test_a_rule_returns_the_shape_stride_and_dtype_of_the_kernel(call):
    """Without bytes, the result has the kernel's own shape, stride and dtype."""
    func, args, kwargs = call
    expected = func(*args, **kwargs)
    rule = rule_of(func)
    assert rule is not None
    got = rule(*args, **kwargs)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, got)), strict=True):
        made = other.make()
        assert made.is_meta
        assert (one.shape, one.stride(), one.dtype) == (made.shape, made.stride(), made.dtype)
        assert other.size_bytes == one.nbytes


def test_what_is_written_into_is_returned_as_it_is():
    """An operation that writes returns its argument, whether by position, by name or not at all."""
    x, y = torch.zeros(3), torch.ones(3)
    assert rule_of(ATEN.mul_.Tensor)(x, y) is x
    assert rule_of(ATEN.mm.out)(x, y, out=y) is y
    assert rule_of(ATEN._fused_adamw_.default)([x], [y], [y], [y], [], [y], lr=0.1) is None


def test_a_view_and_an_unknown_operation_are_left_to_torch():
    """Views share a storage, which no rule could say."""
    assert rule_of(ATEN.view.default) is None
    assert rule_of(ATEN.nonzero.default) is None
