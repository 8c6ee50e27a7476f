"""A kind of quantized weight is one class: whatever has the protocol multiplies, embeds, trains, merges and is planned.

The kind here is a toy that no file in `src` knows: a sign or zero for each number, a scale for each row.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from entrenar import ops
from entrenar.errors import FormatError
from entrenar.interop import quantized_layout
from entrenar.interop.hf_peft import identify_base, load_adapter, save_adapter
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import (
    LoraConfig,
    fingerprint,
    from_base,
    memory_lines,
    merge,
    plain_state,
    put_quantized,
    quantized_weights,
    set_adapter,
    trainable_table,
    unmerge,
    widen,
)
from entrenar.peft.targets import projections

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=32
)
LORA = LoraConfig(rank=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True, eq=False)
class SignWeight:
    """Signs times the mean magnitude of their row."""

    signs: Tensor
    means: Tensor
    shape: tuple[int, int]
    kind: ClassVar[str] = "signs"

    @property
    def bits(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.signs.device

    def tensors(self) -> dict[str, Tensor | None]:
        return {"signs": self.signs, "means": self.means}

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:
        rows = slice(None) if rows is None else rows
        return (self.signs[rows] * self.means[rows, None]).to(dtype)

    @classmethod
    def empty(cls, shape, make, bits=2):  # noqa: ARG003  # the protocol's
        return cls(make(shape, torch.int8), make(shape[:1], torch.float32), shape)


def signs_of(weight: Tensor) -> SignWeight:
    return SignWeight(weight.detach().sign().to(torch.int8), weight.detach().abs().mean(1), tuple(weight.shape))


def toy_model() -> Llama:
    """A model of which every projection, the embedding and the head are of the toy kind."""
    model = Llama(CONFIG).eval()
    model.init_weights(torch.Generator().manual_seed(1))
    for name, module in projections(model).items():
        put_quantized(model, name, signs_of(module.weight), torch.float32)
    put_quantized(model, "model.embed_tokens", signs_of(model.model.embed_tokens.weight), torch.float32)
    put_quantized(model, "lm_head", signs_of(model.lm_head.weight), torch.float32)
    return model


def adapted(seed: int = 2) -> Llama:
    model = toy_model()
    from_base(model, LORA, torch.Generator().manual_seed(seed))
    return model


def train(model: Llama, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model.loss(IDS, IDS.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", [SignWeight, *ops.KINDS.values()])
def test_a_kind_has_the_protocol_and_knows_its_size_before_it_is_made(kind):
    """`empty` has the tensors, by name, dtype and shape, that a real weight has: the planner counts on it."""
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(0))
    made = {
        "signs": signs_of,
        "nf4": ops.quantize_nf4,
        "int8": ops.quantize_int8,
        "nf-bits": lambda weight: ops.quantize_nf_bits(weight, 3),
    }[kind.kind](weight)
    assert isinstance(made, ops.QuantizedWeight)
    planned = kind.empty((70, 130), lambda shape, dtype: torch.empty(shape, dtype=dtype), made.bits)
    assert [(k, t.dtype, t.shape) for k, t in planned.tensors().items()] == [
        (k, t.dtype, t.shape) for k, t in made.tensors().items()
    ]
    assert ops.stored_bytes(planned) == ops.stored_bytes(made)
    again = kind(*made.tensors().values(), made.shape)
    assert torch.equal(again.dequantize(), made.dequantize())
    some = torch.tensor([3, 69, 3])
    assert torch.equal(made.dequantize(torch.bfloat16, some), made.dequantize(torch.bfloat16)[some])
    assert torch.equal(made.dequantize(rows=slice(5, 66)), made.dequantize()[5:66])


def test_a_model_of_the_toy_kind_trains_as_its_widened_twin():
    """Losses and adapters are those over the plain weights that the codes stand for, and the codes stay."""
    few, wide = adapted(), adapted()
    widen(wide)
    before = fingerprint({name: t for name, t in plain_state(few).items() if t.dtype == torch.int8})
    ours, theirs = train(few, 20), train(wide, 20)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < 0.95 * ours[0]
    assert fingerprint({name: t for name, t in plain_state(few).items() if t.dtype == torch.int8}) == before


def test_the_toy_kind_merges_and_comes_back():
    """Merged it is a plain weight that does the same; unmerged it has its codes again."""
    model = adapted()
    train(model, 3)
    with torch.no_grad():
        before = model(IDS)
        merge(model)
        torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert torch.equal(model(IDS), before)


def test_the_toy_kind_is_counted_and_named():
    """What is printed about a model names the kind; all parameters count."""
    model = adapted()
    (line,) = memory_lines(model)
    assert "in 16 matrices of signs (2 bits)" in line
    assert trainable_table(model).base_parameters == CONFIG.parameter_count()


def test_an_adapter_over_the_toy_kind_is_saved_and_knows_its_base(tmp_path):
    """Its folder is a plain PEFT adapter; over another base of the kind it is refused."""
    model = adapted()
    train(model, 2)
    base = identify_base(model, "toy")
    assert (base.kind, base.plain_dtype) == ("signs", torch.float32)
    save_adapter(tmp_path, model, LORA, base=base)
    again = toy_model()
    load_adapter(tmp_path, again)
    set_adapter(again, "default")
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    other = toy_model()
    other.model.layers[0].self_attn.q_proj.signs.neg_()
    with pytest.raises(FormatError, match="was trained on another base: toy"):
        load_adapter(tmp_path, other)


def test_a_kind_without_a_layout_is_not_written():
    """The message names weight and kind, and says what to do."""
    (name, weight), *_ = quantized_weights(toy_model()).items()
    with pytest.raises(FormatError, match=rf"^{name} is held as signs, and no folder has a layout for that; widen"):
        quantized_layout.pack(name, weight, torch.float32)
