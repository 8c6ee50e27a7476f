"""The weight files of a Hugging Face folder: one safetensors file, or shards with an index.

Format: safetensors' README and the `model.safetensors.index.json` of transformers.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from entrenar.errors import FormatError
from entrenar.files import TEMPORARY_PREFIX, read_json, write_json
from entrenar.interop.safetensors_file import Entry, read_header, write_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write weights in files of limited size, with an index if there are several.

    Weight files of an earlier save that this one does not replace are removed: a reader would mix the two.
    """
    files: list[Path] = []
    held: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        files.append(folder / f"{TEMPORARY_PREFIX}shard-{len(files)}")
        write_tensors(files[-1], shard)
        held.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [WEIGHTS_FILE]
    kept = set(names)
    for name, file in zip(names, files, strict=True):
        file.replace(folder / name)
    if len(files) > 1:
        write_index(folder, {name: file for file, shard in zip(names, held, strict=True) for name in shard}, total)
        kept.add(INDEX_FILE)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if old.name not in kept:
            old.unlink(missing_ok=True)


def write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index that names the file of each weight."""
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)})


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def read_entries(folder: Path, *, has_codes: bool = False) -> dict[str, tuple[Path, Entry]]:
    """Return the file and the place in it of every tensor in a model folder; no weight is read.

    Raises:
        FormatError: a file is missing, damaged, or pickled, or the index disagrees with the shards.
    """
    entries: dict[str, tuple[Path, Entry]] = {}
    for path, names in _weight_files(folder).items():
        if not path.is_file():
            raise FormatError(f"{folder} lacks the shard {path.name}, which {INDEX_FILE} names")
        header = read_header(path, has_codes=has_codes)
        for name in names or ():
            if name not in header:
                raise FormatError(f"{path} lacks tensor {name}, which {INDEX_FILE} places in it")
        for name, entry in header.items():
            if names is not None and name not in names:
                raise FormatError(f"{path} holds tensor {name}, which {INDEX_FILE} does not place in it")
            entries[name] = (path, entry)
    return entries


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Map each weight file to the tensors to read from it; None means all of them."""
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{folder / INDEX_FILE} must hold a weight_map from tensor to file")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(
                    f"{folder / INDEX_FILE} places {name} in {file!r}, which is no file name in this folder"
                )
            files.setdefault(folder / file, set()).add(name)
        if (folder / WEIGHTS_FILE).is_file() and folder / WEIGHTS_FILE not in files:
            raise FormatError(
                f"{folder} holds two sets of weights: {WEIGHTS_FILE}, which transformers reads, and the {len(files)} "
                f"shards that {INDEX_FILE} names; move one of the two away"
            )
        return dict(files)
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise FormatError(
            f"{folder} holds pickled weights ({pickles[0].name}), which can run code when they are read; convert them "
            "where you trust them, with transformers' save_pretrained(safe_serialization=True)"
        )
    raise FormatError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
