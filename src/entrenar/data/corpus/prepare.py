"""Turn sources into a corpus in constant memory.

The idea: documents are read, hashed and gathered into batches of bounded bytes by the calling thread; worker threads
encode a batch each (`tokenizers` releases the interpreter's lock) and turn its ids into one array; results are
written in the order of reading. So the corpus is the same, byte for byte, whatever the number of threads. What is in
memory: a few batches, and 16 to 32 bytes a document to find duplicates.

The split is decided by each document's own hash: independent of order, and the same in every corpus. Where a small
source would leave nothing held out, its document of the smallest hash is.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data.corpus.corpus import (
    FORMAT,
    MANIFEST,
    TOKEN_BYTES,
    VERSION,
    CorpusManifest,
    SkippedEntry,
    SourceEntry,
    Split,
    TokenizerEntry,
    is_corpus,
    sources_of,
)
from entrenar.data.corpus.dedup import SeenHashes, document_hash
from entrenar.data.corpus.document_encoder import DocumentEncoder, Texts, cores, threads_of_tokenizers
from entrenar.data.corpus.settings import PrepareConfig
from entrenar.data.corpus.shards import ShardWriter
from entrenar.data.corpus.sources import STDLIB, CorpusSource, ReadLog, find_sources, read_documents
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.data.tokenizer.train_bpe import train_bpe
from entrenar.errors import DataError
from entrenar.files import atomic_directory, atomic_write, sha256_file, write_json

_BATCH_BYTES = 1 << 19
_SMALLEST_PIECE_BYTES = 16
_HELD_OUT_OF_A_LONE_TEXT = 4
_LEAST_PIECE_BYTES = 1 << 10
# A source of up to this size is hashed before it is encoded, to see whether anything would be held out.
_HASHED_FIRST_BYTES = 64 << 20
_HASH_SPAN = 1 << 64


@dataclass
class Progress:
    """Progress of `prepare`; `stage` is "tokenizer" or "encode". One object, updated in place."""

    stage: str
    total_files: int
    total_bytes: int
    files: int = 0
    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
) -> CorpusManifest:
    """Write the corpus of `sources` to folder `out`, whole or not at all; without a tokenizer, train one first.

    A corpus of the same sources is made again in place; `overwrite` also replaces one of other sources.

    Raises: DataError for sources or a tokenizer that cannot be used, and for a folder that would be replaced;
    FormatError for a damaged tokenizer file; DiskFullError.
    """
    config = config or PrepareConfig()
    out = Path(out)
    found = find_sources([str(source) for source in sources], config)
    config = _cut_a_lone_text(config, found)
    _check_target(out, found, overwrite=overwrite)
    report = progress or (lambda _: None)
    limit = _held_out_below(found, config)
    if tokenizer is None:
        tokenizer = _train_tokenizer(found, config, limit, report)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    with atomic_directory(out) as folder:
        run = _Run(folder, config, tokenizer, limit, _started("encode", found), report)
        return run.write(found)


def _cut_a_lone_text(config: PrepareConfig, sources: list[CorpusSource]) -> PrepareConfig:
    """Cut a single text file into so many documents that a few are held out, unless the user says how to cut it."""
    files = [file for source in sources for file in source.files]
    is_lone_text = len(files) == 1 and files[0].kind == "text" and config.document_separator is None
    if not is_lone_text or config.val_fraction == 0 or "max_document_bytes" in config.model_fields_set:
        return config
    size = files[0].size_bytes
    pieces = math.ceil(_HELD_OUT_OF_A_LONE_TEXT / config.val_fraction)
    piece = max(size // pieces, min(_LEAST_PIECE_BYTES, size // 4), _SMALLEST_PIECE_BYTES)
    return config.model_copy(update={"max_document_bytes": min(piece, config.max_document_bytes)})


def _held_out_below(sources: list[CorpusSource], config: PrepareConfig) -> int:
    """Return the hash below which documents are held out, so that at least one is."""
    limit = int(config.val_fraction * _HASH_SPAN)
    files = [file for source in sources for file in source.files]
    if limit == 0 or sum(file.size_bytes for file in files) > _HASHED_FIRST_BYTES:
        return limit
    digests: set[int] = set()
    for file in files:
        for text in read_documents(file, config, ReadLog()):
            digest = document_hash(text.encode("utf-8"))
            if digest < limit:
                return limit
            digests.add(digest)
    return min(digests) + 1 if len(digests) > 1 else limit


def _check_target(out: Path, sources: list[CorpusSource], *, overwrite: bool) -> None:
    """Refuse to replace a folder that holds something else or a corpus of other sources, or to write into a source."""
    if out.exists() and not is_corpus(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists and is not a corpus, so it is not replaced; name another folder (--out)")
    held = sources_of(out)
    if not overwrite and held is not None and held != [source.name for source in sources]:
        raise DataError(
            f"{out} holds another corpus, made from {', '.join(held)}; replace it with --overwrite, or name another "
            "folder (--out)"
        )
    for source in sources:
        folder = Path(source.name).resolve()
        if source.name != STDLIB and (out.resolve() == folder or folder in out.resolve().parents):
            raise DataError(f"{out} lies in source {source.name}: the corpus would become its own source (--out)")


def _started(stage: str, sources: list[CorpusSource]) -> Progress:
    files = [file for source in sources for file in source.files]
    return Progress(stage, len(files), sum(file.size_bytes for file in files))


def _train_tokenizer(
    sources: list[CorpusSource], config: PrepareConfig, limit: int, report: Callable[[Progress], None]
) -> Tokenizer:
    with threads_of_tokenizers(config.threads or cores()):
        return train_bpe(_sample(sources, config, limit, report), config.vocab_size)


def _sample(
    sources: list[CorpusSource], config: PrepareConfig, limit: int, report: Callable[[Progress], None]
) -> Iterator[str]:
    """Yield documents of the training split, chosen by their hash, up to the sample's size.

    Raises: DataError when there is none.
    """
    progress = _started("tokenizer", sources)
    wanted = config.tokenizer_sample_bytes / max(1, progress.total_bytes)
    taken = 0
    log = ReadLog()
    for file in (file for source in sources for file in source.files):
        for text in read_documents(file, config, log):
            data = text.encode("utf-8")
            digest = document_hash(data)
            # The low half of the hash chooses, the high half decides the split: two independent draws.
            chosen = (digest & 0xFFFFFFFF) < wanted * (1 << 32)
            if not chosen or digest < limit:
                continue
            yield text
            taken += len(data)
            if taken >= config.tokenizer_sample_bytes:
                return
        progress.files += 1
        progress.bytes_read += file.size_bytes
        report(progress)
    if taken == 0:
        raise DataError(f"no text to train a tokenizer on: {_why_no_sample(log, config)}")


def _why_no_sample(log: ReadLog, config: PrepareConfig) -> str:
    if log.documents:
        return (
            f"none of the {log.documents} documents fell into the sample; raise tokenizer_sample_bytes "
            f"({config.tokenizer_sample_bytes}), lower val_fraction ({config.val_fraction}), "
            "or name a document_separator"
        )
    skipped = log.skipped_summary()
    return f"files were left out: {skipped}" if skipped else "every source is empty"


class _Run:
    """One run of `prepare` into a folder."""

    def __init__(
        self,
        folder: Path,
        config: PrepareConfig,
        tokenizer: Tokenizer,
        limit: int,
        progress: Progress,
        report: Callable[[Progress], None],
    ) -> None:
        self._folder, self._config, self._limit = folder, config, limit
        self._progress, self._report = progress, report
        self._encoder = DocumentEncoder(tokenizer)
        self._writers: dict[str, ShardWriter] = {
            split: ShardWriter(folder, split, config.shard_tokens) for split in ("train", "val")
        }
        self._log = ReadLog()
        self._seen = SeenHashes()
        self._duplicates = 0
        self._lossy = 0

    def write(self, sources: list[CorpusSource]) -> CorpusManifest:
        """Encode everything and write the manifest last."""
        threads = self._config.threads or cores()
        entries: list[SourceEntry] = []
        with threads_of_tokenizers(1), ThreadPoolExecutor(threads) as pool:
            try:
                self._encode(self._batches(sources, entries), pool, most=2 * threads)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for writer in self._writers.values():
            writer.close()
        self._check_splits()
        return self._write_manifest(entries)

    def _encode(self, batches: Iterator[Texts], pool: ThreadPoolExecutor, *, most: int) -> None:
        """Encode `batches` on the pool, `most` of them at a time, and write them in order."""
        running: deque[tuple[Texts, Future[tuple[np.ndarray[Any, np.dtype[Any]], int]]]] = deque()
        for batch in batches:
            running.append((batch, pool.submit(self._encoder, batch)))
            if len(running) > most:
                self._finish(*running.popleft())
        while running:
            self._finish(*running.popleft())

    def _batches(self, sources: list[CorpusSource], entries: list[SourceEntry]) -> Iterator[Texts]:
        pending: dict[str, Texts] = {"train": Texts("train"), "val": Texts("val")}
        for source in sources:
            self._log.begin_source()
            self._log.skip_all(source.left_out)
            documents = 0
            for split, text, size in self._documents(source):
                documents += 1
                batch = pending[split]
                batch.texts.append(text)
                batch.sizes.append(size)
                batch.total_bytes += size
                if batch.total_bytes >= _BATCH_BYTES:
                    yield batch
                    pending[split] = Texts(batch.split)
            entries.append(self._source_entry(source, documents))
        yield from (batch for batch in pending.values() if batch.texts)

    def _documents(self, source: CorpusSource) -> Iterator[tuple[Split, str, int]]:
        """Yield (split, text, bytes) of every document that is kept; a duplicate yields nothing."""
        done_bytes = self._progress.bytes_read
        for file in source.files:
            for text in read_documents(file, self._config, self._log):
                data = text.encode("utf-8")
                digest = document_hash(data)
                self._progress.bytes_read += len(data)
                if self._config.dedup and not self._seen.add(digest):
                    self._duplicates += 1
                    continue
                yield "val" if digest < self._limit else "train", text, len(data)
            done_bytes += file.size_bytes
            self._progress.bytes_read = done_bytes
            self._progress.files += 1
            self._report(self._progress)

    def _finish(self, batch: Texts, future: Future[tuple[np.ndarray[Any, np.dtype[Any]], int]]) -> None:
        ids, lossy = future.result()
        writer = self._writers[batch.split]
        writer.write(ids)
        writer.counts.documents += len(batch.texts)
        writer.counts.bytes += batch.total_bytes
        self._lossy += lossy
        self._progress.documents += len(batch.texts)
        self._progress.tokens += len(ids)
        self._report(self._progress)

    def _source_entry(self, source: CorpusSource, documents: int) -> SourceEntry:
        size_bytes = sum(file.size_bytes for file in source.files)
        if documents == 0 and self._log.documents == 0:
            skipped = self._log.skipped_summary()
            reason = f"its files were left out: {skipped}" if skipped else "it is empty"
            raise DataError(f"source {source.name} has no document: {reason}")
        digest = self._log.source_digest.hexdigest()
        return SourceEntry(name=source.name, files=len(source.files), bytes=size_bytes, sha256=digest)

    def _check_splits(self) -> None:
        train, val = self._writers["train"].counts, self._writers["val"].counts
        fraction = self._config.val_fraction
        if train.documents == 0 or (val.documents == 0 and fraction > 0):
            empty = "train" if train.documents == 0 else "held-out"
            raise DataError(
                f"the {empty} split is empty: {train.documents + val.documents} documents, val_fraction {fraction}; "
                f"{'lower' if empty == 'train' else 'raise'} val_fraction, lower max_document_bytes "
                f"({self._config.max_document_bytes}, cuts documents), name a document_separator, or add text"
            )

    def _write_manifest(self, entries: list[SourceEntry]) -> CorpusManifest:
        encoder, tokenizer = self._encoder, self._encoder.tokenizer
        tokenizer.save(self._folder)
        atomic_write(self._folder / TOKEN_BYTES, encoder.token_bytes.tobytes())
        log = self._log
        manifest = CorpusManifest(
            format=FORMAT,
            version=VERSION,
            dtype="uint16" if encoder.dtype == "<u2" else "uint32",
            shard_tokens=self._config.shard_tokens,
            tokenizer=TokenizerEntry(
                sha256=tokenizer.hash,
                vocab_size=tokenizer.vocab_size,
                bos_id=encoder.bos_id,
                eos_id=encoder.eos_id,
                adds_space=tokenizer.adds_space,
                token_bytes_sha256=sha256_file(self._folder / TOKEN_BYTES),
            ),
            splits={split: writer.entry() for split, writer in self._writers.items()},
            sources=entries,
            skipped=[
                SkippedEntry(reason=reason, count=count, names=log.skipped_names[reason])
                for reason, count in sorted(log.skipped_counts.items())
            ],
            duplicates=self._duplicates,
            cuts=log.cuts,
            lossy_documents=self._lossy,
            options=self._config.model_dump(mode="json", exclude={"threads"}),
        )
        write_json(self._folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest
