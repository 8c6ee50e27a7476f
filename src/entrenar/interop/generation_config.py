"""`generation_config.json`: the tokens that end a text, and what else generation begins with elsewhere.

transformers takes the end tokens from here and not from `config.json` where both name some: a chat model ends its turns
with a token that its base does not know. So they are read into the architecture's config, and written back with
everything else that the file says, for other programs to use.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar.errors import FormatError
from entrenar.files import read_json, write_json
from entrenar.model import LlamaConfig

FILE = "generation_config.json"
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of the file, empty where there is none.

    Raises:
        FormatError: the file is not a JSON object, or holds an invalid id.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(values).__name__}")
    for role in _ROLES:
        ids = values.get(role)
        many = ids if isinstance(ids, list) and role == "eos_token_id" else [] if ids is None else [ids]
        if not all(type(index) is int and index >= 0 for index in many):
            raise FormatError(f"{path}: {role} must be a token's id{', or a list' * (role == _ROLES[1])}, got {ids!r}")
    return values


def with_end_tokens(config: LlamaConfig, values: Mapping[str, Any]) -> LlamaConfig:
    """Return the architecture with the end tokens that generation uses."""
    ids = values.get("eos_token_id")
    if ids is None:
        return config
    ends = tuple(ids) if isinstance(ids, list) else ids
    return config.model_copy(update={"eos_token_id": ends[0] if isinstance(ends, tuple) and len(ends) == 1 else ends})


def write_generation_config(folder: Path, config: LlamaConfig, values: Mapping[str, Any]) -> None:
    """Write the file for a model: `values` as they were read, with the tokens that its config has."""
    ends = config.eos_token_id
    roles = {"bos_token_id": config.bos_token_id, "eos_token_id": list(ends) if isinstance(ends, tuple) else ends}
    roles["pad_token_id"] = config.pad_token_id
    known = {role: index for role, index in roles.items() if index is not None}
    write_json(folder / FILE, {**values, **known})
