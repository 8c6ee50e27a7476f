"""Projections in four bits take adapters, merge and move as plain ones do, and are never widened unasked."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import (
    LoraConfig,
    LowRank,
    QuantizedLinear,
    find_targets,
    fingerprint,
    from_base,
    merge,
    plain_state,
    put_quantized,
    quantized_projections,
    trainable_table,
    unload,
    unmerge,
    widen,
)
from entrenar.peft.layers import leading_factors, lost_to_quantizing
from entrenar.peft.targets import projections
from entrenar.peft.trunk import CutModel

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=32
)
LORA = LoraConfig(rank=3, lora_alpha=6, target_modules=("q_proj", "down_proj"), lora_dropout=0.0)


def test_codes_held_as_parameters_are_the_same_weight():
    """FSDP cuts parameters only: each part but single numbers becomes one, frozen, and the product stays the same."""
    weight = ops.quantize_nf4(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    projection = QuantizedLinear(weight, torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    before = projection(x)
    projection.hold_as_parameters()
    assert {name for name, _ in projection.named_parameters()} == {
        name for name, tensor in weight.tensors().items() if tensor is not None and tensor.ndim
    }
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    assert torch.equal(projection(x), before)


def plain_model(dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(CONFIG).to(dtype).eval()
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def quantized_model(dtype: torch.dtype = torch.float32) -> Llama:
    model = plain_model(dtype)
    for name, module in projections(model).items():
        put_quantized(model, name, ops.quantize_nf4(module.weight), dtype)
    return model


def adapted(config: LoraConfig = LORA, dtype: torch.dtype = torch.float32) -> Llama:
    model = quantized_model(dtype)
    from_base(model, config, torch.Generator().manual_seed(2))
    return model


def train_a_little(model: Llama) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Llama) -> Tensor:
    return model(ids())


def test_a_quantized_model_computes_with_its_dequantized_weights():
    """Logits are those of the plain model whose projections hold what the codes stand for."""
    model = quantized_model()
    before = logits(model)
    widen(model)
    assert not list(quantized_projections(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    plain = plain_model()
    plain.load_state_dict(plain_state(model))
    assert torch.equal(logits(plain), logits(model))


def test_a_new_adapter_leaves_the_logits_of_the_quantized_base_bit_for_bit():
    """B is zero, so nothing is added."""
    base = quantized_model()
    model = adapted()
    assert torch.equal(logits(model), logits(base))


def test_the_same_projections_can_be_adapted():
    """A projection in four bits is found, and has the rank it may take, as the plain one."""
    found = find_targets(quantized_model(), LORA)
    assert list(found) == list(find_targets(plain_model(), LORA))
    assert all(isinstance(module, QuantizedLinear) for module in found.values())


def test_adapters_learn_beside_codes_that_stay():
    """Every A and B has a gradient, the codes have none and stay what they were."""
    model = adapted()
    train_a_little(model)
    before = fingerprint(plain_state(model))
    model.loss(ids(), ids().roll(-1)).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 2 * 2
    assert all(bool(parameter.grad.abs().sum() > 0) for name, parameter in model.named_parameters() if name in trained)
    assert fingerprint(plain_state(model)) == before


def test_gradients_are_those_over_the_widened_base():
    """What an adapter learns over four bits is what it learns over the dequantized weights."""
    ours, wide = adapted(), adapted()
    for model in (ours, wide):
        train_a_little(model)
    widen(wide)
    for model in (ours, wide):
        model.loss(ids(), ids().roll(-1)).backward()
    wanted = dict(wide.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)


def test_merging_widens_and_unmerging_gives_the_codes_back():
    """Merged weights do what base and adapter did; unmerged, the base is the old one to the byte."""
    model = adapted()
    train_a_little(model)
    unmerged, before = logits(model), fingerprint(plain_state(model))
    merge(model)
    assert plain_state(model)["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert fingerprint(plain_state(model)) == before
    assert torch.equal(logits(model), unmerged)


def test_a_merged_unloaded_and_widened_model_has_the_plain_model_s_names():
    """What `entrenar merge` writes from a base in four bits is a plain model."""
    model = adapted(dtype=torch.bfloat16)
    train_a_little(model)
    merge(model)
    unload(model)
    widen(model)
    state = model.state_dict()
    assert state.keys() == plain_model().state_dict().keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_scales_keep_their_precision_when_the_model_is_cast():
    """Casting a model to bfloat16 and back leaves codes and scales as they were."""
    model = quantized_model()
    before = {name: module.quantized for name, module in quantized_projections(model)}
    model.to(torch.bfloat16).to(torch.float32)
    for name, module in quantized_projections(model):
        for tensor, was in zip(module.quantized.tensors().values(), before[name].tensors().values(), strict=True):
            assert tensor.dtype == was.dtype
            assert torch.equal(tensor, was)


def test_every_parameter_of_a_quantized_base_is_counted():
    """The table of what is trained counts four-bit weights as the parameters they stand for."""
    assert trainable_table(adapted()).base_parameters == CONFIG.parameter_count()


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_init": "pissa"}])
def test_dora_and_pissa_begin_at_the_quantized_base(change):
    """Magnitudes and principal directions are those of what the codes stand for, so the logits begin at the base's."""
    model = adapted(LORA.model_copy(update=change))
    torch.testing.assert_close(logits(model), logits(quantized_model()), rtol=1e-4, atol=1e-5)


