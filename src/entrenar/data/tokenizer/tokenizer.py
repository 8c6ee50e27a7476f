"""One tokenizer for every LLaMA: `tokenizer.json`, `.model`, llama2.c's `tokenizer.bin`, or a folder with one.

The work is done by the `tokenizers` package; what is added is what training needs to be sure of:

- **Text stays text.** Text that spells a control token ("<|eos|>") is encoded as the characters it is. Only
`allow_special=True` reads it as
  the token, and only a program should ask for that.
- **Decoding is exact and streams**: see `token_bytes`.
- **Identity.** `hash` names the mapping from text to ids, so that a corpus refuses a model with another tokenizer.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from entrenar.data.tokenizer.hf_config import prefix_rule, with_added_tokens, with_prefix_rule
from entrenar.data.tokenizer.json_file import (
    TokenizerFile,
    chat_templates,
    control_tokens,
    read_folder_config,
    read_tokenizer_json,
)
from entrenar.data.tokenizer.llama2c import read_tokenizer_bin
from entrenar.data.tokenizer.sentencepiece import read_sentencepiece, special_tokens, tokenizer_json
from entrenar.data.tokenizer.tiktoken import is_tiktoken, read_tiktoken
from entrenar.data.tokenizer.token_bytes import DecodeStream, bytes_of_tokens, decoder_family
from entrenar.errors import DataError, FormatError
from entrenar.files import atomic_write, write_json

_ROLES = {
    "bos_token": ("<|begin_of_text|>", "<|bos|>", "<s>", "<bos>", "[BOS]"),
    "eos_token": ("<|end_of_text|>", "<|eos|>", "</s>", "<|endoftext|>", "<eos>", "[EOS]"),
    "pad_token": ("<|pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]"),
}


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, content: dict[str, Any], config: dict[str, Any] | None = None, place: str = "tokenizer") -> None:
        """Build from the content of a `tokenizer.json` and a `tokenizer_config.json`.

        Raises: FormatError naming `place` and the field.
        """
        self.config = dict(config or {})
        rule = prefix_rule(content, self.config)
        content = with_added_tokens(content, self.config, place)
        content = with_prefix_rule(content, rule) if rule == "never" else content
        checked = TokenizerFile(content, place, control_tokens(self.config))
        self._prefix_rule = rule
        self._file = checked
        self._content = checked.content
        self._backend = self._built(encode_special_tokens=True)
        self._family, drops_space = decoder_family(content.get("decoder"), place)
        self._drops_space = drops_space or rule in ("first", "always")
        self._table = bytes_of_tokens(checked.vocab, checked.added, self._family)
        self._ids = checked.ids
        self.special_ids = checked.special_ids
        self.bos_id = self._role("bos_token", place)
        self.eos_id = self._role("eos_token", place)
        self.pad_id = self._role("pad_token", place)
        self.chat_templates = chat_templates(self.config.get("chat_template"), place)
        add_bos = self.config.get("add_bos_token")
        self.add_bos = self._template_starts_with_bos() if add_bos is None else bool(add_bos)
        self.add_eos = bool(self.config.get("add_eos_token", False))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a `tokenizer.json`, a `.model` (sentencepiece's or LLaMA 3's), a `tokenizer.bin`, or a folder with one.

        Raises: DataError if nothing is there; FormatError naming file and field if it is damaged.
        """
        file = _find(Path(path))
        if file.suffix == ".bin" or (file.suffix == ".model" and is_tiktoken(file)):
            content, config = (read_tokenizer_bin if file.suffix == ".bin" else read_tiktoken)(file)
            return cls(content, {**config, **read_folder_config(file.parent)}, str(file))
        if file.suffix == ".model":
            model = read_sentencepiece(file)
            config = {**special_tokens(model), "add_bos_token": True, "add_eos_token": False}
            return cls(tokenizer_json(model), {**config, **read_folder_config(file.parent)}, str(file))
        return cls(read_tokenizer_json(file), read_folder_config(file.parent), str(file))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` in the form that `AutoTokenizer` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        named = {role: self.name_of(index) for role, index in roles.items() if index is not None}
        # The flags of LlamaTokenizer decide about spaces; every other tokenizer is what its file says, and no class.
        by_flags = self._prefix_rule in ("first", "always")
        name = "LlamaTokenizer" if by_flags else "PreTrainedTokenizerFast"
        fixed = {"tokenizer_class": name, "clean_up_tokenization_spaces": False}
        kept = {key: value for key, value in self.config.items() if key != "added_tokens_decoder"}
        flags = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos}
        atomic_write(folder / "tokenizer.json", self._file.backend(encode_special_tokens=True).to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", {**kept, **named, **flags, **fixed})

    @property
    def vocab_size(self) -> int:
        """The highest id plus one: how many rows an embedding needs."""
        return len(self._table)

    def fits(self, rows: int) -> bool:
        """Return whether an embedding of `rows` rows holds all ids; the padding token's is never read."""
        size = self.vocab_size
        return size <= rows or (size == rows + 1 and self.pad_id == rows)

    @property
    def content(self) -> Mapping[str, Any]:
        """The content of `tokenizer.json`."""
        return self._content

    @property
    def chat_template(self) -> str | None:
        """The chat template that came with the tokenizer; of several, the one named "default"."""
        return self.chat_templates.get("default")

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """The special tokens' texts by role, named as in chat templates: {"bos_token": "<s>"}."""
        indices = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        found = {role: self.name_of(index) for role, index in indices.items() if index is not None}
        unknown = self._content["model"].get("unk_token")
        return {**({"unk_token": unknown} if unknown else {}), **found, **control_tokens(self.config)}

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes each id stands for; control tokens give their name's bytes."""
        return self._table

    @property
    def adds_space(self) -> bool:
        """Return whether encoding adds a space before the first token of a text (sentencepiece)."""
        return self._drops_space

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of everything that decides the ids of a text, in a form that does not depend on spelling."""
        model = dict(self._content["model"])
        model["vocab"] = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        decisive = {
            name: self._content.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")
        }
        canonical = {**decisive, "model": model, "bos_id": self.bos_id, "eos_id": self.eos_id}
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name, None if there is no such token."""
        return self._ids.get(token)

    def encode(
        self, text: str | bytes, *, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of `text`; `bos` and `eos` put those tokens around it.

        Raises: DataError for bytes that are not UTF-8, lone surrogates, or an asked-for token that does not exist.
        """
        return self.encode_batch([text], bos=bos, eos=eos, allow_special=allow_special)[0]

    def encode_batch(
        self, texts: Iterable[str | bytes], *, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[list[int]]:
        """Encode several texts at once, on all cores; see `encode`."""
        before, after = self._around("bos", wanted=bos), self._around("eos", wanted=eos)
        backend = self._special_backend if allow_special else self._backend
        valid = [self._lead(text) + text for text in map(_valid_text, texts)]
        return [before + found.ids + after for found in backend.encode_batch_fast(valid, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text with its control tokens, and the characters (start, end) that each id stands for.

        Raises: DataError for lone surrogates.
        """
        lead = self._lead(_valid_text(text))
        found = self._special_backend.encode(lead + text, add_special_tokens=False)
        return found.ids, [(max(start - len(lead), 0), end - len(lead)) for start, end in found.offsets]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that form no character become U+FFFD.

        Raises: DataError for an id outside of the vocabulary.
        """
        stream = DecodeStream(
            self._table, self.special_ids if skip_special else frozenset(), drop_space=self._drops_space
        )
        return stream.feed(ids) + stream.finish()

    def decode_stream(self, context: Iterable[int] = (), *, skip_special: bool = True) -> DecodeStream:
        """Return a decoder to `push` ids into; `context` are ids that came before and are not repeated."""
        stream = DecodeStream(
            self._table, self.special_ids if skip_special else frozenset(), drop_space=self._drops_space
        )
        stream.feed(context)
        return stream

    @cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        return self._built(encode_special_tokens=False)

    def _built(self, *, encode_special_tokens: bool) -> tokenizers.Tokenizer:
        return self._file.backend(
            with_prefix_rule(self._content, self._prefix_rule), encode_special_tokens=encode_special_tokens
        )

    def _lead(self, text: str) -> str:
        """Return the space that Metaspace leaves out in front of a text that begins with one (see `hf_config`)."""
        return " " if self._prefix_rule in ("first", "always") and text.startswith((" ", "▁")) else ""

    def name_of(self, index: int) -> str:
        """Return the name of a token."""
        return next(token for token, found in self._ids.items() if found == index)

    def _around(self, role: str, *, wanted: bool) -> list[int]:
        index = self.bos_id if role == "bos" else self.eos_id
        if not wanted:
            return []
        if index is None:
            raise DataError(f"the tokenizer has no {role} token; name one in tokenizer_config.json ({role}_token)")
        return [index]

    def _role(self, role: str, place: str) -> int | None:
        named = control_tokens(self.config).get(role)
        if named is None:
            known = (self._ids[name] for name in _ROLES[role] if self._ids.get(name) in self.special_ids)
            return next(known, None) if role not in self.config else None
        if named not in self._ids:
            raise FormatError(f"{Path(place).parent}: {role} is {named!r}, which the tokenizer does not have")
        return self._ids[named]

    def _template_starts_with_bos(self) -> bool:
        processor = self._content.get("post_processor") or {}
        steps = processor.get("processors", []) if processor.get("type") == "Sequence" else [processor]
        starts = [
            step["single"][0] for step in steps if step.get("type") == "TemplateProcessing" and step.get("single")
        ]
        named = [start.get("SpecialToken", {}).get("id") for start in starts]
        return self.bos_id is not None and [self._ids.get(name) for name in named] == [self.bos_id]


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer.bin"):
            if (path / name).is_file():
                return path / name
        found = sorted(path.glob("*.model"))
        if len(found) == 1:
            return found[0]
        raise DataError(f"no tokenizer in {path}: it needs a tokenizer.json or a tokenizer.model")
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}: give a tokenizer.json, a sentencepiece .model, or a folder")
    if path.suffix not in (".json", ".model", ".bin"):
        raise DataError(f"{path} is not a tokenizer: its name must end in .json, .model or .bin")
    return path


def _valid_text(text: str | bytes) -> str:
    """Return `text` as a str that UTF-8 can hold."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}") from error
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(f"text is not Unicode: lone surrogate U+{code:04X} at position {error.start}") from error
    return text
