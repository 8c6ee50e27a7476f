"""A corpus on disk: shards of token ids, a manifest with a hash of every file, and windows read from them.

    corpus/manifest.json      counts, hashes of sources, shards and tokenizer, options
    corpus/tokenizer.json     the tokenizer that made the ids
    corpus/token_bytes.bin    uint32 per id: how many bytes of text it stands for
    corpus/train-00000.bin    ids without a header: little-endian uint16, or uint32 for more than 65,536 ids
    corpus/val-00000.bin

Every document is BOS, its tokens, EOS. (A tokenizer with only one of the two uses it for both.) BOS is never a
target: it is given.

Windows are read with pread, not through a memory map: resident memory stays flat however much of the corpus was
visited, and a file that shrinks under the run is an error with a name instead of a SIGBUS.
"""

import hashlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.errors import DataError, FormatError
from entrenar.files import read_json, sha256_file

FORMAT: Literal["entrenar-corpus"] = "entrenar-corpus"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.bin"  # noqa: S105 - a file name
Split = Literal["train", "val"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardEntry(_Strict):
    """One shard file."""

    file: str
    tokens: PositiveInt
    sha256: str


class SplitEntry(_Strict):
    """The shards and counts of one split; `bytes` is the UTF-8 length of its documents."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    shards: list[ShardEntry]


class TokenizerEntry(_Strict):
    """The tokenizer that made the ids; `sha256` is `Tokenizer.hash`."""

    sha256: str
    vocab_size: PositiveInt
    bos_id: NonNegativeInt
    eos_id: NonNegativeInt
    adds_space: bool
    token_bytes_sha256: str


class SourceEntry(_Strict):
    """One source; `sha256` is over the names and digests of its files."""

    name: str
    files: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class SkippedEntry(_Strict):
    """Files of folders that were left out, and why; the first names."""

    reason: str
    count: PositiveInt
    names: list[str]


class CorpusManifest(_Strict):
    """`manifest.json` of a corpus."""

    format: Literal["entrenar-corpus"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    shard_tokens: PositiveInt
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    sources: list[SourceEntry]
    skipped: list[SkippedEntry]
    duplicates: NonNegativeInt
    cuts: NonNegativeInt
    lossy_documents: NonNegativeInt
    options: dict[str, Any]


class TokenStream:
    """The ids of one split as one long sequence over its shards."""

    def __init__(self, folder: Path, entry: SplitEntry, shard_tokens: int, dtype: np.dtype[Any]) -> None:
        self._paths = [folder / shard.file for shard in entry.shards]
        self._shard_tokens = shard_tokens
        self._dtype = dtype
        self._length = entry.tokens
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]
        weakref.finalize(self, _close_all, self._descriptors)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Return ids start … stop-1, in the corpus' own integer type.

        Raises: DataError if a shard shrank since it was opened.
        """
        parts = []
        while start < stop:
            shard, first = divmod(start, self._shard_tokens)
            count = min(stop - start, self._shard_tokens - first)
            data = os.pread(self._descriptors[shard], count * self._dtype.itemsize, first * self._dtype.itemsize)
            if len(data) != count * self._dtype.itemsize:
                raise DataError(
                    f"shard {self._paths[shard]} ends early: it changed while in use; prepare the corpus again"
                )
            parts.append(np.frombuffer(data, dtype=self._dtype))
            start += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Corpus:
    """An opened corpus."""

    def __init__(
        self, folder: Path, manifest: CorpusManifest, token_bytes: np.ndarray[Any, np.dtype[np.uint32]]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.token_bytes = token_bytes
        dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
        self._streams = {
            name: TokenStream(folder, entry, manifest.shard_tokens, dtype) for name, entry in manifest.splits.items()
        }

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Self:
        """Open a corpus; `verify` reads every shard once and compares its hash.

        Raises: DataError for a missing or damaged corpus, naming the file; FormatError for a bad manifest.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        itemsize = 2 if manifest.dtype == "uint16" else 4
        for entry in manifest.splits.values():
            for shard in entry.shards:
                _check_file(folder / shard.file, shard.tokens * itemsize, shard.sha256 if verify else None)
        table = folder / TOKEN_BYTES
        _check_file(table, manifest.tokenizer.vocab_size * 4, manifest.tokenizer.token_bytes_sha256)
        return cls(folder, manifest, np.fromfile(table, dtype="<u4").astype(np.uint32))

    def stream(self, split: Split) -> TokenStream:
        """Return the ids of a split."""
        return self._streams[split]

    @property
    def has_validation(self) -> bool:
        """Return whether there is held-out text: at least one token that follows another."""
        return len(self._streams["val"]) > 1

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the ids."""
        return Tokenizer.load(self.folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the ids: of the shards' hashes."""
        hashes = {
            name: [shard.sha256 for shard in entry.shards] for name, entry in sorted(self.manifest.splits.items())
        }
        return hashlib.sha256(repr(hashes).encode()).hexdigest()


def is_corpus(folder: Path) -> bool:
    """Return whether a folder holds a corpus, whole or not; checkpoints have a manifest of that name too."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, FormatError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def sources_of(folder: Path) -> list[str] | None:
    """Return the names of the sources that a corpus was made from; None if there is no manifest that says so."""
    try:
        return [source.name for source in _read_manifest(folder).sources]
    except (DataError, FormatError, OSError):
        return None


def check_same_tokenizer(corpora: Sequence[Corpus], tokenizer_hash: str, owner: str) -> None:
    """Refuse corpora whose ids mean something else to `owner` (such as "model runs/a").

    Raises: DataError.
    """
    for corpus in corpora:
        found = corpus.manifest.tokenizer.sha256
        if found != tokenizer_hash:
            raise DataError(
                f"corpus {corpus.folder} was made with tokenizer {found[:12]}…, {owner} uses {tokenizer_hash[:12]}…; "
                f"prepare it again with the tokenizer of {owner} (--tokenizer)"
            )


def _read_manifest(folder: Path) -> CorpusManifest:
    path = folder / MANIFEST
    if not path.is_file():
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        remedy = (
            f"make one with `entrenar prepare SOURCE --out {folder}`"
            if is_free
            else f"make one of it with `entrenar prepare {folder} --out corpora/{folder.stem or 'text'}`, and give that"
        )
        raise DataError(f"{folder} is not a corpus: it has no {MANIFEST}; {remedy}")
    content = read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{path}: format must be {FORMAT!r}")
    if version != VERSION:
        raise FormatError(f"{path}: version must be {VERSION}, got {version!r}; prepare the corpus again")
    try:
        manifest = CorpusManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FormatError(f"{path}: {field}: {first['msg']}, got {first['input']!r}") from error
    _check_counts(path, manifest)
    return manifest


def _check_counts(path: Path, manifest: CorpusManifest) -> None:
    if set(manifest.splits) != {"train", "val"}:
        raise FormatError(f"{path}: splits must be train and val, got {', '.join(manifest.splits)}")
    for name, entry in manifest.splits.items():
        sizes = [shard.tokens for shard in entry.shards]
        full = (
            all(size == manifest.shard_tokens for size in sizes[:-1]) and max(sizes, default=0) <= manifest.shard_tokens
        )
        if sum(sizes) != entry.tokens or not full:
            raise FormatError(f"{path}: splits.{name}: the shards' token counts do not add up to {entry.tokens}")
        for shard in entry.shards:
            if Path(shard.file).name != shard.file:
                raise FormatError(f"{path}: splits.{name}: shard {shard.file!r} must lie in the corpus' folder")


def _check_file(path: Path, size_bytes: int, sha256: str | None) -> None:
    remedy = "restore the file or prepare the corpus again"
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    found = path.stat().st_size
    if found != size_bytes:
        raise DataError(f"{path} is damaged: it has {found} bytes, the manifest says {size_bytes}; {remedy}")
    if sha256 is not None and sha256_file(path) != sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's; {remedy}")