def test_row_norms_are_those_of_the_sum():
    """‖W + s B A‖, found a thousand rows at a time and without widening all of W, is the norm of the sum."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(1500, 64, generator=generator)
    model = adapted(LORA.model_copy(update={"use_dora": True}))
    adapter = model.model.layers[0].self_attn.q_proj.adapter("default")
    adapter.lora_A = torch.nn.Parameter(torch.randn(3, 64, generator=generator))
    adapter.lora_B = torch.nn.Parameter(torch.randn(1500, 3, generator=generator))
    for held in (weight, ops.quantize_nf4(weight)):
        wide = held if isinstance(held, Tensor) else ops.dequantize_nf4(held)
        want = (wide + adapter.scale * adapter.lora_B @ adapter.lora_A).norm(dim=1)
        torch.testing.assert_close(adapter.row_norms(held), want.detach(), rtol=1e-4, atol=1e-4)


def test_the_compute_dtype_reaches_projections_in_four_bits():
    """`set_compute_dtype` holds for quantized and adapted projections, those put in later included."""
    model = adapted(dtype=torch.bfloat16)
    model.set_compute_dtype(torch.float32)
    assert {module.compute_dtype for _, module in quantized_projections(model)} == {torch.float32}
    put_quantized(model, "model.layers.0.mlp.up_proj", ops.quantize_nf4(torch.randn(48, 32)), torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_a_quantized_base_takes_an_eighth_of_float32():
    """The projections of the model take 4.1 bits a number and what their last blocks waste."""
    projected = [module for _, module in quantized_projections(quantized_model())]
    held = sum(ops.stored_bytes(module.quantized) for module in projected)
    assert held < 0.14 * sum(4 * math.prod(module.shape) for module in projected)


def test_a_quantized_model_can_be_cut_for_the_trunk_cache():
    """Quantizing leaves the model's own interface as it was."""
    assert isinstance(quantized_model(), CutModel)


