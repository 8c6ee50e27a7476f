"""What fine-tuning teaches: three tasks before and after, a control, and the fall of the held-out loss for three seeds.

    python benchmarks/tasks.py rows    --tasks endings --source tinystories.txt --out endings.jsonl
    python benchmarks/tasks.py quality --model DIR --sources FOLDER              base, tuned, tuned on shuffled answers
    python benchmarks/tasks.py falls   --model DIR                               held-out loss at every evaluation

FOLDER holds sst2_train.tsv, sst2_dev.tsv, scan_simple_train.txt and scan_simple_test.txt; the docstrings are Python's
own. Every question of a held-out set is answered by three models: the base, the base tuned on the training rows, and
the base tuned on the same rows with their answers dealt out anew, which shows what the form of the rows teaches alone.
The intervals are 95 % bootstrap intervals over the questions, of a score and of the difference of two models' scores.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import turns

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 10_000
_ENDS = re.compile(r"(?<=[.!?\"])\s+([^.!?]{20,120}[.!?]\"?)\s*$")
_ACTIONS = {"I_TURN_LEFT": "left", "I_TURN_RIGHT": "right", "I_JUMP": "jump", "I_WALK": "walk", "I_RUN": "run",
            "I_LOOK": "look"}  # fmt: skip


@dataclass(frozen=True)
class TaskPlan:
    """How a task is taught and asked: numbers of rows, passes over them, learning rate, score, windows in a step."""

    train_rows: int
    questions: int
    epochs: float
    lr: float
    metric: str
    batch_size: int = 8


PLANS = {
    "sst2": TaskPlan(train_rows=1500, questions=872, epochs=2, lr=2e-3, metric="accuracy"),
    "docstrings": TaskPlan(train_rows=300, questions=100, epochs=2, lr=2e-3, metric="token_accuracy"),
    "scan": TaskPlan(train_rows=600, questions=100, epochs=4, lr=2e-3, metric="exact_match", batch_size=1),
}


def sst2_rows(line: str) -> dict[str, str]:
    """Make a row of sentence, tab, label."""
    sentence, label = line.rsplit("\t", 1)
    return {"prompt": f"{sentence}\nThis film is", "completion": " good" if label == "1" else " bad"}


def scan_rows(line: str) -> dict[str, str]:
    """Make a row of `IN: jump twice OUT: I_JUMP I_JUMP`; actions become words that a tokenizer knows."""
    command, actions = line.removeprefix("IN: ").split(" OUT: ")
    return {"prompt": f"{command} =", "completion": "".join(f" {_ACTIONS[action]}" for action in actions.split())}


def ending_rows(story: str) -> dict[str, str]:
    """Make a row of a story: all but its last sentence, and that."""
    last = _ENDS.search(story)
    assert last is not None, story
    return {"prompt": story[: last.start()].strip(), "completion": f" {last[1]}"}


ROWS = {"sst2": sst2_rows, "scan": scan_rows, "endings": ending_rows}


def convert(task: str, source: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Return the rows of a task's file, in an order that mixes its kinds; of stories, those of 300 to 900 letters."""
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines()
    if task == "endings":
        lines = [story for story in text.split("<|endoftext|>") if 300 < len(story) < 900 and _ENDS.search(story)]
    return [ROWS[task](line) for line in mixed(lines)[:limit]]


def mixed(lines: Sequence[str]) -> list[str]:
    """Return the lines in a random order, the same in every call."""
    return [lines[index] for index in np.random.default_rng(0).permutation(len(lines))]


