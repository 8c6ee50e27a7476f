"""The product with a weight in four bits is that with the widened weight, and nothing of it hides from autograd."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from entrenar.ops.lora_linear import lora_linear
from entrenar.ops.quantized.linear import (
    quantized_linear,
    reference_quantized_linear,
    tiles,
)
from entrenar.ops.quantized.nf4 import Nf4Weight, dequantize_nf4, quantize_nf4
from entrenar.ops.quantized.protocol import stored_bytes

SCALE = 1.7
OUT, WIDTH, RANK = 200, 96, 3


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Nf4Weight, Tensor, Tensor]:
    """x, weight, A and B."""
    generator = torch.Generator().manual_seed(3)
    x, weight, lora_a, lora_b = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 5, WIDTH), (OUT, WIDTH), (RANK, WIDTH), (OUT, RANK))
    )
    held = quantize_nf4(weight.float())
    return x.to(dtype).requires_grad_(), held, lora_a.to(dtype).requires_grad_(), lora_b.to(dtype).requires_grad_()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))


@pytest.mark.parametrize("tile_rows", [1, 64, 70, 1000, None])
def test_tiles_of_any_size_give_the_product_with_the_widened_weight(tile_rows):
    """Output and gradients are those of the plain low-rank product over the dequantized weight."""
    x, weight, lora_a, lora_b = operands()
    ours = quantized_linear(
        x, weight, lora_a, lora_b, scale=SCALE, dropout=0.4, generator=seeded(), tile_rows=tile_rows
    )
    wide = dequantize_nf4(weight, torch.float64)
    expected = lora_linear(x, wide, lora_a, lora_b, scale=SCALE, dropout=0.4, generator=seeded())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(ours, x, lora_a, lora_b), gradients(expected, x, lora_a, lora_b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "rows"), [(1024, 1024), (5000, 192), (4095, 256), (1 << 15, 64)])
def test_a_tile_is_a_million_numbers_in_whole_blocks_of_rows(width, rows):
    """Unless told otherwise a tile is as many times 64 rows as 2^20 numbers hold, and 64 of a very wide weight."""
    weight = Nf4Weight(
        torch.zeros((rows + 1) * width // 2 + 1, dtype=torch.uint8),
        torch.zeros((rows + 1) * width // 64 + 1), None, None, (rows + 1, width),
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [piece for piece, _ in tiles(weight, torch.float32)] == [slice(0, rows), slice(rows, rows + 1)]


def test_half_an_adapter_is_none():
    """A without B, or B without A, changes nothing and is not differentiated."""
    x, weight, lora_a, lora_b = operands()
    plain = quantized_linear(x, weight)
    for half in ({"lora_a": lora_a}, {"lora_b": lora_b}):
        assert torch.equal(quantized_linear(x, weight, **half), plain)
        assert torch.equal(reference_quantized_linear(x, weight, **half), reference_quantized_linear(x, weight))
    y = quantized_linear(x, weight, lora_a)
    assert torch.autograd.grad(y.sum(), (x, lora_a), allow_unused=True)[1] is None


def test_without_an_adapter_it_is_the_product_alone():
    """No A and B is x Wᵀ, and its gradient dy W."""
    x, weight, _, _ = operands()
    y = quantized_linear(x, weight, tile_rows=64)
    torch.testing.assert_close(y, reference_quantized_linear(x, weight), rtol=1e-12, atol=1e-12)
    wide = dequantize_nf4(weight, torch.float64)
    torch.testing.assert_close(gradients(y, x)[0], gradients(x @ wide.mT, x)[0], rtol=1e-12, atol=1e-12)


def test_a_zero_b_leaves_the_dequantized_product_bit_for_bit():
    """With B = 0 the adapter adds exact zeros."""
    x, weight, lora_a, lora_b = operands(torch.float32)
    assert torch.equal(quantized_linear(x, weight, lora_a, lora_b * 0, scale=SCALE), quantized_linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_bounded_by_its_rounding(dtype):
    """In the stored dtype, the sum over tiles in float32 loses no more than one rounding of the weight and result."""
    x, weight, lora_a, lora_b = operands(dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in (x, lora_a, lora_b))
    ours = quantized_linear(x, weight, lora_a, lora_b, scale=SCALE, tile_rows=8)
    want = reference_quantized_linear(exact[0], weight, *exact[1:], scale=SCALE)
    bound = 4 * torch.finfo(dtype).eps
    pairs = zip((ours, *gradients(ours, x, lora_a, lora_b)), (want, *gradients(want, *exact)), strict=True)
    for got, expected in pairs:
        assert got.dtype == dtype
        assert float((got.detach().double() - expected.detach()).norm() / expected.detach().norm()) < bound


def test_compute_dtype_widens_the_operands_and_not_the_result():
    """In float32 over bfloat16 activations only the result is rounded."""
    x, weight, _, _ = operands(torch.bfloat16)
    y = quantized_linear(x, weight, compute_dtype=torch.float32)
    assert torch.equal(y, (x.float() @ dequantize_nf4(weight).mT).bfloat16())


@pytest.mark.parametrize("held", [0, 1, 2, 3])
def test_writing_to_what_the_backward_needs_is_noticed(held):
    """Codes and scales that change before the backward are an error, not wrong gradients (bitsandbytes 2034)."""
    x, weight, lora_a, lora_b = operands()
    y = quantized_linear(x, weight, lora_a, lora_b, scale=SCALE)
    list(weight.tensors().values())[held].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_every_tensor_passes_the_hooks_of_saved_tensors():
    """What is offloaded by hooks is read back from them: buffers that are reused meanwhile change no gradient."""
    x, weight, lora_a, lora_b = operands()
    expected = gradients(quantized_linear(x, weight, lora_a, lora_b, scale=SCALE), x, lora_a, lora_b)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = quantized_linear(x, weight, lora_a, lora_b, scale=SCALE)
    for tensor in (x, lora_a, lora_b, *weight.tensors().values()):
        tensor.data.zero_()
    assert all(torch.equal(got, want) for got, want in zip(gradients(y, x, lora_a, lora_b), expected, strict=True))


def test_activation_checkpointing_gives_the_same_gradients():
    """Computed again in the backward, the product has the gradients it had."""
    x, weight, lora_a, lora_b = operands()
    expected = gradients(quantized_linear(x, weight, lora_a, lora_b, scale=SCALE), x, lora_a, lora_b)
    again = checkpoint(
        lambda x, a, b: quantized_linear(x, weight, a, b, scale=SCALE), x, lora_a, lora_b, use_reentrant=False
    )
    assert all(torch.equal(got, want) for got, want in zip(gradients(again, x, lora_a, lora_b), expected, strict=True))


def saved_bytes(function, *inputs) -> int:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(sizes)


def test_only_what_the_backward_reads_is_saved():
    """A product without an adapter saves the codes and nothing of x; with one, x and u too; never a widened weight."""
    x, weight, lora_a, lora_b = operands(torch.float32)
    assert saved_bytes(lambda: quantized_linear(x, weight)) == stored_bytes(weight)
    adapter = lora_a.nbytes + lora_b.nbytes + 10 * RANK * 4
    assert saved_bytes(lambda: quantized_linear(x, weight, lora_a, lora_b)) == stored_bytes(weight) + x.nbytes + adapter
