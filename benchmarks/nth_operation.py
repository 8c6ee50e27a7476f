"""Fail each file operation of each way to write, once and for good, and look at what is left: `nth_operation.py`.

A case is good if the command ends with its result ("ended"), or with an error of ours that names a file ("refused"), or
with the system's own error on a named file, which the command line prints as one line, exit 3 ("plain"); and if the
same command, run again without faults, gives the undisturbed result, or says that it is there ("refused, whole": the
result was committed, and what failed was making that durable). Results go to `results/nth_operation.json`.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import turns

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "train"))

import torch
from faults import KINDS, Faults, failing
from test_nth_operation import fault_after, outcome_of
from train_toy import fingerprint

from entrenar import recipe
from entrenar.cli.main import main as command
from entrenar.data import PrepareConfig, prepare, train_bpe
from entrenar.errors import EntrenarError
from entrenar.model import Llama, LlamaConfig


def inputs(folder: Path) -> None:
    """Write a text, a model, and rows to tune it on."""
    text = "\n----\n".join(f"the opposite of {number} is {100 - number} " * 9 for number in range(60))
    (folder / "text.txt").write_text(text)
    tokenizer = train_bpe([text], 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=64, max_seq_len=64, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(folder / "base", model, dict(model.named_parameters()), tokenizer)
    rows = [{"prompt": f"the opposite of {number}", "completion": " is"} for number in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _finetune(folder, folder, "adapter")


def _finetune(folder: Path, out: Path, name: str, *more: str) -> None:
    _call(
        "finetune", "--model", folder / "base", "--data", folder / "rows.jsonl", "--runs-dir", out, "--name", name,
        "--max-steps", 2, "--eval-fraction", 0, "--sample-answers", 0, "--threads", 1, "--overwrite", *more,
    )  # fmt: skip


def _call(*words: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        if code := command([str(word) for word in words]):
            raise _Ended(code, said.getvalue())


class _Ended(Exception):
    """A command ended with another code than 0."""


def _prepare(folder: Path, out: Path) -> None:
    options = PrepareConfig(vocab_size=300, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], out / "corpus", options)


ROADS: dict[str, Callable[[Path, Path], None]] = {
    "prepare": _prepare,
    "convert to GGUF": lambda folder, out: _call("convert", folder / "base", out / "m.gguf", "--to", "gguf"),
    "convert to NF4": lambda folder, out: _call("convert", folder / "base", out / "nf4", "--to", "nf4"),
    "merge": lambda folder, out: _call("merge", folder / "base", folder / "adapter", out / "merged"),
    "report": lambda folder, out: _call("report", folder / "adapter", "--out", out / "report.html"),
    "trunk cache": lambda folder, out: _finetune(
        folder, out, "cached", "--layers", "top:1", "--cache-trunk", "--trunk-dir", str(out / "trunk")
    ),
}
# What differs from run to run though nothing is wrong: times, and what holds them.
_TIMED = ("metrics.jsonl", "events.jsonl", "state.json", "manifest.json", "report.html", ".lock", "README.md")


def content(folder: Path) -> dict[str, str]:
    """Return a hash of each file; a cache may hold more or less, as long as what is computed over it is the same."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _TIMED]
    files = [path for path in files if "trunk" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def case(road: Callable[[Path, Path], None], folder: Path, out: Path, faults: Faults, whole: dict[str, str]) -> str:
    """Run a road with a fault, then without; return what happened."""
    out.mkdir()
    try:
        with failing(faults):
            road(folder, out)
        ending = "ended"
    except _Ended as ended:
        ending = "refused" if ended.args[0] in (2, 3) and str(out) in ended.args[1] else f"bug: {ended.args}"
    except EntrenarError as error:
        ending = "refused" if str(out) in str(error) else f"bug: names no file: {error}"
    except OSError as error:
        ending = "plain" if error.filename is not None else f"bug: {error!r}"
    except Exception as error:  # noqa: BLE001  # the finding
        ending = f"bug: {error!r}"
    if not faults.failed:
        return "none failed"
    if ending.startswith("bug"):
        return f"{ending} after {faults.failed[0]}"
    if ending == "ended":
        shutil.rmtree(out)
        out.mkdir()
    try:
        road(folder, out)
    except Exception as error:  # noqa: BLE001  # the finding
        if "give --overwrite" in str(error) and content(out) == whole:
            return "refused, whole"
        return f"bug: cannot be repeated after {faults.failed[0]}: {error!r}"
    if left := {path.name for path in out.rglob(".incomplete-*")}:
        return f"bug: leftovers {left} after {faults.failed[0]}"
    return ending if content(out) == whole else f"bug: another result after {faults.failed[0]}"


def all_cases(name: str, one: Callable[..., str]) -> dict[str, Any]:
    """Raise N until nothing fails, for errors once and for good; return the counts and the bugs."""
    endings: Counter[str] = Counter()
    bugs: list[str] = []
    most = 0
    for is_lasting in (False, True):
        for at in range(1, 100_000):
            ending = one(at, list(KINDS)[at % len(KINDS)], is_lasting=is_lasting)
            if ending == "none failed":
                most = max(most, at - 1)
                break
            endings[ending.partition(":")[0]] += 1
            if ending.startswith("bug"):
                bugs.append(f"{at} {'for good' if is_lasting else 'once'}: {ending}"[:400])
    print(name, most, dict(endings), *bugs[:5], sep="\n  ", flush=True)
    return {"operations": most, "cases": sum(endings.values()), "endings": dict(endings), "bugs": bugs}


def saving(folder: Path, whole: Any, at: int, kind: str, *, is_lasting: bool) -> str:
    """Return what happened to a run with saves, pruning and records."""
    place = folder / f"save-{at}-{is_lasting}"
    report = outcome_of(place, at, kind, is_lasting=is_lasting)
    if not report["failed"]:
        return "none failed"
    fault = report["message"] if report["ending"] == "bug" else fault_after(place, whole)
    shutil.rmtree(place)
    return report["ending"] if fault is None else f"bug: {fault} after {report['failed'][0]}"


def main() -> None:
    """Take every road, or those named."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs(folder)
        for name, road in ROADS.items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            undisturbed = folder / "out"  # the same place: some files hold their own path
            shutil.rmtree(undisturbed, ignore_errors=True)
            undisturbed.mkdir()
            road(folder, undisturbed)
            whole = content(undisturbed)
            shutil.rmtree(undisturbed)

            def one(at: int, kind: str, *, is_lasting: bool, road: Any = road, whole: Any = whole) -> str:
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                return case(road, folder, out, Faults(out, at, KINDS[kind], is_lasting), whole)

            results[name] = all_cases(name, one)
        if not sys.argv[1:] or "save, prune, metrics" in sys.argv[1:]:
            outcome_of(folder / "whole", 0, "EIO", is_lasting=False)
            results["save, prune, metrics"] = all_cases(
                "save, prune, metrics", partial(saving, folder, fingerprint(folder / "whole" / "run"))
            )
    if not sys.argv[1:]:
        turns.write_result("nth_operation", {**turns.machine(), "roads": results})


if __name__ == "__main__":
    main()
