"""Generation: greedy equals the reference, batches equal single rows, and every stop stops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file

from entrenar.data import Tokenizer
from entrenar.errors import DataError, NonFiniteError
from entrenar.infer import GenerateConfig, complete, generate
from entrenar.model import Llama, LlamaConfig, RopeScaling

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=40,
    max_seq_len=40,
    eos_token_id=3,
)
GREEDY = GenerateConfig(max_new_tokens=20, temperature=0, eos_token_ids=())


def model_of(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Llama:
    model = Llama(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(8))
    return model


def written(model: Llama, prompts: list[list[int]], config: GenerateConfig, **more: Any) -> list[list[int]]:
    """The tokens of each row."""
    steps = list(generate(model, prompts, config, **more))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def transformers_greedy(model: Llama, prompt: list[int], **options: Any) -> list[int]:
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig.from_dict(model.config.to_hf()))
    theirs.to(model.model.norm.weight.dtype).load_state_dict(model.state_dict())
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers() -> None:
    """Greedy tokens are those of transformers' generate, with and without a repetition penalty, to the end token."""
    model, prompt = model_of(), [1, 17, 4]
    assert written(model, [prompt], GREEDY)[0] == transformers_greedy(
        model, prompt, max_new_tokens=20, eos_token_id=None
    )
    penalized = GREEDY.model_copy(update={"repetition_penalty": 1.4})
    expected = transformers_greedy(model, prompt, max_new_tokens=20, eos_token_id=None, repetition_penalty=1.4)
    assert written(model, [prompt], penalized)[0] == expected
    assert written(model, [prompt], GREEDY)[0] != expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batch_with_padding_writes_what_each_row_writes_alone(dtype: torch.dtype) -> None:
    """Left padding changes no row's text, by the flat step (float64) and by the model (bfloat16)."""
    model = model_of(dtype=dtype)
    prompts = [[1, 17, 4], [5], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31]]
    alone = [written(model, [prompt], GREEDY)[0] for prompt in prompts]
    assert written(model, prompts, GREEDY) == alone
    assert len({tuple(row) for row in alone}) == 4


def test_row_ends_with_its_end_token() -> None:
    """A row that wrote an end token yields None while others go on; generation ends when all have ended."""
    model = model_of()
    prompts = [[1, 17, 4], [5]]
    first, second = (written(model, [prompt], GREEDY)[0] for prompt in prompts)
    end = first[6]
    assert end not in second[: first.index(end) + 1], "the rows must end apart for this test"
    config = GREEDY.model_copy(update={"eos_token_ids": (end,)})
    steps = list(generate(model, prompts, config))
    cut = first.index(end) + 1
    assert [step[0] for step in steps][:cut] == first[:cut]
    assert all(step[0] is None for step in steps[cut:])
    assert [step[1] for step in steps] == second[: len(steps)]
    assert len(list(generate(model, prompts[:1], config))) == cut
    own = Llama(CONFIG.model_copy(update={"eos_token_id": (end, 60)})).double()
    own.load_state_dict(model.state_dict())
    assert written(own, prompts[:1], GREEDY.model_copy(update={"eos_token_ids": None}))[0] == first[:cut]


def test_seed_reproduces_and_generator_takes_its_place() -> None:
    """The same seed writes the same; a generator handed in decides instead."""
    model = model_of()
    config = GenerateConfig(max_new_tokens=20, temperature=1.5, top_k=30, seed=7, eos_token_ids=())
    first = written(model, [[1, 2]], config)
    assert written(model, [[1, 2]], config) == first
    assert written(model, [[1, 2]], config.model_copy(update={"seed": 8})) != first
    other = config.model_copy(update={"seed": 8})
    assert written(model, [[1, 2]], other, generator=torch.Generator().manual_seed(7)) == first


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    """Choices come from the config's seed, not from the process."""
    model, before = model_of(), torch.get_rng_state()
    written(model, [[1, 2]], GenerateConfig(max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_context_ends_each_row() -> None:
    """A row is written up to the model's context and no further, whatever its neighbors' lengths."""
    model = model_of()
    config = GREEDY.model_copy(update={"max_new_tokens": 1000})
    prompts = [[1] * 39, [1] * 30]
    alone = [written(model, [prompt], config)[0] for prompt in prompts]
    assert [len(row) for row in alone] == [1, 10]
    assert written(model, prompts, config) == alone


def test_dynamic_scaling_writes_past_the_trained_length() -> None:
    """With dynamic scaling the context is longer, and the text is the one whose keys all turn by one base."""
    stretched = CONFIG.model_copy(
        update={"max_seq_len": 10, "rope_scaling": RopeScaling(rope_type="dynamic", factor=3.0)}
    )
    model = model_of(stretched)
    row = written(model, [[1, 2]], GREEDY.model_copy(update={"max_new_tokens": 1000}))[0]
    assert len(row) == 28
    logits = model(torch.tensor([[1, 2, *row]]))
    assert logits[0, 1:-1].argmax(-1).tolist() == row


def test_gradients_can_be_taken_between_steps() -> None:
    """A step leaves no inference mode behind in the caller's code."""
    model = model_of()
    for _ in generate(model, [[1]], GREEDY.model_copy(update={"max_new_tokens": 3})):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"^generate needs at least one prompt, got none$"),
        ([[1], []], r"^a prompt needs at least one token, got none in prompt 1; start it with bos$"),
        (
            [[1] * 40],
            r"^a prompt must be shorter than the model's context of 40 tokens, got 40 tokens in prompt 0; sho",
        ),
        ([[1, 61]], r"^prompt tokens must be in \[0, 61\), got 61 in prompt 0; take the tokenizer that belongs"),
        ([[2], [-1, 1]], r"^prompt tokens must be in \[0, 61\), got -1 in prompt 1; take"),
    ],
)
def test_unusable_prompts_are_refused_at_the_call(prompts: list[list[int]], message: str) -> None:
    """A prompt that cannot be read is refused before the first step, with lengths and numbers."""
    with pytest.raises(DataError, match=message):
        generate(model_of(), prompts, GREEDY)


def test_damaged_weights_write_nothing() -> None:
    """A model of NaN is refused at the first token, before it writes the same token for ever."""
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"must be finite, got NaN or infinity: the weights are damaged"):
        written(model, [[1, 2]], GREEDY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stop": ("a", "")},
            "stop must not contain the empty text, which would end every generation",
        ),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_k": 0}, "greater than 0"),
        ({"max_new_tokens": 0}, "greater than 0"),
        ({"temprature": 1}, "Extra inputs"),
    ],
)
def test_settings_without_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    """Each setting keeps its range."""
    with pytest.raises(ValidationError, match=message):
        GenerateConfig(**fields)


def test_published_greedy_tokens_of_stories260k(shared_data: Path) -> None:
    """From the beginning of a text, 200 greedy tokens are the reference's, which are the published text's."""
    folder = shared_data / "models/stories260K_hf"
    model = Llama(LlamaConfig.from_hf(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    expected = np.load(folder / "reference_logits.npz")["greedy_from_bos"].tolist()
    (row,) = written(model, [[1]], GenerateConfig(max_new_tokens=200, temperature=0))
    assert row[: len(expected)] == expected
    tokenizer = Tokenizer.load(shared_data / "tokenizers/tok512/tok512.model")
    text = (shared_data / "models/stories260K/expected_greedy_200.txt").read_text()
    (completion,) = complete(model, tokenizer, [""], GenerateConfig(max_new_tokens=200, temperature=0))
    assert completion.token_ids == tuple(row)
    assert completion.text.startswith(text)
