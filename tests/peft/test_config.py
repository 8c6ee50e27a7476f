"""Every word of an adapter's config means something in the model, or is refused with what there is."""

import pytest
import torch
from pydantic import ValidationError

from entrenar.errors import ConfigError
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, add_adapter, find_saved, find_targets, from_base, layer_number

CONFIG = LlamaConfig(vocab_size=32, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=1, intermediate_size=24)


def model(**changes: object) -> Llama:
    with torch.device("meta"):
        return Llama(CONFIG.model_copy(update=changes))


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("all", {0, 1, 2, 3}), ("top:1", {3}), ("top:3", {1, 2, 3}), ("top:4", {0, 1, 2, 3}), ((0, 2), {0, 2})],
)
def test_layers_choose_by_number(layers: str | tuple[int, ...], numbers: set[int]) -> None:
    """all, top:K and a list mean the layers they say."""
    targets = find_targets(model(), LoraConfig(rank=2, layers=layers))
    assert {layer_number(name) for name in targets} == numbers
    assert len(targets) == 2 * len(numbers)


def test_targets_match_whole_parts_of_names() -> None:
    """A target is a module's last name or a longer end of it, never a piece of a name."""
    targets = find_targets(model(), LoraConfig(rank=2, target_modules=("layers.1.mlp.up_proj", "k_proj")))
    assert "model.layers.1.mlp.up_proj" in targets
    assert len(targets) == 1 + 4
    with pytest.raises(ConfigError, match="no projection is named 'proj'"):
        find_targets(model(), LoraConfig(rank=2, target_modules=("proj",)))


def test_patterns_give_ranks_and_scales_by_module() -> None:
    """The first key that matches the end of a name decides; the others get the default."""
    config = LoraConfig(
        rank=4, lora_alpha=8, rank_pattern={"v_proj": 2, r"layers\.0\..*": 1}, alpha_pattern={"v_proj": 3.0}
    )
    assert config.rank_of("model.layers.0.self_attn.v_proj") == 2
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 1
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 4
    assert config.scale_of("model.layers.1.self_attn.v_proj") == 1.5
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 2.0
    assert config.model_copy(update={"use_rslora": True}).scale_of("model.layers.1.self_attn.q_proj") == 4.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "greater than 0"),
        ({"rank": -1}, "greater than 0"),
        ({"lora_alpha": 0}, "greater than 0"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"target_modules": ()}, "at least 1"),
        ({"layers": "top:0"}, "layers must be all, top:K with K > 0, or a list of numbers, got 'top:0'"),
        ({"layers": "bottom"}, "layers must be all, top:K"),
        ({"layers": ()}, "layers must name at least one layer"),
        ({"layers": (-1,)}, r"layers must name at least one layer, counted from 0, got \[-1\]"),
        ({"rank_pattern": {"q_proj": 0}}, r"the value for 'q_proj' must be > 0 and <= 1e\+06, got 0"),
        ({"alpha_pattern": {"(": 1.0}}, r"'\(' is not a regular expression"),
        ({"lora_init": "zeros"}, "'default', 'gaussian', 'pissa' or 'loftq'"),
        ({"lora_plus_ratio": 0}, "greater than 0"),
        ({"ranks": 4}, "Extra inputs are not permitted"),
    ],
)
def test_config_that_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    """Each field says its rule and the value."""
    with pytest.raises(ValidationError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ("q_prj",)},
            r"^target_modules: no projection is named 'q_prj', did you mean q_proj\?; "
            r"there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$",
        ),
        (
            {"target_modules": ("lm_head",)},
            r"^target_modules: lm_head cannot take a low-rank adapter, only projections of the layers can; put it into "
            r"modules_to_save to train it in full$",
        ),
        ({"target_modules": ("embed_tokens",)}, r"^target_modules: model.embed_tokens cannot take"),
        ({"target_modules": ("norm",)}, r"^target_modules: model.norm cannot take"),
        (
            {"target_modules": ("q_proj", "k_proj"), "rank": 5},
            r"^rank must be <= 4, the smaller width of model.layers.0.self_attn.k_proj \(4, 16\), got 5; at that rank "
            r"train the module itself$",
        ),
        ({"rank_pattern": {"q_proj": 17}}, r"^rank must be <= 16, the smaller width of .*q_proj \(16, 16\), got 17"),
        ({"rank_pattern": {"up_proj": 2}}, r"^rank_pattern: 'up_proj' matches no target module; there are q_proj, v_p"),
        ({"alpha_pattern": {"x": 2}}, r"^alpha_pattern: 'x' matches no target module; there are q_proj, v_proj$"),
        ({"layers": "top:5"}, r"^layers must be top:4 at most, for the model has 4; got top:5$"),
        ({"layers": (1, 4)}, r"^layers must lie in 0 … 3, for the model has 4; got \[4\]$"),
        (
            {"target_modules": ("layers.1.mlp.up_proj",), "layers": (2,)},
            r"^target_modules \['layers.1.mlp.up_proj'\] have no module in layers \[2\]; they lie in \[1\]$",
        ),
    ],
)
def test_words_that_match_nothing_are_refused_with_what_there_is(fields: dict[str, object], message: str) -> None:
    """The error names the word, the rule and the choices; the model stays as it was."""
    plain = model()
    names = [name for name, _ in plain.named_modules()]
    with pytest.raises(ConfigError, match=message):
        from_base(plain, LoraConfig(**{"rank": 2, **fields}), torch.Generator())
    assert [name for name, _ in plain.named_modules()] == names
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_saved_modules_lie_outside_the_layers() -> None:
    """Embedding, head and last norm can be saved; what is in a layer or not there is refused with the choices."""
    config = LoraConfig(modules_to_save=("embed_tokens", "lm_head", "model.norm"))
    assert sorted(find_saved(model(), config)) == ["lm_head", "model.embed_tokens", "model.norm"]
    with pytest.raises(
        ConfigError,
        match=r"^modules_to_save: no module outside the layers is named 'embed_token', did you mean embed_tokens\?; "
        r"there are embed_tokens, norm, lm_head$",
    ):
        find_saved(model(), LoraConfig(modules_to_save=("embed_token",)))
    with pytest.raises(ConfigError, match=r"named 'lm_head'; .* \(this model's head is tied: it is embed_tokens\)$"):
        find_saved(model(tie_word_embeddings=True), LoraConfig(modules_to_save=("lm_head",)))


def test_a_wrapped_model_has_the_same_targets() -> None:
    """A second adapter finds the projections and modules under their own names."""
    wrapped = model()
    config = LoraConfig(rank=2, modules_to_save=("lm_head",))
    from_base(wrapped, config, torch.Generator())
    assert list(find_targets(wrapped, config)) == list(find_targets(model(), config))
    assert list(find_saved(wrapped, config)) == ["lm_head"]
    add_adapter(wrapped, config, torch.Generator(), "second")
    assert list(find_targets(wrapped, config)) == list(find_targets(model(), config))
