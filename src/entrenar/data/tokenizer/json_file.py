"""Read `tokenizer.json` and its companions, and refuse a damaged or hostile one with the name of the field.

`tokenizers` reports a bad file with a Rust message that names neither; some faults it does not see at all (an id
twice, a merge that spells a control token, a truncation length left behind by another program, which would silently
cut every text).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from entrenar.errors import FormatError
from entrenar.files import read_json

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_ID = 1 << 31


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Merge the files next to a tokenizer into the content of one tokenizer_config.json.

    The chat templates that have files of their own, chat_template.jinja and additional_chat_templates/NAME.jinja,
    replace those in the config. special_tokens_map.json and added_tokens.json count, by transformers' rule, where the
    config has no added_tokens_decoder.

    Raises: FormatError.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    marks, config, added = (_object_in(folder / name) for name in names)
    config = {**config, **marks} if "added_tokens_decoder" not in config else {**marks, **config}
    for flag in ("add_bos_token", "add_eos_token"):
        if config.get(flag, False) is None:  # as good as absent
            del config[flag]
    if added and "added_tokens_decoder" not in config:
        named = set(control_tokens(config).values())
        config["added_tokens_decoder"] = {
            str(index): {"content": name, "special": name in named, "normalized": name not in named}
            for name, index in added.items()
        }
    templates = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = folder / "chat_template.jinja"
    texts = {name: _template(path) for name, path in templates.items()}
    if texts:
        config["chat_template"] = texts["default"] if set(texts) == {"default"} else texts
    return config


def _object_in(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error}") from error


def chat_templates(value: Any, place: str) -> dict[str, str]:
    """Return chat templates by name; `value` is one template, a list of {"name", "template"}, or an object of them.

    Raises: FormatError naming `place`.
    """
    named = {"default": value} if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if value is None:
        return {}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise FormatError(
            f"{place}: chat_template must be a text, or named texts as an object or a list of objects with name and "
            f"template, got {value!r:.80}"
        )
    return named


def control_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that a tokenizer_config.json names, by role (bos_token, eos_token, …)."""
    named = {role: config.get(role) for role in ROLES}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in named.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Read `path`, refusing keys that occur twice.

    Raises: FormatError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{path}: the key {twice!r} occurs twice")
        return found

    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


