"""Adapters leave the base alone, begin at nothing, train only themselves, and merge into what they do."""

import pytest
import torch

from entrenar.errors import ConfigError
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import document_spans
from entrenar.peft import (
    LoraConfig,
    LoraLinear,
    SavedModule,
    active_adapter,
    adapter_names,
    add_adapter,
    from_base,
    learning_rate_factors,
    merge,
    plain_state,
    set_adapter,
    trainable_table,
    unload,
    unmerge,
    wrappers,
)

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=40, max_seq_len=32
)
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "plain": LoraConfig(rank=3),
    "everywhere": LoraConfig(rank=2, target_modules=ALL_PROJECTIONS),
    "rslora": LoraConfig(rank=3, use_rslora=True),
    "dora": LoraConfig(rank=3, use_dora=True),
    "patterns": LoraConfig(rank=3, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 5.0}),
    "gaussian": LoraConfig(rank=3, lora_init="gaussian"),
    "saved": LoraConfig(rank=3, modules_to_save=("embed_tokens", "lm_head"), layers="top:1"),
    "dropout": LoraConfig(rank=3, lora_dropout=0.3),
}
PISSA = {"pissa": LoraConfig(rank=3, lora_init="pissa"), "pissa dora": LoraConfig(lora_init="pissa", use_dora=True)}
IDS = torch.arange(14).reshape(2, 7) * 4 % 61


def base(dtype: torch.dtype = torch.float32, **changes: object) -> Llama:
    model = Llama(CONFIG.model_copy(update=changes))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return model.to(dtype).eval()


