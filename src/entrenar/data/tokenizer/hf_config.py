"""Apply the settings in `tokenizer_config.json` and its companions to a tokenizer, as transformers does.

A `tokenizer.json` or a sentencepiece model is not the whole mapping. Added tokens may stand in `added_tokens_decoder`
or `added_tokens.json` only, a padding token may have a name and no place in the vocabulary, and the class
`LlamaTokenizer` sets by two flags where a space is put in front of text:

    add_prefix_space = false    nowhere
    legacy = false, or absent   at the start of a text
    legacy = true               at the start, and behind each added token where no space follows it

Only at the start of a text that begins with a space does this project differ: transformers puts no second one there.
Sentencepiece, llama.cpp and Meta's programs do, and without it decoding would lose the space.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from entrenar.data.tokenizer.json_file import control_tokens
from entrenar.errors import FormatError

Prefix = Literal["never", "first", "always"]
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


def prefix_rule(content: Mapping[str, Any], config: Mapping[str, Any]) -> Prefix | None:
    """Return where a space is put in front of text, None if the file itself decides."""
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    if "ByteLevel" in f"{content.get('pre_tokenizer')} {content.get('decoder')}":
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def with_prefix_rule(content: Mapping[str, Any], rule: Prefix | None) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that puts spaces by a rule."""
    if rule is None:
        return dict(content)
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": rule, "split": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if rule != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {**content, "normalizer": None, "pre_tokenizer": spaces, "decoder": {"type": "Sequence", "decoders": steps}}


def with_added_tokens(content: Mapping[str, Any], config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with the tokens that the config adds.

    Raises: FormatError naming `place` and the field.
    """
    model, stated = content.get("model"), content.get("added_tokens")
    stated = [] if stated is None else stated
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = {entry["content"]: entry for entry in stated if _is_token(entry)} if isinstance(stated, list) else {}
    if not isinstance(vocab, dict) or not isinstance(stated, list) or len(added) < len(stated):
        return dict(content)  # refused with the name of the field where the file is checked
    names = list(added)
    for entry in _decoder(config, place):
        added[entry["content"]] = {**added.get(entry["content"], {}), **entry}
    for name in _extra(config):
        known = added.get(name) or {"id": vocab[name]} if name in vocab or name in added else None
        flags = dict.fromkeys(_FLAGS, False)
        added[name] = {"content": name, **flags, **(known or {"id": _next_id(vocab, added)}), "special": True}
    new = [entry for name, entry in added.items() if name not in names]
    return {**content, "added_tokens": [added[name] for name in names] + sorted(new, key=_id_of)}


def _is_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def _id_of(entry: Mapping[str, Any]) -> int:
    index = entry.get("id")
    return index if isinstance(index, int) else -1


def _next_id(vocab: Mapping[str, Any], added: Mapping[Any, Mapping[str, Any]]) -> int:
    ids = [index for index in vocab.values() if isinstance(index, int)]
    return 1 + max([*ids, *map(_id_of, added.values())], default=-1)


def _decoder(config: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError(f"{place}: added_tokens_decoder must be an object of tokens by id, got {decoder!r:.60}")
    for index, token in decoder.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not index.isdecimal() or not isinstance(text, str) or not text:
            raise FormatError(
                f"{place}: added_tokens_decoder[{index!r}] must be a token with content, got {token!r:.60}"
            )
        yield {"id": int(index), "content": text, **{flag: bool(token.get(flag, False)) for flag in _FLAGS}}


def _extra(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield special tokens that transformers adds if the vocabulary lacks them.

    It would add the tokens that begin and end a text too. No model can say a token that its vocabulary lacks, so a
    missing one of those is refused elsewhere.
    """
    yield from (name for role, name in control_tokens(config).items() if role not in ("bos_token", "eos_token"))
    for field in _EXTRA:
        tokens = config.get(field)
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        for token in tokens if isinstance(tokens, list) else []:
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str) and name:
                yield name
