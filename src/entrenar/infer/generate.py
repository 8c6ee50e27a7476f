"""Continue prompts, token by token.

The prompts are read at once into a key/value cache with room for everything to come; then each new token costs one
token. Prompts of different length are padded on the left, so that all rows grow at the same slot. No token attends to
the padding: a row's logits are those of its prompt alone.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entrenar.errors import DataError, NonFiniteError
from entrenar.infer.decode_step import next_logits
from entrenar.infer.prepared import prepare
from entrenar.infer.sampling import candidates, draw, penalize_repetition
from entrenar.infer.settings import GenerateConfig
from entrenar.model import KVCache, Llama, LlamaConfig


def generate(
    model: Llama,
    prompt_ids: Sequence[Sequence[int]],
    config: GenerateConfig,
    generator: torch.Generator | None = None,
    *,
    num_tokens: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, step by step; None for a row that has ended.

    The token that ends a row is yielded. `generator` takes the place of the config's seed. Ids from `num_tokens` on,
    the rows of a padded vocabulary that no tokenizer knows, are never chosen.

    Raises:
        DataError: a prompt is empty, longer than the context, or holds a token that the model does not have.
    """
    _check_prompts(prompt_ids, model.config)
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    return _steps(model, prompt_ids, _Chooser(config, prompt_ids, model.config.vocab_size, generator, num_tokens))


def room(config: LlamaConfig, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens can follow the prompt: as many as wanted, or as fit into the context."""
    return min(max_new_tokens, config.context_length - num_prompt_tokens)


def end_tokens(model_config: LlamaConfig, config: GenerateConfig) -> frozenset[int]:
    """Return the tokens that end the generation."""
    return frozenset(model_config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids)


def _check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> None:
    if not prompts:
        raise DataError("generate needs at least one prompt, got none")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"a prompt needs at least one token, got none in prompt {number}; start it with bos")
        if len(prompt) >= config.context_length:
            raise DataError(
                f"a prompt must be shorter than the model's context of {config.context_length} tokens, "
                f"got {len(prompt)} tokens in prompt {number}; shorten it"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise DataError(
                f"prompt tokens must be in [0, {config.vocab_size}), got {low if low < 0 else high} "
                f"in prompt {number}; take the tokenizer that belongs to the model"
            )


def _steps(model: Llama, prompts: Sequence[Sequence[int]], choose: "_Chooser") -> Iterator[list[int | None]]:
    config = choose.config
    rooms = [room(model.config, len(prompt), config.max_new_tokens) for prompt in prompts]
    num_steps, longest = max(rooms), max(map(len, prompts))
    device = model.device
    padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = _cache(model, prompts, longest + num_steps, device)
    ends = end_tokens(model.config, config)
    logits = _read(model, padded, cache)
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("the logits after a prompt must be finite, got NaN or infinity: the weights are damaged")
    ready = prepare(model, len(prompts), 0 if config.decode == "exact" else num_steps)
    next_token = next_logits(model, cache, ready.head)
    open_rows = set(range(len(prompts)))
    for step in range(1, num_steps + 1):
        tokens = choose(logits)
        step_ids = tokens.tolist()
        yield [token if row in open_rows else None for row, token in enumerate(step_ids)]
        open_rows = {row for row in open_rows if step_ids[row] not in ends and step < rooms[row]}
        if not open_rows:
            return
        with ready.in_use():  # and not while the caller has the floor
            logits = next_token(tokens[:, None])


def _cache(model: Llama, prompts: Sequence[Sequence[int]], max_len: int, device: torch.device) -> KVCache:
    longest = max(map(len, prompts))
    return KVCache(
        model.config,
        len(prompts),
        max_len,
        starts=[longest - len(prompt) for prompt in prompts],
        dtype=model.dtype,
        device=device,
    )


@torch.inference_mode()
def _read(model: Llama, input_ids: Int[Tensor, "B T"], cache: KVCache) -> Float[Tensor, "B V"]:
    """Read the prompts and return the logits after their last tokens."""
    return model.logits(model.hidden(input_ids, cache=cache)[:, -1:])[:, -1]


class _Chooser:
    """Chooses each row's next token, and remembers a row's tokens where repetition is penalized."""

    def __init__(
        self,
        config: GenerateConfig,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        generator: torch.Generator,
        num_tokens: int | None = None,
    ) -> None:
        self.config = config
        self._num_tokens = vocab_size if num_tokens is None else num_tokens
        self._generator = generator
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True

    @torch.inference_mode()
    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        config = self.config
        if self._num_tokens < logits.shape[-1]:
            logits = logits.clone()
            logits[:, self._num_tokens :] = -torch.inf
        if self._seen is not None:
            self._seen = self._seen.to(logits.device)
            logits = penalize_repetition(logits, self._seen, config.repetition_penalty)
        if config.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            kept = candidates(
                logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
            )
            tokens = draw(*kept, self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], value=True)
        return tokens