def perturb(model: Llama, seed: int = 2) -> None:
    """Move everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def adapted(config: LoraConfig, dtype: torch.dtype = torch.float32, **changes: object) -> Llama:
    model = base(dtype, **changes)
    from_base(model, config, torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_at_step_zero_are_the_bases_bitwise(name: str, dtype: torch.dtype) -> None:
    """A new adapter changes no bit of the logits, and one step of it does."""
    model = adapted(VARIANTS[name], dtype)
    logits = model(IDS)
    assert torch.equal(logits, base(dtype)(IDS))
    perturb(model)
    assert not torch.equal(model(IDS), logits)


@pytest.mark.parametrize("name", PISSA)
def test_pissa_begins_at_the_base_and_at_its_main_directions(name: str) -> None:
    """PiSSA's logits begin within rounding of the base's; its B A is the best approximation of each weight."""
    model = adapted(PISSA[name], torch.float64)
    torch.testing.assert_close(model(IDS), base(torch.float64)(IDS), rtol=1e-12, atol=1e-12)
    wrapper = model.get_submodule("model.layers.1.self_attn.q_proj")
    adapter, rank = wrapper.adapter("default"), PISSA[name].rank
    residual = wrapper.weight - adapter.scale * adapter.lora_B @ adapter.lora_A
    sizes = torch.linalg.svdvals(wrapper.weight)
    torch.testing.assert_close(torch.linalg.svdvals(residual)[: len(sizes) - rank], sizes[rank:])


@pytest.mark.parametrize(
    ("init", "deviation"), [("default", (1 / 3) ** 0.5 / 24**0.5), ("gaussian", 1 / 8)], ids=["default", "gaussian"]
)
def test_a_is_drawn_with_its_deviation_and_b_is_zero(init: str, deviation: float) -> None:
    """A is uniform in ±1/sqrt(I) or normal with deviation 1/R; B is zero; another seed draws another A."""
    config = LoraConfig(rank=8, target_modules=ALL_PROJECTIONS[:4], lora_init=init)
    model = adapted(config)
    drawn = torch.cat(
        [parameter.detach().flatten() for name, parameter in model.named_parameters() if "lora_A" in name]
    )
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
    assert abs(float(drawn.mean())) < 4 * deviation / len(drawn) ** 0.5
    assert all(not parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    again = base()
    from_base(again, config, torch.Generator().manual_seed(4))
    assert not torch.equal(next(p for n, p in again.named_parameters() if "lora_A" in n).flatten(), drawn[:192])


@pytest.mark.parametrize("name", VARIANTS | PISSA)
def test_training_moves_adapters_only(name: str) -> None:
    """After steps on a real loss every base tensor is bitwise what it was, has no gradient, and every adapter moved."""
    model = adapted((VARIANTS | PISSA)[name]).train()
    before = {key: tensor.clone() for key, tensor in plain_state(model).items()}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    first = {key: parameter.detach().clone() for key, parameter in trained.items()}
    for _ in range(2):  # A gets its first gradient once B has left zero
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        with torch.no_grad():
            for parameter in trained.values():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    assert all(torch.equal(tensor, before[key]) for key, tensor in plain_state(model).items())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert [key for key, parameter in trained.items() if torch.equal(parameter, first[key])] == []


@pytest.mark.parametrize("name", VARIANTS | PISSA)
def test_merged_model_does_what_the_adapter_does(name: str) -> None:
    """Merged and unmerged logits agree to float64 rounding; unmerging restores each weight bit for bit."""
    model = adapted((VARIANTS | PISSA)[name], torch.float64)
    perturb(model)
    before = {key: tensor.clone() for key, tensor in plain_state(model).items()}
    logits = model(IDS)
    merge(model)
    merged = {key: tensor.clone() for key, tensor in plain_state(model).items()}
    torch.testing.assert_close(model(IDS), logits, rtol=1e-10, atol=1e-10)
    merge(model)
    assert all(torch.equal(tensor, merged[key]) for key, tensor in plain_state(model).items())
    unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in plain_state(model).items())
    assert torch.equal(model(IDS), logits)
    plain = base(torch.float64)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(IDS), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_merge_adds_in_float32_and_rounds_once(adapter_dtype: torch.dtype) -> None:
    """A bfloat16 weight plus its update equals the float64 sum to half a unit in the last place of bfloat16."""
    model = adapted(LoraConfig(rank=3), torch.bfloat16)
    perturb(model)
    wrapper = model.get_submodule("model.layers.0.self_attn.q_proj")
    adapter = wrapper.adapter("default").to(adapter_dtype)
    exact = wrapper.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    wrapper.merge()
    assert wrapper.weight.dtype == torch.bfloat16
    assert float(((wrapper.weight - exact).abs() / exact.abs()).detach().max()) <= 2**-8


def test_unload_gives_the_plain_modules_back() -> None:
    """Unloaded, a model has the base's names and modules: unmerged ones are the base's bit for bit, merged ones act."""
    model = adapted(VARIANTS["saved"], torch.float64)
    perturb(model)
    logits = model(IDS)
    merge(model)
    unload(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base().named_parameters()]
    torch.testing.assert_close(model(IDS), logits, rtol=1e-10, atol=1e-10)
    other = adapted(VARIANTS["plain"], torch.float64)
    perturb(other)
    unload(other)
    assert torch.equal(other(IDS), base(torch.float64)(IDS))


def test_several_adapters_are_held_and_switched() -> None:
    """Each adapter gives its own logits whichever was in use before; None gives the base's."""
    model = adapted(VARIANTS["plain"])
    perturb(model)
    first = model(IDS)
    add_adapter(model, VARIANTS["saved"], torch.Generator().manual_seed(5), "second")
    assert torch.equal(model(IDS), first)
    set_adapter(model, "second", is_trainable=True)
    assert torch.equal(model(IDS), base()(IDS))
    perturb(model, seed=6)
    second = model(IDS)
    assert adapter_names(model) == ["default", "second"]
    set_adapter(model, "default")
    assert active_adapter(model) == "default"
    assert torch.equal(model(IDS), first)
    set_adapter(model, None)
    assert torch.equal(model(IDS), base()(IDS))
    set_adapter(model, "second")
    assert torch.equal(model(IDS), second)
    assert not torch.equal(first, second)


