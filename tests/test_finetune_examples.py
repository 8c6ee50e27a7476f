"""The pages that show fine-tuning do what they say, and the measured tasks are the ones that are described."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from entrenar import recipe
from entrenar.data import SftConfig, Tokenizer, read_examples, train_bpe
from entrenar.model import Llama, LlamaConfig

ROOT = Path(__file__).parents[1]


def imported(path: str) -> ModuleType:
    """Import a script that is in no package."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


tasks = imported("benchmarks/tasks.py")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small model with a tokenizer of its own."""
    tokenizer = train_bpe(["the cat sat on the mat. good bad left right jump walk run look = This film is"] * 4, 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
        max_seq_len=128, initializer_range=0.3, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(tmp_path / "base", model, dict(model.named_parameters()), tokenizer)
    return tmp_path / "base"


def test_the_page_on_lora_trains_and_its_file_reads_back(base: Path, tmp_path: Path) -> None:
    """The loss falls, the adapter is in PEFT's format, and read back it gives the very same logits."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the cat", "completion": " sat on the mat."}\n' * 8)
    script = ROOT / "examples/llama2/finetune_lora.py"
    words = ["--model", base, "--data", data, "--out", tmp_path / "adapter", "--steps", "20", "--lr", "0.02"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.1
    assert "reads back with logits that differ by 0.0" in done.stdout
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_rows_of_the_tasks_hold_what_the_sources_say() -> None:
    """A sentence and its label, a command and its actions; each action keeps its own word."""
    assert tasks.sst2_rows("a tab , no\t0") == {"prompt": "a tab , no\nThis film is", "completion": " bad"}
    assert tasks.sst2_rows("fine\t1")["completion"] == " good"
    row = tasks.scan_rows("IN: jump left twice OUT: I_TURN_LEFT I_JUMP I_TURN_LEFT I_JUMP")
    assert row == {"prompt": "jump left twice =", "completion": " left jump left jump"}
    story = "Ann had a cat.\nThe cat ran away! But in the end, it came home to Ann.\n"
    body = "Ann had a cat.\nThe cat ran away!"
    assert tasks.ending_rows(story) == {"prompt": body, "completion": " But in the end, it came home to Ann."}
    assert len(set(tasks._ACTIONS.values())) == len(tasks._ACTIONS)


def test_the_control_keeps_prompts_and_answers_but_not_their_bond() -> None:
    """Dealt out anew, every prompt and every answer is still there, and few are where they were."""
    rows = [{"prompt": str(number), "completion": f" {number}"} for number in range(50)]
    dealt = tasks.shuffled_answers(rows)
    assert [row["prompt"] for row in dealt] == [row["prompt"] for row in rows]
    assert sorted(row["completion"] for row in dealt) == sorted(row["completion"] for row in rows)
    assert sum(row["prompt"] == row["completion"].strip() for row in dealt) < 10


def test_the_interval_is_that_of_a_mean() -> None:
    """Of 400 fair coins it is about twice the standard error to each side; of one value it is that value."""
    mean, low, high = tasks.interval([0.0, 1.0] * 200)
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    assert tasks.interval([0.25] * 10) == (0.25, 0.25, 0.25)


def test_quality_asks_three_models(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that rows can teach is learned, the raw scores are kept, and the differences are theirs."""
    good, bad = ("fine\t1", "dull\t0")
    for name in ("sst2_train.tsv", "sst2_dev.tsv"):
        (tmp_path / name).write_text("\n".join([good, bad] * 24))
    plan = tasks.TaskPlan(train_rows=48, questions=20, epochs=40, lr=1e-2, metric="accuracy")
    monkeypatch.setitem(tasks.PLANS, "sst2", plan)
    [(task, found)] = tasks.quality(base, tmp_path, ["sst2"], threads=1)
    assert task == "sst2"
    assert found["questions"] == 20
    assert found["score"]["tuned"][0] == 1.0
    assert found["score"]["base"][0] < 1.0
    assert found["tuned_minus_base"][0] == pytest.approx(1 - found["score"]["base"][0])
    assert found["raw"]["tuned"] == [1.0] * 20


def test_a_task_joins_those_measured_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task's figures stay, the task's own are measured anew; figures of another base are not mixed in."""
    for name in ("sst2_train.tsv", "sst2_dev.tsv"):
        (tmp_path / name).write_text("fine\t1\ndull\t0\n" * 4)
    plan = tasks.TaskPlan(train_rows=8, questions=4, epochs=1, lr=1e-2, metric="accuracy", batch_size=1)
    monkeypatch.setitem(tasks.PLANS, "sst2", plan)
    monkeypatch.setattr(tasks.turns, "RESULTS", tmp_path)
    kept = tmp_path / "tasks_quality.json"
    earlier = {"base": tasks.describe(base), "date": "2000-01-01", "scan": {"questions": 3}, "sst2": {"questions": 9}}
    kept.write_text(json.dumps(earlier))
    words = ["tasks.py", "quality", "--model", str(base), "--sources", str(tmp_path), "--tasks", "sst2"]
    monkeypatch.setattr(sys, "argv", [*words, "--threads", "1"])
    tasks.main()
    found = json.loads(kept.read_text())
    assert found["scan"] == {"questions": 3}
    assert found["sst2"]["questions"] == 4
    assert found["sst2"]["plan"]["batch_size"] == 1
    assert found["sst2"]["header"]["date"] == found["date"] != "2000-01-01"
    kept.write_text(json.dumps({**earlier, "base": "a larger one"}))
    with pytest.raises(SystemExit, match=r"holds another base, a larger one, not .* move it away to begin anew"):
        tasks.main()


def test_gsm8k_rows_load_by_templates(base: Path, tmp_path: Path) -> None:
    """Rows of question and answer, which is no usual shape, become examples through two templates."""
    rows = tmp_path / "gsm8k.jsonl"
    rows.write_text('{"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\\n#### 5"}\n')
    given = {"data": rows, "prompt_template": "{question}\n", "completion_template": "{answer}"}
    config = SftConfig.model_validate(given)
    tokenizer = Tokenizer.load(base)
    [example] = read_examples(config.data, tokenizer, config).examples
    assert tokenizer.decode(example.ids[example.is_trained].tolist()).strip() == "2+3=<<2+3=5>>5\n#### 5"
