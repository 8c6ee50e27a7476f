"""Generate text with a tokenizer, in pieces that are always whole characters.

A token may end in the middle of a character, and a stop text in the middle of a token. So text is held back until it is
final: bytes by the tokenizer's decode stream, the start of a possible stop text here.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from entrenar.errors import ConfigError
from entrenar.infer.generate import end_tokens, generate, room
from entrenar.infer.settings import GenerateConfig
from entrenar.model import Llama, LlamaConfig

Finish = Literal["eos", "stop", "length", "context"]


@runtime_checkable
class TokenDecoder(Protocol):
    """Turns tokens into text one at a time."""

    def push(self, token_id: int, /) -> str:
        """Return the text that this token made final."""
        ...


@runtime_checkable
class TextTokenizer(Protocol):
    """The part of a tokenizer that generation uses; `entrenar.data.Tokenizer` is one."""

    @property
    def add_bos(self) -> bool:
        """Return whether a text starts with the bos token."""
        ...

    bos_id: int | None

    @property
    def special_ids(self) -> Collection[int]:
        """The ids of the control tokens; they decode to nothing."""
        ...

    def id_of(self, token: str, /) -> int | None:
        """Return the id of a token by its name."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a text."""
        ...

    def encode(self, text: str, *, bos: bool, allow_special: bool) -> list[int]:
        """Return the tokens of a text."""
        ...

    def decode_stream(self, context: Iterable[int], /) -> TokenDecoder:
        """Return a decoder for tokens that follow `context`."""
        ...


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        text: without the prompt and the stop text.
        token_ids: all generated tokens except the end token.
        finish: the reason it ended: an end token, a stop text, `max_new_tokens`, or the end of the model's context.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish


class StopFilter:
    """Passes text up to the first stop text, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Return the text that cannot belong to a stop text."""
        if self.is_stopped:
            return ""
        self._held += text
        # The stop text that ends first, so that the pieces make no difference.
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in self._held]
        if found:
            end, minus_length = min(found)
            self.is_stopped = True
            return self._held[: end + minus_length]
        released = len(self._held) - self._num_held()
        out, self._held = self._held[:released], self._held[released:]
        return out

    def finish(self) -> str:
        """Return the text held back for a stop text that did not come."""
        out, self._held = "" if self.is_stopped else self._held, ""
        return out

    def _num_held(self) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop text."""
        lengths = (
            length for stop in self._stops for length in range(1, len(stop)) if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)


class GrowingText:
    """The growing text of one prompt."""

    def __init__(
        self, model_config: LlamaConfig, tokenizer: TextTokenizer, prompt_ids: Sequence[int], config: GenerateConfig
    ) -> None:
        self._decoder = tokenizer.decode_stream(prompt_ids)
        self._filter = StopFilter(config.stop)
        self._stops = stop_tokens(tokenizer, config)
        self._ends = end_tokens(model_config, config)
        is_cut = room(model_config, len(prompt_ids), config.max_new_tokens) < config.max_new_tokens
        self._when_full: Finish = "context" if is_cut else "length"
        self.token_ids: list[int] = []
        self.finish: Finish | None = None

    def push(self, token: int | None) -> str:
        """Return the text that became final."""
        if self.finish is not None or token is None:
            return ""
        if token in self._stops or token in self._ends:
            self.finish = "stop" if token in self._stops else "eos"
            return self._filter.finish()
        self.token_ids.append(token)
        text = self._filter.push(self._decoder.push(token))
        if self._filter.is_stopped:
            self.finish = "stop"
        return text

    def close(self) -> str:
        """Return the held-back text of a row that ended for lack of room."""
        if self.finish is not None:
            return ""
        self.finish = self._when_full
        return self._filter.finish()


def stop_tokens(tokenizer: TextTokenizer, config: GenerateConfig) -> frozenset[int]:
    """Return the control tokens among the stop texts; they would never appear in the decoded text."""
    found = (tokenizer.id_of(stop) for stop in config.stop)
    return frozenset(index for index in found if index is not None and index in tokenizer.special_ids)


def with_stop_tokens(model_config: LlamaConfig, tokenizer: TextTokenizer, config: GenerateConfig) -> GenerateConfig:
    """Let generation end at the control tokens among the stop texts, too."""
    ends = end_tokens(model_config, config) | stop_tokens(tokenizer, config)
    return config.model_copy(update={"eos_token_ids": tuple(sorted(ends))})


def named_tokens(tokenizer: TextTokenizer, words: Sequence[str], vocab_size: int) -> tuple[int, ...]:
    """Return the ids of tokens given by their names or ids.

    Raises:
        ConfigError: there is no such token.
    """
    ids = []
    for word in words:
        index = tokenizer.id_of(word)
        if index is None and word.isdecimal():
            index = int(word)
        if index is None or index >= vocab_size:
            raise ConfigError(
                f"an end token must be a token's name or an id below {vocab_size}, got {word!r}; "
                "tokenizer.json lists the names"
            )
        ids.append(index)
    return tuple(ids)


def complete(
    model: Llama,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: GenerateConfig,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """Continue each prompt."""
    prompt_ids = [_encode(tokenizer, prompt, config) for prompt in prompts]
    config = with_stop_tokens(model.config, tokenizer, config)
    rows = [GrowingText(model.config, tokenizer, ids, config) for ids in prompt_ids]
    pieces = list(_pieces(generate(model, prompt_ids, config, generator, num_tokens=tokenizer.vocab_size), rows))
    return [
        Completion("".join(texts), tuple(row.token_ids), row.finish or "length")
        for row, texts in zip(rows, zip(*pieces, strict=True), strict=True)
    ]


def stream(
    model: Llama,
    tokenizer: TextTokenizer,
    prompt: str,
    config: GenerateConfig,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces, each once it is final."""
    for (text,) in stream_rows(model, tokenizer, [prompt], config, generator):
        if text:
            yield text


def stream_rows(
    model: Llama,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: GenerateConfig,
    generator: torch.Generator | None = None,
) -> Iterator[list[str]]:
    """Yield for each step the piece of text, possibly empty, that became final for each prompt."""
    prompt_ids = [_encode(tokenizer, prompt, config) for prompt in prompts]
    config = with_stop_tokens(model.config, tokenizer, config)
    rows = [GrowingText(model.config, tokenizer, ids, config) for ids in prompt_ids]
    return _pieces(generate(model, prompt_ids, config, generator, num_tokens=tokenizer.vocab_size), rows)


def _pieces(steps: Iterable[list[int | None]], rows: Sequence[GrowingText]) -> Iterator[list[str]]:
    """Yield at each step the text of each row that became final; stop when all rows have ended."""
    for tokens in steps:
        yield [row.push(token) for row, token in zip(rows, tokens, strict=True)]
        if all(row.finish is not None for row in rows):
            return
    yield [row.close() for row in rows]


def _encode(tokenizer: TextTokenizer, prompt: str, config: GenerateConfig) -> list[int]:
    ids = tokenizer.encode(prompt, bos=tokenizer.add_bos, allow_special=config.allow_special)
    if tokenizer.add_bos and ids[:2] == [tokenizer.bos_id] * 2:
        return ids[1:]  # the prompt spells the token that is added
    if not ids and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return ids