def test_only_the_adapter_in_use_is_trained() -> None:
    """Switching moves the gradients along: an adapter at rest never gets one."""
    model = adapted(VARIANTS["plain"])
    add_adapter(model, VARIANTS["saved"], torch.Generator(), "second")
    set_adapter(model, "second", is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".adapters.second" in name for name in trained)
    set_adapter(model, "second")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_head_follows_the_trained_embedding() -> None:
    """In a tied model a saved embedding is also the head: the loss reads the trained copy in both places."""
    model = adapted(LoraConfig(rank=2, modules_to_save=("embed_tokens",)), tie_word_embeddings=True)
    copy = model.model.embed_tokens
    assert isinstance(copy, SavedModule)
    assert model.head_weight is copy.adapters["default"]
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    assert int((copy.adapters["default"].grad.abs().sum(1) > 0).sum()) == CONFIG.vocab_size


def test_dropout_acts_in_training_only() -> None:
    """In training two passes differ, in evaluation they are the same."""
    model = adapted(LoraConfig(rank=3, lora_dropout=0.5))
    perturb(model)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_are_the_same_with_activation_checkpointing_and_dropout(
    checkpointing: str, dtype: torch.dtype
) -> None:
    """A recomputed forward draws the same dropout, so in packed rows too no gradient differs by a bit."""
    gradients = []
    documents = document_spans(torch.arange(IDS.shape[1] - 1).div(3, rounding_mode="floor").expand(len(IDS), -1))
    for way in ("none", checkpointing):
        model = adapted(LoraConfig(rank=3, lora_dropout=0.4), dtype).train()
        perturb(model)
        model.set_compute_dtype(torch.float32)
        model.checkpointing = way
        torch.manual_seed(9)
        model.loss(IDS[:, :-1], IDS[:, 1:], documents=documents).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


def test_dora_gives_each_row_its_magnitude() -> None:
    """Whatever A and B are, the merged weight's rows have the trained magnitudes as their norms."""
    model = adapted(LoraConfig(rank=3, use_dora=True), torch.float64)
    perturb(model)
    for _, wrapper in wrappers(model):
        magnitudes = wrapper.adapter("default").lora_magnitude_vector.detach()
        wrapper.merge()
        torch.testing.assert_close(torch.linalg.vector_norm(wrapper.weight.detach(), dim=1), magnitudes.abs())


def test_dora_norms_are_float32_for_bfloat16_adapters() -> None:
    """An adapter cast to bfloat16, as a bfloat16 run does, still gets its row norms to float32 rounding."""
    model = adapted(LoraConfig(rank=3, use_dora=True), torch.bfloat16)
    perturb(model)
    wrapper = model.get_submodule("model.layers.0.self_attn.q_proj")
    adapter = wrapper.adapter("default").to(torch.bfloat16)
    exact = wrapper.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    norms = adapter.row_norms(wrapper.weight)
    torch.testing.assert_close(norms.double(), exact.norm(dim=1).detach(), rtol=1e-5, atol=0)


def test_compute_dtype_of_the_base_holds_for_its_adapter() -> None:
    """bfloat16 weights multiplied in float32 stay so under an adapter: step zero is still bitwise the base's."""
    model, plain = adapted(LoraConfig(rank=3), torch.bfloat16), base(torch.bfloat16)
    model.set_compute_dtype(torch.float32)
    plain.set_compute_dtype(torch.float32)
    assert torch.equal(model(IDS), plain(IDS))
    wrapper = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(wrapper, LoraLinear)
    perturb(model)
    x = torch.randn(4, 24).bfloat16()
    adapter = wrapper.adapter("default")
    exact = (
        x.double() @ (wrapper.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()).mT
    )
    assert float(((wrapper(x).double() - exact).abs() / exact.abs()).detach().max()) <= 2**-8


