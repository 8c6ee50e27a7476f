"""Turn conversations into tokens, and mark the tokens that the model is trained to say.

A chat is rendered by the tokenizer's template (Alpaca's if it has none) and encoded as one text, the text that
generation and every later turn see. The answers are found in the text (`answer_spans`), and a token is trained if it
holds a character of one. So the ids are those of Hugging Face's `apply_chat_template`, whatever the tokenizer does at
the edges of a turn.

A completion, and every row in the plain format, is written as segments, prompt and answer in turn. Each segment is
encoded by itself, as generation encodes a prompt: in one text, the last letters of a prompt could merge with the first
of the answer into a token that no prompt ends in.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from entrenar.data.sft.alpaca import has_inputs, marking_answers, tokenizer_to_train
from entrenar.data.sft.answer_spans import AnswerSpans
from entrenar.data.sft.chat_template import ChatTemplate, Span, TemplateStoppedError
from entrenar.data.sft.settings import PromptFormat, TrainOn
from entrenar.data.sft.turns import Conversation, Turn, UnusableRowError
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import ConfigError, DataError

_HEADINGS = {"user": "### Instruction:\n{}\n\n", "tool": "### Tool:\n{}\n\n", "system": "{}\n\n"}
_ANSWER_HEADING = "### Response:\n"
_ANCHOR = "\n"
_CHAT_SHAPES = ("messages", "instruction")
# How templates look into a list of content parts; the others would write the list itself.
_READS_PARTS = re.compile(r"content\s+is\s+(?:not\s+)?(?:string|iterable|sequence|mapping)|\.text\b|\[.text.\]")


@dataclass(frozen=True)
class Example:
    """A row as tokens; `is_trained` marks those that the model learns to say.

    Attributes:
        place: file:line.
        is_chat: whether a chat template wrote it.
    """

    place: str
    ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]
    is_chat: bool = False

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.ids) - 1

    @property
    def answer_start(self) -> int:
        """Index of the first token of the last trained stretch."""
        ends = np.flatnonzero(self.is_trained)
        unread = np.flatnonzero(~self.is_trained[: ends[-1]])
        return int(unread[-1]) + 1 if len(unread) else 0


@dataclass(frozen=True)
class Segment:
    """Text that the model reads or, if `is_answer`, says; the end token follows if it `ends`."""

    text: str
    is_answer: bool
    ends: bool
    is_trained: bool = True


class Encoder:
    """Encode conversations for one tokenizer; use it in a `with` statement, for a template has its own process."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat, train_on: TrainOn, today: str | None = None
    ) -> None:
        """Choose the format; `today` (YYYY-MM-DD) is the date that a chat template is told, the clock's if None.

        Raises: ConfigError for the format chat without a chat template.
        """
        if prompt_format == "chat" and not tokenizer.chat_templates:
            raise ConfigError("sft.prompt_format = chat needs a tokenizer with a chat_template; this one has none")
        tokenizer = marking_answers(tokenizer_to_train(tokenizer, prompt_format))
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._has_inputs = has_inputs(tokenizer)
        self._chat = None if prompt_format == "plain" else ChatTemplate(tokenizer, today=today)
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
        is_chat = self._chat is not None and conversation.shape in _CHAT_SHAPES
        if self._chat is not None and is_chat:
            try:
                ids, marks = self._chat_ids(self._chat, conversation)
            except TemplateStoppedError as error:
                raise TemplateStoppedError(f"{place}: {error}") from error
        else:
            ids, marks = self._segment_ids(list(self._segments(conversation)))
        if len(ids) < 2 or not marks[1:].any():
            raise UnusableRowError("masked", "no token would be trained")
        return Example(place, np.array(ids, dtype=np.int32), marks, is_chat)

    def template_of(self, conversation: Conversation) -> str | None:
        """Return the chat template that will write a conversation, None if none will."""
        if self._chat is None or conversation.shape not in _CHAT_SHAPES:
            return None
        return self._chat.source(has_tools=conversation.tools is not None)

    def _chat_ids(self, chat: ChatTemplate, conversation: Conversation) -> tuple[list[int], NDArray[np.bool_]]:
        turns = conversation.turns if self._has_inputs else _joined(conversation.turns)
        has_parts = _READS_PARTS.search(chat.source(has_tools=conversation.tools is not None)) is not None
        messages = [turn.as_message(has_parts=has_parts) for turn in turns]
        try:
            chat.refuse_forgery(messages, conversation.tools)
            chat.refuse_forgery([{"content": document} for document in conversation.documents or ()])
        except DataError as error:
            raise UnusableRowError("control_token", str(error)) from error
        spans = AnswerSpans(chat, messages, conversation.tools, conversation.documents)
        ids, offsets = self._tokenizer.encode_with_offsets(spans.text)
        if self._train_on == "all":
            masked = [spans.turn(number) for number, turn in enumerate(turns) if not turn.is_trained]
            return ids, ~_inside(masked, offsets)
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        wanted = answers[-1:] if self._train_on == "last" else answers
        return ids, _inside(spans.of([number for number in wanted if turns[number].is_trained]), offsets)

    def _segment_ids(self, segments: Sequence[Segment]) -> tuple[list[int], NDArray[np.bool_]]:
        answers = [number for number, segment in enumerate(segments) if segment.is_answer]
        trained = {"answers": answers, "last": answers[-1:], "all": range(len(segments))}[self._train_on]
        ids: list[int] = []
        if self._tokenizer.add_bos and self._tokenizer.bos_id is not None:
            ids.append(self._tokenizer.bos_id)
        marks = [False] * len(ids)
        before_text = len(ids)
        for number, segment in enumerate(segments):
            added = self._ids(segment, is_first=len(ids) == before_text)  # also behind a prompt of nothing
            ids += added
            marks += [number in trained and segment.is_trained] * len(added)
        return ids, np.array(marks, dtype=np.bool_)

    def _ids(self, segment: Segment, *, is_first: bool) -> list[int]:
        if not is_first and self._anchor:
            # A sentencepiece tokenizer puts a space before every text, also before one that continues another.
            ids = self._tokenizer.encode(_ANCHOR + segment.text)[len(self._anchor) :]
        else:
            ids = self._tokenizer.encode(segment.text)
        if segment.ends and self._tokenizer.eos_id is not None:
            ids.append(self._tokenizer.eos_id)
        return ids

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns = conversation.turns
        if conversation.shape == "text":
            yield Segment(turns[0].content, is_answer=True, ends=True)
        else:
            yield from _plain_segments(conversation)


def _inside(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens hold a character of a span; one that stands for no character belongs where it stands."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    marks = np.zeros(len(starts), dtype=np.bool_)
    for start, end in spans:
        marks |= (starts < end) & ((ends > start) | (starts == ends) & (starts >= start))
    return marks


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Put an instruction's input under the instruction, for a chat has no turn for it."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role == "input":
            joined[-1] = Turn("user", f"{joined[-1].content}\n\n{turn.content}")
        else:
            joined.append(turn)
    return joined


def _plain_segments(conversation: Conversation) -> Iterator[Segment]:
    """Yield messages under headings, an instruction's parts on lines, and a prompt by itself; answers end."""
    has_headings = conversation.shape == "messages"
    line_end = "\n" if conversation.shape == "instruction" else ""
    prompt = ""
    for turn in conversation.turns:
        if turn.role == "assistant":
            yield Segment(prompt + (_ANSWER_HEADING if has_headings else ""), is_answer=False, ends=False)
            yield Segment(turn.content, is_answer=True, ends=True, is_trained=turn.is_trained)
            prompt = "\n\n"
        elif has_headings:
            prompt += _HEADINGS[turn.role].format(turn.content)
        else:
            prompt += turn.content + line_end
