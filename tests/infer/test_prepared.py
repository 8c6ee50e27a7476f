"""A model with quantized weights writes in a faster form: near to the weights as they are, and gone without a trace."""

import gc
import weakref

import pytest
import torch

from entrenar.infer import GenerateConfig, generate, prepared
from entrenar.infer.prepared import Dense, Int8Rows, int8_rows, prepare
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, add_adapter, put_quantized, quantize_weight, set_adapter

KINDS = ("nf4", "int8")


def _model(kind: str | None = "nf4", *, has_head: bool = False) -> Llama:
    """A small model whose projections are quantized, and embedding and head too if asked."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128, max_seq_len=64
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    names += ["model.embed_tokens", "lm_head"] if has_head else []
    for name in names if kind else ():
        weight = model.get_submodule(name).weight.detach()
        put_quantized(model, name, quantize_weight(name, weight, kind), torch.float32)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _adapt(model: Llama, *targets: str, is_trained: bool = False) -> None:
    add_adapter(model, LoraConfig(rank=4, target_modules=targets), torch.Generator().manual_seed(0), "one")
    set_adapter(model, "one", is_trainable=is_trained)


def _logits(model: Llama, rows: int, num_tokens: int = 8) -> torch.Tensor:
    ids = torch.arange(rows * 5).view(rows, 5) % 96
    ready = prepare(model, rows, num_tokens)
    with torch.inference_mode(), ready.in_use():
        hidden = model.hidden(ids)
        return model.logits(hidden) if ready.head is None else ready.head(hidden)


def _write(model: Llama, **changes) -> list[list[int | None]]:
    config = GenerateConfig(max_new_tokens=12, temperature=0, eos_token_ids=(), **changes)
    return list(generate(model, [[1, 2, 3]], config))


@pytest.fixture(autouse=True)
def _kernel_is_looked_for_anew():
    """What one test finds about the kernel is not for the next."""
    yield
    if hasattr(prepared._has_int8_kernel, "cache_clear"):
        prepared._has_int8_kernel.cache_clear()
    prepared._say_once.cache_clear()


@pytest.fixture
def as_float32(monkeypatch):
    """A processor without the kernels: weights are widened to float32."""
    monkeypatch.setattr(prepared, "_has_int8_kernel", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)


def test_codes_are_within_half_a_step_of_the_weight():
    """The error of each weight is at most 1/254 of its row's largest; a row of zeros stays zeros."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    form = int8_rows(weight)
    wide = form.codes.float() * form.scales[:, None]
    assert bool(((wide - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all())
    assert not wide[3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_head", [False, True])
def test_widened_weights_give_the_same_logits_and_text(as_float32, kind, has_head):
    """In float32 the form is the weight itself: logits to rounding, text exactly."""
    model = _model(kind, has_head=has_head)
    exact = _logits(model, 2, num_tokens=0)
    assert torch.allclose(_logits(model, 2), exact, rtol=1e-5, atol=1e-5)
    assert _write(model) == _write(model, decode="exact")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_faster_form_is_near(kind, rows, has_adapter):
    """Logits move by a few per cent of their spread at most, and their order hardly; adapters count.

    Where neither 8 bits nor bfloat16 are faster, the form is the weight itself in float32, and nothing moves.
    """
    model = _model(kind)
    if has_adapter:
        _adapt(model, "q_proj", "down_proj")
        plain = _logits(model, rows, num_tokens=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(_logits(model, rows, num_tokens=0), plain, atol=1e-2)
    exact = _logits(model, rows, num_tokens=0)
    moved = (_logits(model, rows) - exact).abs()
    assert moved.max() < 0.1 * exact.std()
    is_whole = prepared.choose(rows, 64).size_bytes == 4
    assert is_whole or moved.max() > 0


def test_few_rows_are_int8_and_many_are_dense():
    """The choice follows from the number of rows and the processor."""
    few, many = (prepared.choose(rows, 64).make(torch.ones(32, 64)) for rows in (1, 16))
    assert isinstance(few, Int8Rows)
    assert isinstance(many, Dense)


@pytest.mark.parametrize("width", [16, 72, 100, 136, 172])
def test_a_width_that_the_kernel_reads_past_is_dense(width):
    """Rows that are no multiple of 64 wide are left to torch's ordinary product, and come out right."""
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    form = prepared.choose(1, width).make(weight)
    assert isinstance(form, Dense)
    assert torch.allclose(form(x), x @ weight.mT, atol=0.05 * weight.shape[1] ** 0.5)


@pytest.mark.parametrize(("outputs", "width"), [(7, 64), (33, 128), (176, 64), (32, 5632)])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_kernel_is_right_for_every_number_of_outputs(outputs, width, rows):
    """Against the same codes in float64, to the rounding of bfloat16."""
    form = int8_rows(torch.randn(outputs, width, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    wide = form.codes.double() * form.scales[:, None].double()
    expected = x.double() @ wide.mT
    assert float((form(x) - expected).abs().max() / expected.abs().max()) < 0.01


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_without_torch_s_private_kernel_weights_are_dense(monkeypatch, error):
    """A kernel that is gone, refuses, or takes other arguments is not used; the text comes all the same."""

    def gone(*_: object) -> torch.Tensor:
        raise error("no such kernel")

    prepared._has_int8_kernel.cache_clear()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", gone)
    assert isinstance(prepared.choose(1, 64).make(torch.ones(32, 64)), Dense)
    assert len(_write(_model())) == 12


def test_a_kernel_that_multiplies_otherwise_is_not_used(monkeypatch):
    """Its answer to a known product decides, not its presence."""
    prepared._has_int8_kernel.cache_clear()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, codes, _: x.new_zeros(len(x), len(codes)))
    assert isinstance(prepared.choose(1, 64).make(torch.ones(32, 64)), Dense)


@pytest.mark.parametrize("reason", ["memory", "tokens", "exact", "plain"])
def test_nothing_is_prepared_where_it_does_not_pay(monkeypatch, reason):
    """Too little memory, too few tokens, a wish for exactness, or nothing that is quantized."""
    model = _model(None if reason == "plain" else "nf4")
    made = []
    monkeypatch.setattr(prepared, "int8_rows", lambda weight: made.append(weight) or int8_rows(weight))
    if reason == "memory":
        monkeypatch.setattr(prepared, "free_bytes", lambda: 1000)
    if reason == "tokens":
        list(generate(model, [[1, 2]], GenerateConfig(max_new_tokens=3)))
    else:
        _write(model, decode="exact" if reason == "exact" else "auto")
    assert made == []
    monkeypatch.undo()
    assert prepared.free_bytes() > 1 << 20


def test_forms_are_kept_until_a_weight_changes_and_die_with_the_model():
    """A second text costs no preparation; a changed weight is seen; nothing holds the forms when the model is gone."""
    model = _model()
    _write(model)
    first = prepared._KNOWN[model]
    _write(model)
    assert prepared._KNOWN[model] is first
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    _write(model)
    assert prepared._KNOWN[model] is not first
    gone = weakref.ref(prepared._KNOWN[model])
    del model, first
    gc.collect()
    assert gone() is None


def test_a_model_in_training_is_left_as_it_was():
    """After a text no form remains, no module multiplies otherwise, and no weight has moved."""
    model = _model()
    _adapt(model, "q_proj", is_trained=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = _logits(model, 2, num_tokens=0)
    _write(model)
    assert model not in prepared._KNOWN
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(_logits(model, 2, num_tokens=0), training)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_between_two_tokens_the_model_multiplies_as_ever():
    """Whoever uses the model while a text is being written gets the weights as they are."""
    model = _model()
    exact = _logits(model, 2, num_tokens=0)
    steps = generate(model, [[1, 2, 3]], GenerateConfig(max_new_tokens=12, temperature=0, eos_token_ids=()))
    next(steps)
    next(steps)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(_logits(model, 2, num_tokens=0), exact)
    steps.close()


def test_another_adapter_writes_its_own_text(as_float32):
    """Switching adapters, or to the base alone, moves no tensor; the forms are made anew all the same."""
    model = _model()
    for number, name in enumerate(("one", "two")):
        config = LoraConfig(rank=4, target_modules=("q_proj", "down_proj"))
        add_adapter(model, config, torch.Generator().manual_seed(number), name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    written = []
    for name in ("one", "two", None, "one"):
        set_adapter(model, name)
        written.append(_write(model))
        assert written[-1] == _write(model, decode="exact")
    assert written[0] == written[3]
    assert len({str(text) for text in written}) == 3


def test_what_makes_it_slow_is_said_once(monkeypatch, caplog):
    """A missing kernel and too little memory are each told, and not again for the next text."""
    prepared._say_once.cache_clear()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *_: None)
    monkeypatch.setattr(prepared, "free_bytes", lambda: 1000)
    _write(_model())
    _write(_model())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "no 8-bit product that works" in said[0]
    assert "GB are free" in said[1]