def test_learning_rate_factors_are_lora_plus() -> None:
    """B learns faster than A by the ratio; magnitudes and saved modules as fast as A; the frozen rest is not named."""
    model = adapted(LoraConfig(rank=2, use_dora=True, modules_to_save=("lm_head",), layers=(2,)))
    factors = learning_rate_factors(model, 16.0)
    assert {name.rpartition("default")[2].removeprefix("."): factor for name, factor in factors.items()} == {
        "lora_A": 1.0,
        "lora_B": 16.0,
        "lora_magnitude_vector": 1.0,
        "": 1.0,
    }
    assert len(factors) == 2 * 3 + 1


@pytest.mark.parametrize(
    ("preset", "rank", "trained", "total", "line"),
    [
        ("124m", 3, 110_592, 123_685_632, "99.91 % fewer"),
        ("7b", 8, 4_194_304, 6_738_415_616, "99.94 % fewer"),
    ],
)
def test_table_counts_what_requires_a_gradient(preset: str, rank: int, trained: int, total: int, line: str) -> None:
    """Adapters on q and v of rank 3 on 124m train 99.91 % fewer parameters, of rank 8 on 7b 99.94 %."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset(preset))
    from_base(model, LoraConfig(rank=rank), torch.Generator())
    table = trainable_table(model)
    assert (table.trained_parameters, table.base_parameters) == (trained, total)
    assert trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert list(table.lines())[-1] == f"trained: {trained:,} of {total:,} parameters ({line})"


def test_table_has_a_row_for_each_kind() -> None:
    """Alike tensors of all layers share a row with their number, shape and count; a saved module has its own."""
    table = trainable_table(adapted(LoraConfig(rank=2, modules_to_save=("lm_head",), layers="top:2")))
    rows = {(kind.name, kind.shape, kind.tensors, kind.parameters) for kind in table.kinds}
    assert rows == {
        ("q_proj.lora_A", (2, 24), 2, 96),
        ("q_proj.lora_B", (24, 2), 2, 96),
        ("v_proj.lora_A", (2, 24), 2, 96),
        ("v_proj.lora_B", (12, 2), 2, 48),
        ("lm_head.weight", (61, 24), 1, 1464),
    }
    assert table.base_parameters == CONFIG.parameter_count()


def test_table_of_full_fine_tuning_saves_nothing() -> None:
    """Without adapters every parameter is trained, and the table says so."""
    table = trainable_table(base())
    assert table.trained_parameters == table.base_parameters == CONFIG.parameter_count()
    assert ("up_proj.weight", (40, 24), 3) in {(kind.name, kind.shape, kind.tensors) for kind in table.kinds}
    assert list(table.lines())[-1].endswith("(0.00 % fewer)")


def test_name_that_is_taken_or_no_name_is_refused() -> None:
    """An adapter's name is new and made of plain characters."""
    model = adapted(VARIANTS["plain"])
    with pytest.raises(ConfigError, match=r"^adapter 'default' is there already; held are default$"):
        add_adapter(model, VARIANTS["plain"], torch.Generator(), "default")
    for name in ("a.b", "", "keys"):
        with pytest.raises(ConfigError, match=r"^an adapter's name is made of letters, digits, - and _, got "):
            add_adapter(model, VARIANTS["plain"], torch.Generator(), name)


def test_unknown_adapter_is_refused_with_those_held() -> None:
    """Switching to an adapter that is not held lists those that are."""
    with pytest.raises(ConfigError, match=r"^no adapter 'other' is held; there are default$"):
        set_adapter(adapted(VARIANTS["plain"]), "other")
    with pytest.raises(ConfigError, match=r"^no adapter 'other' is held; there are none$"):
        set_adapter(base(), "other")


def test_merge_without_an_adapter_in_use_is_refused() -> None:
    """There is nothing to merge when the base alone is in use."""
    model = adapted(VARIANTS["plain"])
    set_adapter(model, None)
    with pytest.raises(ConfigError, match=r"^merge needs an adapter in use; held are default$"):
        merge(model)


