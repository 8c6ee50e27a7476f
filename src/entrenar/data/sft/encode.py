"""From turns to tokens, and to the mark of each token: trained or only read.

A conversation is written as segments, prompt and answer in turn, and each segment is encoded by itself. That is what
generation will see: a prompt that was encoded alone, and tokens after it. Encoded as one text, the last letters of a
prompt could merge with the first of the answer into a token that no prompt ever ends in.

With a chat template, the segments are found by rendering it twice for each answer: up to the answer with the
generation prompt, and with the answer. What the second adds to the first is the answer and its end-of-turn token. A
template that rewrites earlier turns, or leaves the answer out, is told by the two not fitting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from entrenar.data.sft.chat_template import ChatTemplate, TemplateStoppedError
from entrenar.data.sft.settings import PromptFormat, TrainOn
from entrenar.data.sft.shapes import Conversation, Turn, UnusableRowError
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import ConfigError, FormatError

# Stanford Alpaca's prompts (Taori et al. 2023).
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"
_HEADINGS = {"user": "### Instruction:\n{}\n\n", "tool": "### Tool:\n{}\n\n", "system": "{}\n\n"}
_ANSWER_HEADING = "### Response:\n"
_ANCHOR = "\n"


@dataclass(frozen=True)
class Example:
    """A row as tokens; `is_trained` marks those that the model is to say. `place` is file:line."""

    place: str
    ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.ids) - 1

    @property
    def answer_start(self) -> int:
        """Where the last trained stretch begins."""
        ends = np.flatnonzero(self.is_trained)
        unread = np.flatnonzero(~self.is_trained[: ends[-1]])
        return int(unread[-1]) + 1 if len(unread) else 0


@dataclass(frozen=True)
class Segment:
    """Text that is read, or said; `is_control` if names of control tokens in it are those tokens."""

    text: str
    is_answer: bool
    is_control: bool
    ends: bool


class Encoder:
    """Encodes conversations for one tokenizer; use it in a `with` statement, for a template has its own process."""

    def __init__(self, tokenizer: Tokenizer, prompt_format: PromptFormat, train_on: TrainOn) -> None:
        has_template = tokenizer.chat_template is not None
        if prompt_format == "chat" and not has_template:
            raise ConfigError("sft.prompt_format = chat needs a tokenizer with a chat_template; this one has none")
        self._tokenizer = tokenizer
        self._format: PromptFormat = (
            ("chat" if has_template else "alpaca") if prompt_format == "auto" else prompt_format
        )
        self._train_on = train_on
        self._chat = ChatTemplate(tokenizer) if self._format == "chat" else None
        self._control = [tokenizer.name_of(index) for index in sorted(tokenizer.special_ids)]
        self._anchor = tokenizer.encode(_ANCHOR) if tokenizer.adds_space else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._chat is not None:
            self._chat.close()

    def encode(self, conversation: Conversation, place: str) -> Example:
        """Return the conversation's tokens and their marks.

        Raises:
            UnusableRowError: this row cannot be trained on.
            TemplateStoppedError: the chat template takes too long, for this row and so for the next.
        """
        try:
            segments = list(self._segments(conversation))
        except TemplateStoppedError as error:
            raise TemplateStoppedError(f"{place}: {error}") from error
        answers = [number for number, segment in enumerate(segments) if segment.is_answer]
        trained = {"answers": answers, "last": answers[-1:], "all": range(len(segments))}[self._train_on]
        is_chat = any(segment.is_control for segment in segments)
        ids: list[int] = []
        if self._tokenizer.add_bos and not is_chat and self._tokenizer.bos_id is not None:
            ids.append(self._tokenizer.bos_id)
        marks = [False] * len(ids)
        before_text = len(ids)
        for number, segment in enumerate(segments):
            added = self._ids(segment, is_first=len(ids) == before_text)  # also behind a prompt of nothing
            ids += added
            marks += [number in trained] * len(added)
        if len(ids) < 2 or not any(marks[1:]):
            raise UnusableRowError("masked", "no token would be trained")
        return Example(place, np.array(ids, dtype=np.int32), np.array(marks))

    def _ids(self, segment: Segment, *, is_first: bool) -> list[int]:
        text, tokenizer = segment.text, self._tokenizer
        if not is_first and self._anchor:
            # A sentencepiece tokenizer puts a space before every text, also before one that goes on.
            ids = tokenizer.encode(_ANCHOR + text, allow_special=segment.is_control)[len(self._anchor) :]
        else:
            ids = tokenizer.encode(text, allow_special=segment.is_control)
        if segment.ends and tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        return ids

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns = conversation.turns
        if conversation.shape == "text":
            yield Segment(turns[0].content, is_answer=True, is_control=False, ends=True)
        elif self._chat is not None and conversation.shape != "completion":
            yield from self._chat_segments(self._chat, turns)
        elif conversation.shape == "instruction" and self._format == "alpaca":
            yield Segment(_alpaca(turns), is_answer=False, is_control=False, ends=False)
            yield Segment(turns[-1].content, is_answer=True, is_control=False, ends=True)
        else:
            yield from _plain_segments(conversation)

    def _chat_segments(self, chat: ChatTemplate, turns: Sequence[Turn]) -> Iterator[Segment]:
        messages = [{"role": turn.role, "content": turn.content} for turn in _joined(turns)]
        for number, message in enumerate(messages):
            found = next((name for name in self._control if name in message["content"]), None)
            if found is not None:
                raise UnusableRowError("control_token", f"message {number} spells the control token {found!r}")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        written = ""
        for number in answers[-1:] if self._train_on == "last" else answers:
            before, after = _around(chat, messages[: number + 1])
            if not before.startswith(written):
                raise UnusableRowError(
                    "template", f"the chat template rewrites turns before message {number}; set train_on = last"
                )
            if messages[number]["content"].strip() not in after[len(before) :]:
                raise UnusableRowError("template", f"the chat template drops the answer of message {number}")
            yield Segment(before[len(written) :], is_answer=False, is_control=True, ends=False)
            yield Segment(after[len(before) :], is_answer=True, is_control=True, ends=False)
            written = after


def _around(chat: ChatTemplate, messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Return the text up to the last message's answer, and the text with it."""
    try:
        after = chat.render(messages)
        for has_prompt in (True, False):
            before = chat.render(messages[:-1], add_generation_prompt=has_prompt) if len(messages) > 1 else ""
            if after.startswith(before):
                return before, after
    except TemplateStoppedError:
        raise
    except FormatError as error:
        raise UnusableRowError("template", str(error)) from error
    raise UnusableRowError("template", f"the chat template rewrites what stands before message {len(messages) - 1}")


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Put an instruction's input under the instruction, for a chat has no turn for it."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "input":
            joined[-1] = Turn("user", f"{joined[-1].content}\n\n{turn.content}")
        else:
            joined.append(turn)
    return joined


def _alpaca(turns: Sequence[Turn]) -> str:
    given = turns[1].content if turns[1].role == "input" else ""
    return _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=turns[0].content,
        input=f"### Input:\n{given}\n\n" if given else "",
    )


def _plain_segments(conversation: Conversation) -> Iterator[Segment]:
    """Yield messages under headings, an instruction's parts on lines, and a prompt as it is; answers end."""
    has_headings = conversation.shape == "messages"
    line_end = "\n" if conversation.shape == "instruction" else ""
    prompt = ""
    for turn in conversation.turns:
        if turn.role == "assistant":
            yield Segment(
                prompt + (_ANSWER_HEADING if has_headings else ""), is_answer=False, is_control=False, ends=False
            )
            yield Segment(turn.content, is_answer=True, is_control=False, ends=True)
            prompt = "\n\n"
        elif has_headings:
            prompt += _HEADINGS[turn.role].format(turn.content)
        else:
            prompt += turn.content + line_end
