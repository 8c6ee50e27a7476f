"""`entrenar prepare SOURCE… --out DIR`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrenar import data
from entrenar.cli import flags
from entrenar.cli.next_step import tell_next
from entrenar.cli.progress import TrainingView
from entrenar.data import PrepareConfig
from entrenar.data.row import counted
from entrenar.report.step_line import quantity

if TYPE_CHECKING:
    from entrenar.data import CorpusManifest


def run(words: Sequence[str]) -> int:
    """Prepare a corpus; return the exit code."""
    parsed = flags.parse(_arguments(), words)
    if parsed.if_missing and parsed.out.exists():
        data.Corpus.open(parsed.out)
        print(f"{parsed.out} is there and whole")
        return 0
    manifest = data.prepare(
        parsed.sources,
        parsed.out,
        flags.from_fields(parsed, PrepareConfig),
        tokenizer=parsed.tokenizer,
        progress=TrainingView(None).preparing,
        overwrite=parsed.overwrite,
    )
    _print_summary(parsed.out, manifest)
    tell_next(f"entrenar train --corpus {shlex.quote(str(parsed.out))}")
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = flags.parser("prepare", "Tokenize text, code, jsonl, json, csv or parquet into a corpus of shards.")
    arguments.add_argument("sources", nargs="+", help="files or folders; `stdlib` is Python's own sources")
    arguments.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    arguments.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, sentencepiece .model or a model folder; trained when not given"
    )
    arguments.add_argument("--if-missing", action="store_true", help="do nothing if the corpus is there and whole")
    arguments.add_argument("--overwrite", action="store_true", help="replace a corpus that was made from other sources")
    flags.add_field_flags(arguments, PrepareConfig)
    return arguments


def _print_summary(out: Path, manifest: "CorpusManifest") -> None:
    print(f"\n{out}: vocabulary of {manifest.tokenizer.vocab_size:,}")
    for name, split in manifest.splits.items():
        ratio = split.bytes / max(split.tokens, 1)
        print(
            f"  {name:<6} {quantity(split.documents):>7} documents  {quantity(split.tokens):>7} tokens  "
            f"{quantity(split.bytes):>7} bytes  {ratio:.2f} bytes per token"
        )
    if manifest.cuts:
        limit = manifest.options["max_document_bytes"]
        print(
            f"  texts longer than {limit:,} bytes are cut at line starts into several documents "
            "(--max-document-bytes, --document-separator)"
        )
    if not manifest.splits["val"].documents:
        print("  nothing is held out (val_fraction 0): a run on this corpus measures no held-out loss")
    if manifest.duplicates:
        print(f"  {counted(manifest.duplicates, 'duplicate')} left out")
    if lossy := manifest.lossy_documents:
        print(f"  {counted(lossy, 'document')} contain{'s' * (lossy == 1)} text that the tokenizer cannot encode")
    for skipped in manifest.skipped:
        names = ", ".join(skipped.names[:3])
        print(
            f"  {counted(skipped.count, 'file')} left out, {skipped.reason}: {names}{' …' if skipped.count > 3 else ''}"
        )
