"""Find where each answer stands in the text of a conversation.

A template that marks what the model says (`{% generation %}`) has said it. Otherwise the template is rendered twice
for each answer: the messages before it with the generation prompt, and the messages up to it. Both must begin the
whole text, and the answer is what lies between them: the assistant's words and the tokens that end its turn.

Some generation prompts are no beginning of the rendered turn, because they open a block of reasoning that the turn
does not have. The answer then begins where the two part, if its own words stand right there.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile

from entrenar.data.sft.chat_template import ChatTemplate, Message, Rendering, Span, TemplateStoppedError
from entrenar.data.sft.turns import UnusableRowError
from entrenar.errors import FormatError

Tools = Sequence[object] | None


class AnswerSpans:
    """The places of messages in the text that a chat template makes of them.

    Raises: UnusableRowError wherever the template does not let an answer be told from the rest.
    """

    def __init__(
        self, chat: ChatTemplate, messages: Sequence[Message], tools: Tools = None, documents: Tools = None
    ) -> None:
        self._chat, self._messages, self._tools, self._documents = chat, messages, tools, documents
        self._whole = self._render(len(messages))

    @property
    def text(self) -> str:
        """The whole conversation's text."""
        return self._whole.text

    def of(self, wanted: Sequence[int]) -> list[Span]:
        """Return the spans of the answers with these numbers among the messages."""
        marked = self._whole.generated
        if not marked:
            return [self._answer(number) for number in wanted]
        answers = [number for number, message in enumerate(self._messages) if message["role"] == "assistant"]
        if list(wanted) == answers:
            return list(marked)
        if len(marked) != len(answers):
            raise UnusableRowError(
                "template",
                f"the chat template marks {len(marked)} generation blocks for {len(answers)} answers, so none can be "
                "left out; train all answers",
            )
        return [marked[answers.index(number)] for number in wanted]

    def turn(self, number: int) -> Span:
        """Return the span of a message with all that the template writes around it."""
        return self._end(number - 1) if number else 0, self._end(number)

    def _answer(self, number: int) -> Span:
        end = self._end(number)
        start = self._start(number, end)
        self._need_words(number, start, end)
        return start, end

    def _need_words(self, number: int, start: int, end: int) -> None:
        words = self._messages[number].get("content")
        if isinstance(words, str) and _squeezed(words) not in _squeezed(self.text[start:end]):
            raise UnusableRowError("template", f"the chat template leaves out words of the answer in message {number}")

    def _end(self, number: int) -> int:
        if number == len(self._messages) - 1:
            return len(self.text)
        return self._length(self._render(number + 1).text, number)

    def _length(self, beginning: str, number: int) -> int:
        """Return the length of a rendering up to a message, or of the part that the whole text begins with."""
        for text in (beginning, beginning.removesuffix(self._tail)):
            if self.text.startswith(text):
                return len(text)
        raise UnusableRowError(
            "template", f"the chat template rewrites turns after message {number}; set train_on = last"
        )

    @cached_property
    def _tail(self) -> str:
        """Text that the template writes at the end of a conversation, unless a generation prompt follows."""
        prompted = self._render(len(self._messages), has_prompt=True).text
        return self.text[self._shared(prompted) :]

    def _start(self, number: int, end: int) -> int:
        if number == 0:
            # No generation begins a conversation, and templates refuse one without a message.
            alone, prompted = self._render(1).text, self._render(1, has_prompt=True).text
            prompt = prompted.removeprefix(alone) if prompted.startswith(alone) else ""
            return max(self.text.find(prompt) + len(prompt), 0)
        before = self._render(number, has_prompt=True).text
        if self.text.startswith(before):
            return len(before)
        history = self._length(self._render(number).text, number - 1)
        self._need_words(number, history, end)
        shared = self._shared(before)
        message = self._messages[number]
        first = message.get("reasoning_content") or message.get("content") or ""
        begins = isinstance(first, str) and self.text[shared:].lstrip().startswith(first.strip())
        if shared <= history or not begins:
            raise UnusableRowError(
                "template",
                f"the chat template's generation prompt is no beginning of message {number}, so the model would "
                "learn another start of the turn than it sees in use; use another template",
            )
        return shared

    def _shared(self, other: str) -> int:
        """Return how far the whole text and another are the same, without cutting a control token."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.text, other, strict=False)))
        return self._chat.before_token(self.text, same)

    def _render(self, count: int, *, has_prompt: bool = False) -> Rendering:
        try:
            return self._chat.rendering(
                self._messages[:count],
                tools=self._tools,
                documents=self._documents,
                add_generation_prompt=has_prompt,
            )
        except TemplateStoppedError:
            raise
        except FormatError as error:
            raise UnusableRowError("template", str(error)) from error


def _squeezed(text: str) -> str:
    """Drop white space: templates trim and add it."""
    return "".join(text.split())