def test_merged_model_refuses_to_switch() -> None:
    """While one adapter is in the weights no other can be put over them."""
    model = adapted(VARIANTS["plain"])
    merge(model)
    with pytest.raises(ConfigError, match=r"^adapter 'default' is merged into the weights; unmerge it first$"):
        set_adapter(model, None)
    with pytest.raises(ConfigError, match=r"unmerge it first$"):
        add_adapter(model, VARIANTS["plain"], torch.Generator(), "second")


def test_saved_module_must_be_one_weight() -> None:
    """A module with a bias cannot be kept as one tensor."""
    with pytest.raises(ConfigError, match=r"^modules_to_save takes modules that are one weight, got one with "):
        SavedModule(torch.nn.Linear(2, 2))


def test_a_second_adapter_shares_the_wrapper_of_the_first() -> None:
    """Wrappers hold several adapters; they do not hold each other."""
    model = adapted(VARIANTS["plain"])
    add_adapter(model, VARIANTS["everywhere"], torch.Generator(), "second")
    assert not any(isinstance(wrapper.base_layer, LoraLinear) for _, wrapper in wrappers(model))


def test_an_adapter_that_is_only_held_asks_for_no_gradient() -> None:
    """What is added beside the one in use is frozen, copies of whole modules too."""
    model = adapted(VARIANTS["plain"])
    before = sum(parameter.requires_grad for parameter in model.parameters())
    add_adapter(model, VARIANTS["saved"], torch.Generator(), "second")
    assert sum(parameter.requires_grad for parameter in model.parameters()) == before


def test_unmerging_what_is_not_merged_changes_nothing() -> None:
    """A base that was never replaced stays, for projections and for whole modules."""
    model = adapted(VARIANTS["saved"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    unmerge(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_merged_base_stays_frozen() -> None:
    """Putting another weight in its place does not begin to train it."""
    model = adapted(VARIANTS["saved"])
    merge(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("base_layer.weight"))


def test_a_saved_module_is_in_the_mode_of_its_base() -> None:
    """Wrapping does not put a model that is evaluated back into training."""
    assert not SavedModule(torch.nn.Embedding(3, 2).eval()).training
    assert SavedModule(torch.nn.Embedding(3, 2).train()).training


def test_pissa_keeps_its_start_as_constants_that_move_with_the_module() -> None:
    """The subtracted start is no part of the graph and follows the module to another dtype."""
    model = adapted(PISSA["pissa"])
    low = next(wrapper for _, wrapper in wrappers(model)).adapters["default"]
    low.start_from(low.lora_A, low.lora_B)
    assert {"start_a", "start_b"} <= {name for name, _ in low.named_buffers()}
    assert not low.start_a.requires_grad
    assert not low.start_b.requires_grad
    assert low.double().start_b.dtype == torch.float64


def test_a_model_without_storage_draws_nothing() -> None:
    """On the meta device an adapter takes its shape alone: no random number is spent, no matrix taken apart."""
    with torch.device("meta"):
        model = Llama(CONFIG)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    from_base(model, VARIANTS["plain"], generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("config", "has_start"), [(VARIANTS["plain"], False), (PISSA["pissa"], True)])
def test_a_model_without_storage_has_the_constants_that_pissa_keeps(config: LoraConfig, *, has_start: bool) -> None:
    """The plan of a run counts them: the start of A and of B, in their shapes, which nobody trains."""
    with torch.device("meta"):
        model = Llama(CONFIG)
    from_base(model, config, torch.Generator())
    low = next(wrapper for _, wrapper in wrappers(model)).adapters["default"]
    starts = [low.start_a, low.start_b]
    shapes = [low.lora_A.shape, low.lora_B.shape] if has_start else [None, None]
    assert [None if start is None else start.shape for start in starts] == shapes
    assert not any(start.requires_grad for start in starts if start is not None)