@pytest.mark.parametrize("shape", [(40, 64), (300, 200), (200, 330)])
def test_leading_directions_are_nearly_the_best_there_are(shape):
    """Of a small weight the decomposition's own; of noise, the hardest case, at least 0.97 of what those hold."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    lora_a, lora_b = leading_factors(noise, 8)
    best = torch.linalg.svdvals(noise)
    taken = float(noise.square().sum() - (noise - lora_b @ lora_a).square().sum())
    share = taken / float(best[:8].square().sum())
    assert share <= 1 + 1e-5
    assert share > (0.97 if min(shape) > 96 else 1 - 1e-5)
    torch.testing.assert_close(lora_a.square().sum(1), lora_b.square().sum(0), rtol=1e-3, atol=0)  # equal shares


def test_what_quantizing_took_away_is_the_difference_in_float32():
    """Also from a bfloat16 original, which stays what it is."""
    original = torch.randn(50, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    few, before = ops.quantize_nf4(original), original.clone()
    assert torch.equal(lost_to_quantizing(original, few), before.float() - few.dequantize())
    assert torch.equal(original, before)


def test_loftq_without_an_original_changes_nothing():
    """The message says what it needs; a plain base has lost nothing."""
    model = quantized_model()
    with pytest.raises(ConfigError, match=r"lora_init = loftq .* needs a base that is quantized for this run"):
        from_base(model, LORA.model_copy(update={"lora_init": "loftq"}), torch.Generator())
    plain = plain_model()
    with pytest.raises(ConfigError, match=r"lora_init = loftq .* needs a base that is quantized for this run"):
        from_base(
            plain, LORA.model_copy(update={"lora_init": "loftq"}), torch.Generator(), original=lambda _: torch.ones(1)
        )
    assert not any(".lora_" in name for name, _ in [*model.named_parameters(), *plain.named_parameters()])


@pytest.mark.parametrize("bits", [None, 3])
def test_loftq_begins_at_the_best_approximation_of_what_was_lost(bits):
    """Times its scale, B A is the truncated decomposition of W - Q, and A and B are of one size."""
    original = torch.randn(24, 40, generator=torch.Generator().manual_seed(5)) * 0.1
    kept = original.clone()
    weight = ops.quantize_nf4(original) if bits is None else ops.quantize_nf_bits(original, bits)
    adapter = LowRank(weight, 3, 5.0, 0.0)
    adapter.draw(weight, "loftq", torch.Generator(), lambda: original)
    lost = original.double() - weight.dequantize().double()
    left, sizes, right = torch.linalg.svd(lost)
    wanted = left[:, :3] * sizes[:3] @ right[:3]
    got = adapter.scale * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(sizes[0]))
    sizes_of = [matrix.detach().norm() for matrix in (adapter.lora_A, adapter.lora_B)]
    torch.testing.assert_close(*sizes_of)
    assert torch.equal(original, kept)  # float32 already, and not written to


def test_loftq_over_a_plain_weight_is_refused_though_there_is_an_original():
    """Nothing was lost."""
    weight = torch.ones(4, 8)
    with pytest.raises(ConfigError, match="lora_init = loftq begins at what quantizing takes away"):
        LowRank(weight, 2, 1.0, 0.0).draw(weight, "loftq", torch.Generator(), lambda: weight)


@pytest.mark.parametrize(("shape", "is_iterated"), [((64, 70), True), ((70, 64), True), ((63, 70), False)])
def test_only_large_weights_are_decomposed_by_iteration(shape, is_iterated, monkeypatch):
    """From four times the directions that are followed on; below, the decomposition is whole."""
    whole = []
    layers = importlib.import_module("entrenar.peft.layers")
    monkeypatch.setattr(layers, "_SPARE_DIRECTIONS", 13)
    factors = layers.principal_factors
    monkeypatch.setattr(layers, "principal_factors", lambda *args: whole.append(args) or factors(*args))
    leading_factors(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), 3)
    assert bool(whole) != is_iterated


def test_iteration_follows_the_rank_and_some_directions_beside_it(monkeypatch):
    """Each pass multiplies by as many columns, twice; on a weight of few directions the result is exact."""
    layers = importlib.import_module("entrenar.peft.layers")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 5, generator=generator) @ torch.randn(5, 110, generator=generator)
    seen, qr = [], torch.linalg.qr
    monkeypatch.setattr(layers.torch.linalg, "qr", lambda matrix: seen.append(tuple(matrix.shape)) or qr(matrix))
    lora_a, lora_b = leading_factors(weight, 7)
    assert set(seen) == {(110, 7 + layers._SPARE_DIRECTIONS)}
    assert (lora_a.shape, lora_b.shape) == ((7, 110), (100, 7))
    torch.testing.assert_close(lora_b @ lora_a, weight, rtol=1e-4, atol=1e-4)