def shuffled_answers(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the same prompts with the same answers, dealt out at random."""
    answers = mixed([row["completion"] for row in rows])
    return [{"prompt": row["prompt"], "completion": answer} for row, answer in zip(rows, answers, strict=True)]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval (Efron 1979, percentiles of resampled means)."""
    values = np.asarray(scores)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return round(float(values.mean()), 4), round(float(low), 4), round(float(high), 4)


def scores_of(folder: Path, file: Path, plan: TaskPlan) -> list[float]:
    """Return the score of every question: right or wrong, or the share of the answer's tokens that are likeliest."""
    from entrenar.data import SftConfig, held_out_batches, read_examples
    from entrenar.infer import accuracy, exact_match, token_hits
    from entrenar.recipe import open_model, question_of

    model, tokenizer = open_model(folder)
    model.eval()
    config = SftConfig.model_validate({"data": file, "seq_len": model.config.context_length})
    examples = read_examples(config.data, tokenizer, config).examples
    questions = [question_of(example) for example in examples]
    if plan.metric == "accuracy":
        return [float(right) for right in accuracy(model, questions)]
    if plan.metric == "exact_match":
        return [float(right) for right in exact_match(model, tokenizer, questions, 64)]
    each = (held_out_batches([example], batch_size=1, seq_len=config.seq_len) for example in examples)
    return [right / asked for batches in each for right, asked in token_hits(model, batches)]


def tune(model: Path, data: Path, runs: Path, lr: float, **options: dict[str, Any]) -> Any:
    """Fine-tune every projection by LoRA, with `options` over these, and return the report of the run."""
    from entrenar.config import FinetuneConfig
    from entrenar.recipe import finetune

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    sections: dict[str, dict[str, Any]] = {
        "sft": {"data": data, "batch_size": 8, "eval_fraction": 0.0},
        "lora": {"rank": 32, "lora_alpha": 64.0, "target_modules": names},
        "train": {"eval_every": 0},
        "optim": {"lr": lr, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"save_every": 0, "keep_best": False},
        "task": {"sample_answers": 0},
    }
    merged = {name: section | options.get(name, {}) for name, section in sections.items()}
    run = {"model": model, "name": data.stem, "runs_dir": runs, "compute_dtype": "float32"}
    return finetune(FinetuneConfig.model_validate(run | merged), overwrite=True)


def prepare_rows(task: str, sources: Path, plan: TaskPlan, folder: Path) -> dict[str, Path]:
    """Write the files of a task: train, shuffled and questions."""
    if task == "docstrings":
        script = ROOT / "examples/finetune_docstrings/make_rows.py"
        subprocess.run([sys.executable, script, "--out", folder / "docstrings"], check=True, stdout=subprocess.DEVNULL)
        sides = []
        for name, limit in (("train", plan.train_rows), ("test", plan.questions)):
            lines = (folder / "docstrings" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            sides.append([json.loads(line) for line in mixed(lines)[:limit]])
        train, asked = sides
    else:
        names = {"sst2": ("sst2_train.tsv", "sst2_dev.tsv"), "scan": ("scan_simple_train.txt", "scan_simple_test.txt")}
        train = convert(task, sources / names[task][0], plan.train_rows)
        asked = convert(task, sources / names[task][1], plan.questions)
    return {
        "tuned": write_rows(folder / f"{task}-tuned.jsonl", train),
        "shuffled": write_rows(folder / f"{task}-shuffled.jsonl", shuffled_answers(train)),
        "questions": write_rows(folder / f"{task}-questions.jsonl", asked),
    }


def quality(model: Path, sources: Path, tasks: Sequence[str], threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Answer every task's questions by the three models; yield what came of each task."""
    for task in tasks:
        plan = PLANS[task]
        train = {"epochs": plan.epochs, "threads": threads}
        with tempfile.TemporaryDirectory() as folder:
            files = prepare_rows(task, sources, plan, Path(folder))
            scores = {"base": scores_of(model, files["questions"], plan)}
            for name in ("tuned", "shuffled"):
                sft = {"batch_size": plan.batch_size}
                report = tune(model, files[name], Path(folder), plan.lr, train=train, sft=sft)
                scores[name] = scores_of(report.folder, files["questions"], plan)
        print(task, compared(scores), file=sys.stderr, flush=True)
        yield task, {"plan": asdict(plan), **compared(scores), "raw": scores}


def compared(scores: dict[str, list[float]]) -> dict[str, Any]:
    """Return the three scores and their differences, question by question, with intervals."""
    return {
        "questions": len(scores["base"]),
        "score": {name: interval(values) for name, values in scores.items()},
        **{
            f"{one}_minus_{other}": interval(np.subtract(scores[one], scores[other]).tolist())
            for one, other in (("tuned", "base"), ("shuffled", "base"), ("tuned", "shuffled"))
        },
    }


def falls(model: Path, seeds: Sequence[int], steps: int, every: int, threads: int) -> dict[str, Any]:
    """Return the held-out loss of the docstrings' questions at every evaluation, for seeds of adapter and order."""
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = prepare_rows("docstrings", folder, PLANS["docstrings"], folder)
        for seed in seeds:
            train = {"max_steps": steps, "eval_every": every, "seed": seed, "threads": threads}
            sft = {"eval_data": files["questions"], "batch_size": 8}
            report = tune(model, files["tuned"], folder, 5e-4, train=train, sft=sft)
            records = map(json.loads, (report.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            assert report.before is not None
            losses[str(seed)] = [report.before.held_out.loss]
            losses[str(seed)] += [record["held_out"]["loss"] for record in records if record["held_out"]]
            print(seed, losses[str(seed)], file=sys.stderr, flush=True)
    falling = {seed: all(b < a for a, b in pairwise(values)) for seed, values in losses.items()}
    return {"steps": steps, "eval_every": every, "held_out_loss": losses, "falls_at_every_evaluation": falling}


def main() -> None:
    """Measure one part."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=("rows", "quality", "falls"))
    arguments.add_argument("--model", type=Path, help="the base: a model folder or a run")
    arguments.add_argument("--sources", type=Path, default=Path(), help="folder of the tasks' files")
    arguments.add_argument("--tasks", default=",".join(PLANS), help="which tasks, with commas between")
    arguments.add_argument("--source", type=Path, help="rows: the file to convert")
    arguments.add_argument("--out", type=Path, help="rows: the jsonl file to write")
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--every", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=2)
    parsed = arguments.parse_args()
    if parsed.part == "rows":
        write_rows(parsed.out, convert(parsed.tasks, parsed.source))
        return
    header = {**turns.machine(), "base": describe(parsed.model)}
    if parsed.part == "falls":
        found = falls(parsed.model, (0, 1, 2), parsed.steps, parsed.every, parsed.threads)
        turns.write_result("tasks_falls", {**header, **found})
        return
    earlier_tasks(header)
    for task, measured in quality(parsed.model, parsed.sources, parsed.tasks.split(","), parsed.threads):
        turns.write_result("tasks_quality", {**header, **earlier_tasks(header), task: {"header": header, **measured}})


def earlier_tasks(header: dict[str, Any]) -> dict[str, Any]:
    """Return the tasks in the file of results, to which a run adds its own; the same one is measured anew."""
    path = turns.RESULTS / "tasks_quality.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["base"] != header["base"]:
        sys.exit(f"{path} holds another base, {found['base']}, not {header['base']}: move it away to begin anew")
    return {name: task for name, task in found.items() if isinstance(task, dict)}


def describe(model: Path) -> str:
    """Name a base by its size."""
    from entrenar.recipe import open_model

    config = open_model(model)[0].config
    return f"{config.parameter_count():,} parameters, {config.num_layers} layers, {config.vocab_size:,} tokens"


if __name__ == "__main__":
    main()
