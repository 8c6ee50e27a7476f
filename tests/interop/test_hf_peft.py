"""Adapters go to PEFT and come from it with equal logits and gradients; what does not fit is refused and says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import peft
from entrenar.errors import ConfigError, FormatError
from entrenar.interop.hf_peft import identify_base, load_adapter, read_base, save_adapter
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, adapter_names, from_base, set_adapter

# PEFT 0.21.2 asks transformers 5.23 for an attribute under its old name; goes when PEFT uses the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL = {"vocab_size": 53, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}
UNTIED = LlamaConfig(**SMALL, num_kv_heads=2, max_seq_len=32)
TIED = UNTIED.model_copy(update={"tie_word_embeddings": True})
IDS = torch.arange(16).reshape(2, 8) * 5 % 53
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "plain": LoraConfig(rank=3, lora_alpha=7),
    "everywhere": LoraConfig(rank=2, target_modules=EVERYTHING),
    "rslora": LoraConfig(rank=3, use_rslora=True),
    "dora": LoraConfig(rank=3, use_dora=True, target_modules=("q_proj", "down_proj")),
    "patterns": LoraConfig(rank=3, rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 5.5}),
    "layers": LoraConfig(rank=2, layers="top:1"),
    "saved": LoraConfig(rank=2, modules_to_save=("embed_tokens", "lm_head"), use_dora=True, use_rslora=True),
}
OURS_ONLY = {
    "pissa": LoraConfig(rank=3, lora_init="pissa", rank_pattern={"v_proj": 2}),
    "pissa rslora": LoraConfig(rank=3, lora_init="pissa", use_rslora=True, alpha_pattern={"v_proj": 3.0}),
    "pissa dora": LoraConfig(rank=3, lora_init="pissa", use_dora=True),
}


def exact_norm(module: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm without its cast to float32."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


@pytest.fixture(autouse=True)
def _float64_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


def their_base(config: LlamaConfig) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig.from_dict(config.to_hf()), attn_implementation="sdpa"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return model.double().eval()


def our_base(config: LlamaConfig) -> Llama:
    model = Llama(config).double().eval()
    model.load_state_dict(their_base(config).state_dict())
    return model


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)


def trained(lora: LoraConfig, config: LlamaConfig = UNTIED) -> Llama:
    model = our_base(config)
    from_base(model, lora, torch.Generator().manual_seed(3))
    perturb(model)
    return model


def in_peft(folder: Path, config: LlamaConfig, *, is_trainable: bool = False) -> nn.Module:
    return peft.PeftModel.from_pretrained(their_base(config), folder, is_trainable=is_trainable).double()


def from_peft(folder: Path, config: LlamaConfig) -> tuple[Llama, LoraConfig]:
    model = our_base(config)
    lora = load_adapter(folder, model)
    set_adapter(model, "default", is_trainable=True)
    return model, lora


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS | OURS_ONLY)
def test_ours_loads_in_peft_with_the_same_logits(name: str, tmp_path: Path) -> None:
    """PEFT reads our folder without a warning and computes our logits, which are not the base's."""
    lora = (VARIANTS | OURS_ONLY)[name]
    model = trained(lora)
    save_adapter(tmp_path, model, lora, base=identify_base(model, "some/base"))
    close(model(IDS), in_peft(tmp_path, UNTIED)(IDS).logits)
    assert float((model(IDS) - our_base(UNTIED)(IDS)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("name", VARIANTS | OURS_ONLY)
def test_folder_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """What was saved is loaded: config (as far as a PEFT config says it) and logits."""
    lora = (VARIANTS | OURS_ONLY)[name]
    model = trained(lora)
    save_adapter(tmp_path, model, lora)
    again, read = from_peft(tmp_path, UNTIED)
    if name in VARIANTS:
        assert torch.equal(model(IDS), again(IDS))
        assert read == lora.model_copy(update={"layers": (1,)} if name == "layers" else {})
    else:
        close(model(IDS), again(IDS))
        assert (read.rank, read.lora_init) == (2 * lora.rank, "default")


@pytest.mark.parametrize("name", VARIANTS)
def test_all_adapter_gradients_equal_pefts(name: str, tmp_path: Path) -> None:
    """Each tensor of the same adapter gets PEFT's gradient to 1e-9 in float64, and no other tensor gets one."""
    lora = VARIANTS[name]
    model = trained(lora)
    save_adapter(tmp_path, model, lora)
    theirs = in_peft(tmp_path, UNTIED, is_trainable=True)
    logits = theirs(IDS[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    expected = {
        key.replace(".weight", "")
        .replace("base_model.model.", "")
        .replace("modules_to_save.default", "default"): p.grad
        for key, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = {
        f"{path}.{part}.{'default'}" if part else f"{path}.default": parameter.grad
        for key, parameter in model.named_parameters()
        for path, _, rest in [key.partition(".adapters.")]
        for part in [rest.partition(".")[2]]
        if parameter.requires_grad
    }
    assert ours.keys() == expected.keys()
    for key, gradient in ours.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)


THEIRS = {
    "plain": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"r": 2, "target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "excluded": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "layers": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": 0},
    "rank_pattern": {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    "alpha_pattern": {"r": 3, "target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
    "dora": {"r": 3, "target_modules": ["k_proj", "gate_proj"], "use_dora": True},
    "saved": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "gaussian": {"r": 2, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}


def save_theirs(folder: Path, options: dict[str, object], config: LlamaConfig = UNTIED) -> torch.Tensor:
    """Train PEFT's adapter a little, save it, and return its logits."""
    torch.manual_seed(4)
    base = their_base(config)
    if options.get("init_lora_weights") == "pissa":
        base = base.float()  # PEFT decomposes float32 only
    model = peft.get_peft_model(base, peft.LoraConfig(**options, task_type="CAUSAL_LM")).double().eval()
    perturb(model)
    model.save_pretrained(folder)
    logits: torch.Tensor = model(IDS).logits.detach()
    return logits


@pytest.mark.parametrize("name", THEIRS)
def test_pefts_folder_loads_with_the_same_logits(name: str, tmp_path: Path) -> None:
    """Whatever PEFT's config chooses by list, expression, exclusion or layer, the logits are PEFT's."""
    theirs = save_theirs(tmp_path, THEIRS[name])
    close(from_peft(tmp_path, UNTIED)[0](IDS), theirs)


def test_pefts_pissa_loads_against_the_untouched_base(tmp_path: Path) -> None:
    """PEFT changed its base for PiSSA; here the same residual rides in the adapter, to PEFT's own float32."""
    theirs = save_theirs(tmp_path, {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"})
    model, lora = from_peft(tmp_path, UNTIED)
    assert lora.lora_init == "pissa"
    torch.testing.assert_close(model(IDS), theirs, rtol=1e-4, atol=1e-4)
    assert float((our_base(UNTIED)(IDS) - theirs).detach().abs().max()) > 0.1


def test_tied_embedding_goes_both_ways(tmp_path: Path) -> None:
    """A trained embedding of a tied model is head and embedding in PEFT too, and theirs here."""
    lora = LoraConfig(rank=2, modules_to_save=("embed_tokens",))
    model = trained(lora, TIED)
    save_adapter(tmp_path, model, lora)
    close(model(IDS), in_peft(tmp_path, TIED)(IDS).logits)
    again, read = from_peft(tmp_path, TIED)
    assert read == lora
    assert torch.equal(again(IDS), model(IDS))
    options = {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    theirs = save_theirs(tmp_path, options, TIED)
    close(from_peft(tmp_path, TIED)[0](IDS), theirs)


def test_embedding_trained_apart_from_its_tied_head_is_refused(tmp_path: Path) -> None:
    """A tied model cannot hold a trained embedding beside an untrained head, nor two that differ."""
    lora = LoraConfig(rank=2, modules_to_save=("embed_tokens",))
    save_adapter(tmp_path, trained(lora, TIED), lora)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"trains embed_tokens apart from lm_head, but the model ties them; train it"):
        load_adapter(tmp_path, our_base(TIED))
    save_file({**tensors, "base_model.model.lm_head.weight": head + 1}, path)
    with pytest.raises(FormatError, match=r"lm_head differs from embed_tokens, but the model ties them"):
        load_adapter(tmp_path, our_base(TIED))


def test_real_adapter_fits_its_base(shared_data: Path) -> None:
    """A published adapter of TinyLlama 1.1B loads: every name and shape has its place in the 1b preset."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset("1b"))
    folder = shared_data / "adapters" / "tinyllama_lora_arona"
    config = load_adapter(folder, model, "arona")
    set_adapter(model, "arona")
    assert (config.rank, config.lora_alpha, config.lora_dropout) == (4, 16, 0.1)
    assert config.target_modules == ("q_proj", "v_proj")
    adapters = [tensor for name, tensor in model.named_parameters() if ".adapters." in name]
    assert len(adapters) == len(load_file(folder / "adapter_model.safetensors")) == 88


def test_real_adapter_gives_pefts_logits_on_a_base_of_its_width(shared_data: Path, tmp_path: Path) -> None:
    """The first two layers of the published adapter act on a random base as they do in PEFT."""
    config = LlamaConfig.preset("1b", num_layers=2, vocab_size=53, intermediate_size=64)
    folder = shared_data / "adapters" / "tinyllama_lora_arona"
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.0." in key or ".layers.1." in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", tmp_path)
    model, _ = from_peft(tmp_path, config)
    theirs = in_peft(tmp_path, config)(IDS).logits
    torch.testing.assert_close(model(IDS), theirs, rtol=1e-9, atol=1e-9)
    assert float((model(IDS) - our_base(config)(IDS)).detach().abs().max()) > 1e-3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder of the untied base."""
    model = trained(VARIANTS["plain"])
    save_adapter(tmp_path, model, VARIANTS["plain"], base=identify_base(model, "some/base"))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            r"is an adapter for another base: .*layers.0.self_attn.q_proj.lora_A.weight has shape \(3, 16\), "
            r"the model asks for \(3, 32\); .*; and 5 more$",
        ),
        (
            {"num_layers": 3},
            r"is an adapter for another base: .*.layers.2.self_attn.q_proj.lora_A.weight is missing",
        ),
        ({"num_layers": 1}, r"another base: .*layers.1.self_attn.q_proj.lora_A.weight has no place in the model"),
    ],
)
def test_adapter_for_another_base_is_refused_with_the_difference(
    folder: Path, changes: dict[str, int], message: str
) -> None:
    """Names and shapes that do not fit are listed, and the model is as it was."""
    model = our_base(UNTIED.model_copy(update=changes))
    with pytest.raises(FormatError, match=message):
        load_adapter(folder, model)
    assert adapter_names(model) == []


def test_adapter_for_a_base_of_other_weights_is_refused(folder: Path) -> None:
    """The recorded hash tells bases of one shape apart; it can be overruled, and says nothing in another dtype."""
    assert read_base(folder) == identify_base(our_base(UNTIED), "some/base")
    other = our_base(UNTIED)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-9
    with pytest.raises(
        FormatError, match=r"was trained on another base: some/base with sha256 [0-9a-f]{12}…, this one"
    ):
        load_adapter(folder, other)
    load_adapter(folder, other, is_other_base_allowed=True)
    load_adapter(folder, our_base(UNTIED).float())


def test_base_hash_ignores_adapters() -> None:
    """A model has one identity, with and without adapters."""
    assert identify_base(trained(VARIANTS["saved"])) == identify_base(our_base(UNTIED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type must be LORA, got 'LOHA'$"),
        ({"bias": "all"}, r"bias = 'all' changes what the adapter computes; that is not supported$"),
        ({"lora_bias": True}, r"lora_bias = True changes what the adapter computes"),
        ({"some_new_option": 3}, r"some_new_option = 3 changes what the adapter computes"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights = 'olora' changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights = 'pissa_niter_4' changes the base's weights"),
        ({"r": 0}, r"describes no adapter: rank: .*greater than 0$"),
        ({"r": None}, r"describes no adapter: rank: "),
        ({"r": 4}, r"q_proj.lora_A.weight has shape \(3, 16\), the model asks for \(4, 16\)"),
        ({"r": 64}, r"adapter_config.json: rank must be <= 16"),
        ({"target_modules": ["c_attn"]}, r"adapter_config.json: target_modules: no projection is named 'c_attn'"),
        (
            {"modules_to_save": ["score"]},
            r"adapter_config.json: modules_to_save: no module outside the layers is named 'score'",
        ),
        ({"use_dora": True}, r"lora_magnitude_vector is missing"),
        ({"rank_pattern": {"k_proj": 4}}, r"adapter_config.json: rank_pattern: 'k_proj' matches no target module"),
        ({"alpha_pattern": {"x.*": 4}}, r"adapter_config.json: alpha_pattern: 'x\.\*' matches no target module"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"json: target_modules: lm_head cannot take a low-rank adapter"),
        ({"init_lora_weights": ["a"]}, r"init_lora_weights = \['a'\] changes the base's weights"),
        ({"modules_to_save": 0.5}, r"describes no adapter: modules_to_save: "),
        ({"modules_to_save": {"a": 1}}, r"describes no adapter: modules_to_save: "),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\] changes what the adapter computes"),
    ],
)
def test_config_that_is_not_computed_here_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    """A key that changes the result and is not supported is named; nothing is passed over."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = our_base(UNTIED)
    with pytest.raises(FormatError, match=message):
        load_adapter(folder, model)
    assert adapter_names(model) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, r"over a vocabulary of \d+ tokens \(lm_head is resized\), the base has \d+; .*resize_token_embeddings"),
        (0, r"holds base_model.model.lm_head.weight, which its config names neither in target_modules nor in modules_"),
    ],
)
def test_an_embedding_that_peft_saved_unasked_is_named(folder: Path, rows: int, message: str) -> None:
    """A resized vocabulary is the base's matter, not another base; weights that no config names are not passed over."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(UNTIED.vocab_size + rows, UNTIED.hidden_size)
    save_file(tensors, path)
    with pytest.raises(FormatError, match=message) as raised:
        load_adapter(folder, our_base(UNTIED))
    assert "another base" not in str(raised.value)


def test_damaged_folder_is_refused(folder: Path) -> None:
    """Missing, pickled, truncated and malformed files each say what is wrong."""
    model = our_base(UNTIED)
    base = folder / "base.json"
    base.write_text('{"name": null}')
    with pytest.raises(FormatError, match=r"base.json must hold name, dtype and sha256 of the base"):
        load_adapter(folder, model)
    base.unlink()
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(FormatError, match=r"adapter_model.safetensors is not a valid safetensors file"):
        load_adapter(folder, model)
    weights.write_bytes(content)
    config = folder / "adapter_config.json"
    config.write_text("[]")
    with pytest.raises(FormatError, match=r"adapter_config.json must hold a JSON object, got list$"):
        load_adapter(folder, model)
    config.unlink()
    with pytest.raises(FormatError, match=r"is not an adapter folder: it has no adapter_config.json$"):
        load_adapter(folder, model)
    weights.unlink()
    with pytest.raises(FormatError, match=r"is not an adapter folder: it has no adapter_model.safetensors$"):
        load_adapter(folder, model)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(FormatError, match=r"holds a pickled adapter \(adapter_model.bin\), which can run code"):
        load_adapter(folder, model)
    assert adapter_names(model) == []


def test_each_adapter_has_its_own_folder(folder: Path, tmp_path: Path) -> None:
    """Of several adapters held, the named one is saved, and loading one beside it touches neither."""
    model = trained(VARIANTS["everywhere"])
    before = model(IDS)
    load_adapter(folder, model, "second")
    assert torch.equal(model(IDS), before)
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model, VARIANTS["plain"], "second")
    first, again = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    set_adapter(model, "second")
    close(model(IDS), trained(VARIANTS["plain"])(IDS))


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    """An adapter that is not held cannot be written."""
    with pytest.raises(ConfigError, match=r"^no adapter 'default' is held, so there is nothing to save$"):
        save_adapter(tmp_path, our_base(UNTIED), VARIANTS["plain"])
