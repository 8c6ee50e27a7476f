"""`entrenar plan` says what a run takes, and what to change if it does not fit."""

import json
import re

import pytest
import torch

from entrenar.cli.main import main
from entrenar.cli.plan import measured
from entrenar.config_file import load_config
from entrenar.interop.hf import save_model
from entrenar.model import Llama, LlamaConfig
from entrenar.planning import plan_run, status_bytes

SMALL = ["plan", "--preset", "tiny", "--num-layers", "2", "--seq-len", "128", "--compute-dtype", "float32"]


def plan(capsys, *words):
    code = main([*SMALL, *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_that_fits_is_described(capsys):
    """Parameters, bytes by kind, arithmetic, disk and the limit are printed; the exit code is 0."""
    code, out, _ = plan(capsys, "--memory", "64GB")
    count = LlamaConfig.preset("tiny", num_layers=2).parameter_count()
    assert code == 0
    assert f"parameters   {count:,}, all trained" in out
    for word in ("imports", "kernels", "weights", "optimizer", "activations", "temporaries", "FLOPs", "checkpoints"):
        assert word in out
    assert "64.00 GB (--memory): it fits" in out


@pytest.mark.slow
def test_what_does_not_fit_is_made_to_fit(capsys):
    """The suggested flags are planned themselves, and with them the run fits."""
    _, out, _ = plan(capsys, "--json", "--batch-size", "64", "--memory", "64GB")
    whole = json.loads(out)["peak_bytes"]
    limit = int(0.8 * whole)
    code, out, _ = plan(capsys, "--json", "--batch-size", "64", "--memory", f"{limit}B")
    report = json.loads(out)
    assert (code, report["fits"], report["advice"]["fits"]) == (1, False, True)
    changes = report["advice"]["changes"]
    assert changes[-1]["peak_bytes"] <= limit < report["peak_bytes"]
    words = [word for key, value in report["advice"]["flags"].items()
             for word in (f"--{key.rpartition('.')[2].replace('_', '-')}", value)]  # fmt: skip
    code, out, _ = plan(capsys, "--json", "--batch-size", "64", *words, "--memory", f"{int(1.05 * limit)}B")
    assert (code, json.loads(out)["fits"]) == (0, True)


@pytest.mark.slow
def test_an_impossible_machine_is_told_the_least(capsys):
    """No change fits into 1 MB: the least possible is named and how."""
    code, _, err = plan(capsys, "--batch-size", "64", "--memory", "1MB")
    assert code == 1
    assert re.search(r"GateFailed: a peak of at most 1 MB is not possible: the least is \d+ MB, with --", err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "lots"], "memory must be an amount above 0 with its unit, such as 6GB or 512MiB, got 'lots'"),
        (["--batch-size", "0", "--lr", "-1"], "data.batch_size"),
        (["--no-such-flag", "1"], "--no-such-flag is not a flag of entrenar plan"),
    ],
)
def test_faults_are_told_and_nothing_is_planned(capsys, words, message):
    """Faults of flags and config are user errors, all at once."""
    code, out, err = plan(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert ("optim.lr" in err) == ("--lr" in words)


def test_a_fine_tuning_run_needs_its_model(capsys, tmp_path):
    """A model flag means fine-tuning, and a missing model is named."""
    code = main(["plan", "--model", str(tmp_path / "gone"), "--data", "rows.jsonl"])
    assert code == 2
    assert "gone" in capsys.readouterr().err


def test_after_a_run_the_peak_is_told_and_the_plan_beside_it():
    """The kernel's own figure, and how far the plan was off."""
    assert re.fullmatch(r"  memory            peak [\d.,]+ [MG]B", measured(None))
    planned = plan_run(load_config(None, {"preset": "tiny", "model.num_layers": "2", "compute_dtype": "float32"}))
    found = re.fullmatch(
        r"  memory            planned peak ([\d.,]+) [MG]B, measured [\d.,]+ [MG]B \(([+-][\d.]+)%\)", measured(planned)
    )
    assert found
    assert float(found[2]) == pytest.approx((planned.step.peak_bytes / status_bytes("VmHWM") - 1) * 100, abs=1)


@pytest.fixture
def base(tmp_path):
    """Write a model of one layer, whose head is its embedding."""
    config = LlamaConfig.preset("tiny", num_layers=1)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path, config, model.state_dict())
    return str(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-init", "loftq"],
        ["--embedding", "int8"],
        ["--bits", "3.9"],
        ["--bits", "20"],
        ["--rank", "100"],
    ],
)
def test_what_finetune_takes_is_planned(capsys, base, words):
    """Each way to hold a base and to begin an adapter, and ranks beyond those of a small model."""
    code = main(["plan", "--model", base, "--data", "rows.jsonl", "--method", "qlora", *words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "it fits" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "1.5"], r"--bits must be >= 2\.\d+ for this model, got 1.5"),
        (["--head", "int8"], r"quantize.head must be left out for this model, whose head is its embedding, got int8"),
    ],
)
def test_what_finetune_refuses_is_not_planned(capsys, base, words, message):
    """The plan says what the run would say."""
    code = main(["plan", "--model", base, "--data", "rows.jsonl", "--method", "qlora", *words])
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_several_ranks_are_planned_with_their_link(capsys):
    """One rank's memory, what it sends, and how efficient all are; the exit code says whether one fits."""
    words = ["--batch-size", "8", "--ranks", "4", "--link-rate", "1GB/s", "--link-latency-us", "100"]
    code, out, _ = plan(capsys, *words, "--memory", "64GB")
    assert code == 0
    assert "ranks        4 with whole weights; the figures above are one rank's" in out
    assert "link         1.00 GB/s, 100 µs a sum (given)" in out
    assert "64.00 GB (--memory): one rank fits" in out
    code, out, _ = plan(capsys, *words, "--memory", "1MB", "--json")
    table = json.loads(out)
    assert (code, table["fits"], table["ranks"]) == (1, False, 4)
    assert table["sent_bytes"] == 2 * 3 * 4 * table["of_one_rank"]["trained_parameters"] // 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link-rate", "1GB"], "--link-rate and --link-latency-us belong to --ranks"),
        (["--ranks", "2", "--link-latency-us", "3"], "--link-latency-us needs --link-rate"),
        (["--ranks", "2", "--link-rate", "fast"], "--link-rate must be an amount above 0 with its unit"),
        (["--ranks", "2", "--shard", "full"], "--ranks plans ranks with whole weights, got scale.shard = full"),
        (["--ranks", "0"], "must be a whole number >= 1"),
    ],
)
def test_a_link_that_is_not_used_or_wrong_is_refused(capsys, words, message):
    """Exit code 2 and a remedy."""
    code, _, err = plan(capsys, *words)
    assert (code, message in err) == (2, True)