class TokenizerFile:
    """The checked content of a `tokenizer.json`."""

    def __init__(self, content: dict[str, Any], place: str, control: Mapping[str, str] | None = None) -> None:
        """Check `content`; tokens of `control` (see `control_tokens`) count as special even where it does not say so.

        Raises: FormatError naming `place` and the field.
        """
        self._place = place
        # A stored truncation would cut documents, a stored padding would add tokens; neither belongs to the mapping.
        self.content = {**content, "truncation": None, "padding": None}
        model = self._object(content.get("model"), "model")
        if model.get("type", "BPE") != "BPE":
            self._refuse("model.type", f"must be BPE, got {model.get('type')!r}")
        if model.get("dropout"):
            self._refuse("model.dropout", f"must be null, got {model['dropout']!r}: encoding would be random")
        self.vocab = self._vocabulary(model)
        self.added: dict[int, str] = {}
        special: set[int] = set()
        self.content["added_tokens"] = self._with_control(content.get("added_tokens"), control or {})
        self._read_added_tokens(self.content["added_tokens"], special)
        self.special_ids = frozenset(special)
        self.ids = {**self.vocab, **{content: index for index, content in self.added.items()}}
        self._check_merges(model)

    def backend(self, content: Mapping[str, Any] | None = None, *, encode_special_tokens: bool) -> tokenizers.Tokenizer:
        """Build the encoder of `content` instead of the file's, if given, with the same tokens.

        With `encode_special_tokens` text that spells a control token stays text.

        Raises: FormatError.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(content or self.content))
        except Exception as error:  # tokenizers raises bare Exception
            raise FormatError(f"{self._place} is not a usable tokenizer.json: {error}") from error
        for index, token in self.added.items():
            if (found := backend.token_to_id(token)) != index:
                self._refuse(
                    "added_tokens",
                    f"gives {token!r} the id {index}, but its readers number it {found}, on from "
                    "the vocabulary; put it into model.vocab too",
                )
        backend.encode_special_tokens = encode_special_tokens
        return backend

    def _refuse(self, field: str, reason: str) -> NoReturn:
        raise FormatError(f"{self._place}: {field} {reason}")

    def _object(self, value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(field, f"must be an object, got {type(value).__name__}")
        return dict(value)

    def _vocabulary(self, model: dict[str, Any]) -> dict[str, int]:
        vocab = self._object(model.get("vocab"), "model.vocab")
        owner: dict[int, str] = {}
        for token, index in vocab.items():
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < _MAX_ID:
                self._refuse(f"model.vocab[{token!r}]", f"must be a token id, got {index!r}")
            if owner.setdefault(index, token) != token:
                self._refuse(f"model.vocab[{token!r}]", f"has id {index}, which {owner[index]!r} has too")
        if not vocab:
            self._refuse("model.vocab", "is empty")
        if max(owner) >= 2 * len(owner) + 65536:
            self._refuse("model.vocab", f"has {len(owner)} tokens but an id as high as {max(owner)}")
        return vocab

    def _with_control(self, tokens: Any, control: Mapping[str, str]) -> list[Any]:
        tokens = [] if tokens is None else tokens
        if not isinstance(tokens, list):
            self._refuse("added_tokens", f"must be a list, got {type(tokens).__name__}")
        names = set(control.values())
        marked = [
            {**token, "special": True} if isinstance(token, dict) and token.get("content") in names else token
            for token in tokens
        ]
        present = {token.get("content") for token in marked if isinstance(token, dict)}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        missing = sorted((self.vocab[name], name) for name in names - present if name in self.vocab)
        return marked + [{"id": index, "content": name, **flags} for index, name in missing]

    def _read_added_tokens(self, tokens: list[Any], special: set[int]) -> None:
        for position, token in enumerate(tokens):
            field = f"added_tokens[{position}]"
            entry = self._object(token, field)
            index, content = entry.get("id"), entry.get("content")
            if not isinstance(content, str) or not content:
                self._refuse(f"{field}.content", f"must be text, got {content!r}")
            limit = 2 * (len(self.vocab) + len(tokens)) + 65536
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < limit:
                self._refuse(f"{field}.id", f"must be a token id below {limit}, got {index!r}")
            if self.vocab.get(content, index) != index or self.added.setdefault(index, content) != content:
                self._refuse(f"{field}.id", f"is {index}, but the vocabulary disagrees about {content!r}")
            if entry.get("special"):
                special.add(index)

    def _check_merges(self, model: dict[str, Any]) -> None:
        merges = model.get("merges")
        if not isinstance(merges, list):
            self._refuse("model.merges", f"must be a list, got {type(merges).__name__}")
        reachable = {token for token, index in self.vocab.items() if index in self.special_ids}
        if not model.get("ignore_merges"):
            reachable = {token for token in reachable if len(token) == 1}
        for token in sorted(reachable):
            self._refuse(
                "model.vocab", f"lets plain text become the control token {token!r}; take it out of the vocabulary"
            )
        for position, merge in enumerate(merges):
            field = f"model.merges[{position}]"
            try:
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                made = self.vocab[left + right]
                known = left in self.vocab and right in self.vocab
            except (ValueError, TypeError):
                self._refuse(field, f"must be two tokens, got {merge!r}")
            except KeyError:
                known = False
            if not known:
                self._refuse(field, f"is {merge!r}, but a part or the whole is not in model.vocab")
            if made in self.special_ids:
                self._refuse(field, f"makes the control token {left + right!r} out of plain text")
