"""A conversation with a model: the messages so far, and the model's next one."""

from collections.abc import Callable, Iterator

import torch

from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import DataError, EntrenarError
from entrenar.infer.complete import GrowingText, with_stop_tokens
from entrenar.infer.generate import generate
from entrenar.infer.settings import GenerateConfig
from entrenar.model import Llama

# End-of-turn tokens of published chat models whose configs name another end token.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>")


class ChatSession:
    """The messages so far, and the model's next one."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, chat: ChatTemplate, config: GenerateConfig) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._config = with_stop_tokens(model.config, tokenizer, self._with_turn_ends(config))
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

        After an error the text is dropped from the conversation, which can go on.

        Raises:
            DataError: the text spells a control token, or does not fit by itself.
            FormatError: the chat template refuses the messages.
            NonFiniteError: the model's weights are damaged.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._ids_that_fit(forgot)
            growing = GrowingText(self._model.config, self._tokenizer, ids, self._config)
            said: list[str] = []
            steps = generate(self._model, [ids], self._config, self._generator, num_tokens=self._tokenizer.vocab_size)
            for (token,) in steps:
                said.append(growing.push(token))
                yield said[-1]
                if growing.finish is not None:
                    break
            said.append(growing.close())
            yield said[-1]
        except EntrenarError:
            self.messages.pop()
            raise
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

    def _with_turn_ends(self, config: GenerateConfig) -> GenerateConfig:
        """Add the tokens that end a turn to the model's end tokens, unless the user set them."""
        if config.eos_token_ids is not None:
            return config
        found = {self._tokenizer.id_of(name) for name in _TURN_ENDS} | {self._tokenizer.eos_id}
        ends = {index for index in found if index is not None} | set(self._model.config.eos_token_ids)
        return config.model_copy(update={"eos_token_ids": tuple(sorted(ends))})
