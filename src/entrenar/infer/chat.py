"""A conversation with a model: the messages so far, and the model's next one."""

from collections.abc import Callable, Iterator

import torch

from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import DataError, EntrenarError
from entrenar.infer.generate import GenerateConfig, generate
from entrenar.model import Llama


class ChatSession:
    """The messages so far, and the model's next one."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, chat: ChatTemplate, config: GenerateConfig) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._system: str | None = None
        self.messages: list[dict[str, str]] = []

    def reset(self, system: str | None = None) -> None:
        """Forget everything and start with an instruction."""
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The instruction that the conversation starts with."""
        return self._system

    def answer(self, text: str, forgot: Callable[[], None]) -> Iterator[str]:
        """Yield the model's answer to `text` in pieces; call `forgot` for each exchange that no longer fits.

        Raises:
            DataError: the text spells a control token, or does not fit by itself; it is dropped from the conversation.
            FormatError: the chat template refuses the messages; the text is dropped too.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._ids_that_fit(forgot)
        except EntrenarError:
            del self.messages[before:]
            raise
        stream = self._tokenizer.decode_stream(ids)
        ends = self._ends()
        said: list[str] = []
        for (token,) in generate(self._model, [ids], self._config, self._generator):
            if token is None or token in ends:
                break
            said.append(stream.push(token))
            yield said[-1]
        said.append(stream.finish())
        yield said[-1]
        self.messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _ids_that_fit(self, forgot: Callable[[], None]) -> list[int]:
        room = self._model.config.context_length
        first = 0 if self._system is None else 1
        while True:
            ids = self._chat.encode(self.messages, add_generation_prompt=True)
            if len(ids) < room:
                return ids
            if len(self.messages) - first < 3:
                raise DataError(
                    f"a message must be shorter than the model's context of {room} tokens, got {len(ids)} with its "
                    "template; shorten it"
                )
            del self.messages[first : first + 2]
            forgot()

    def _ends(self) -> frozenset[int]:
        """Return the tokens that end a turn: the config's, the tokenizer's, and those that chat models commonly use."""
        names = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>")
        found = {self._tokenizer.id_of(name) for name in names} | {self._tokenizer.eos_id}
        own = self._config.eos_token_ids or self._model.config.eos_token_ids
        return frozenset(index for index in found if index is not None) | frozenset(own)
