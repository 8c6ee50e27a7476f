"""The command as several ranks: one run folder, the figures of one process, and errors that name their cause
(`scale.ranks`, `cli.ranks`).
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launched import (
    TIMEOUT_S,
    base_model,
    finetune_words,
    free_port,
    on_ranks,
    prepared_corpus,
    start,
    train_words,
)
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from entrenar.config import RunConfig
from entrenar.errors import ConfigError
from entrenar.runs import read_records
from entrenar.train import World, latest_good

# Float32 sums in another order; the exact comparison is in float64 (test_exactness.py).
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus."""
    return prepared_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model and rows next to it."""
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The runs folder of two ranks that nobody disturbed, and how each ended."""
    runs = tmp_path_factory.mktemp("two")
    return runs, on_ranks(*[train_words(corpus, runs)] * 2)


def figures(run):
    return [(r["step"], r["targets"], r["loss"]) for r in read_records(run / "metrics.jsonl")]


def assert_same_figures(run, other, rel=ROUNDING):
    """The same steps and targets, and losses that differ by rounding."""
    for mine, expected in zip(figures(run), figures(other), strict=True):
        assert mine[:2] == expected[:2]
        assert mine[2] == pytest.approx(expected[2], rel=rel)


def test_weights_in_pieces_give_the_same_run(corpus, tmp_path):
    """Two ranks with half of each weight: the losses of whole weights, and the same checkpoint in a file of each rank.

    It is a Hugging Face folder as it lies there; every byte is written once.
    """
    flags = {"precision": "bfloat16", "checkpointing": "full", "eval_every": "3", "grad_accum_steps": "1"}
    for shard in ("none", "full"):
        ended = on_ranks(*[train_words(corpus, tmp_path / shard, shard=shard, **flags)] * 2)
        assert [code for code, _, _ in ended] == [0, 0], ended
    assert "Weights in pieces over 2 ranks" in ended[0][1]
    runs = [tmp_path / shard / "trial" for shard in ("full", "none")]
    assert_same_figures(*runs, rel=1e-3)
    pieces, whole = (latest_good(run / "checkpoints") for run in runs)
    numbered = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in pieces.model.glob("*.safetensors")) == numbered
    sizes = [sum(file.stat().st_size for file in one.path.rglob("*.safetensors")) for one in (pieces, whole)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # more headers
    theirs = LlamaForCausalLM.from_pretrained(pieces.model, dtype=torch.float32).state_dict()
    expected = load_file(whole.model / "model.safetensors")
    assert all(torch.allclose(theirs[name], weight.float(), atol=2e-2) for name, weight in expected.items())


def test_two_ranks_write_one_run(corpus, undisturbed, tmp_path):
    """Rank 0 prints and writes metrics, events and checkpoints once; rank 1 writes its log and prints nothing."""
    assert on_ranks(train_words(corpus, tmp_path / "one"))[0][0] == 0
    runs, (first, second) = undisturbed
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Training complete" in first[1]
    assert second[1:] == ("", "")
    one, two = tmp_path / "one" / "trial", runs / "trial"
    assert_same_figures(two, one)
    assert {path.name for path in two.iterdir()} - {path.name for path in one.iterdir()} == {"ranks"}
    assert [path.name for path in (two / "ranks").iterdir()] == ["rank-1.log"]
    log = (two / "ranks" / "rank-1.log").read_text()
    assert "Training complete" in log
    assert "step-00000006" in log
    events = [event["kind"] for event in read_records(two / "events.jsonl")]
    assert events == [event["kind"] for event in read_records(one / "events.jsonl")]


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "full"},
        {"method": "lora", "lora_init": "pissa", "shard": "full", "eval_every": "3", "sample_answers": "1"},
        {"method": "qlora", "shard": "full", "eval_every": "3", "sample_answers": "1"},
    ],
    ids=lambda flags: flags["method"],
)
def test_ranks_fine_tune_as_one_process(model, tmp_path, flags):
    """Three ranks with a row each, whole or with pieces of base and adapter, have one process' losses and weights."""
    for name, size in (("one", 1), ("three", 3)):
        ended = on_ranks(*[finetune_words(model, tmp_path / name, **flags)] * size)
        assert [code for code, _, _ in ended] == [0] * size, ended
    runs = [tmp_path / name / "trial" for name in ("three", "one")]
    assert_same_figures(*runs)
    (mine, expected) = (
        load_file(next(latest_good(run / "checkpoints").model.glob("*model.safetensors"))) for run in runs
    )
    assert mine.keys() == expected.keys()
    assert all(torch.allclose(mine[name], expected[name], atol=1e-3) for name in mine)


def test_a_run_is_resumed_on_other_numbers_of_ranks(corpus, tmp_path):
    """Two ranks, then three, both with pieces of the weights, then one: data order and losses of one that ran on."""
    schedule = {"schedule": "constant", "shard": "full"}
    assert on_ranks(train_words(corpus, tmp_path / "one", **schedule))[0][0] == 0
    for size, steps in ((2, "2"), (3, "4"), (1, "6")):
        words = train_words(corpus, tmp_path / "changed", **schedule, max_steps=steps)
        ended = on_ranks(*[words + (["--resume"] if steps != "2" else [])] * size)
        assert [code for code, _, _ in ended] == [0] * size, ended
    one, changed = tmp_path / "one" / "trial", tmp_path / "changed" / "trial"
    assert_same_figures(changed, one)
    states = [latest_good(run / "checkpoints").loader_state for run in (one, changed)]
    assert states[0] == states[1]


def test_another_config_on_one_rank_is_refused(corpus, tmp_path):
    """Both ranks end with code 2 and the key, and no folder is made."""
    ended = on_ranks(train_words(corpus, tmp_path), train_words(corpus, tmp_path, lr="0.02"))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "but config.optim.lr is 0.01 on rank 0 and 0.02 on rank 1" in ended[0][2]
    assert "ConfigError: on rank 1: " in ended[1][2]
    assert not (tmp_path / "trial").exists()


def test_other_data_on_one_rank_is_refused(model, tmp_path):
    """The same path, with other rows behind it for one rank, ends both ranks with code 2."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        rows = [{"prompt": f"say {n}:", "completion": f" {n + rank}"} for n in range(20)]
        (tmp_path / str(rank) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = finetune_words(model, tmp_path / "runs", batch_size="2", data="rows.jsonl")
    port = free_port()
    ranks = [start(words, rank, 2, port, cwd=tmp_path / str(rank)) for rank in range(2)]
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("all ranks must train the same run, but data is" in error for error in errors), errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"bits": "4.5", "method": "qlora"}, "quantize.bits must be left out for several ranks"),
        ({"cache_trunk": "true", "layers": "top:1"}, "trunk.cache_trunk must be false for several ranks"),
        ({"batch_size": "5"}, "must be a multiple of world_size (2)"),
    ],
)
def test_what_ranks_cannot_do_is_refused(model, tmp_path, flags, said):
    """Rounding a base, caching a trunk and a batch that cannot be shared end with code 2 and a remedy."""
    ended = on_ranks(*[finetune_words(model, tmp_path, **flags)] * 2)
    assert [code for code, _, _ in ended] == [2, 2]
    assert said in ended[0][2]


def test_a_gpu_is_refused_for_several_ranks(monkeypatch, tmp_path):
    """The sums run over gloo on the CPU; a GPU is named before anything is opened."""
    module = importlib.import_module("entrenar.recipe.start")
    monkeypatch.setattr(module, "current_world", lambda: World(0, 2, lambda _: None))
    monkeypatch.setattr(module, "choose_device", lambda _: torch.device("cuda"))
    config = RunConfig(name="trial", runs_dir=tmp_path)
    with pytest.raises(ConfigError, match='device must be cpu for several ranks, got cuda; set device = "cpu"'):
        module.start(config, module.Mode())


def test_a_corpus_is_prepared_before_ranks_train(tmp_path):
    """Several ranks do not prepare a corpus."""
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    words = [*train_words(tmp_path / "corpus", tmp_path / "runs"), "--sources", str(tmp_path / "text.txt")]
    ended = on_ranks(words, words)
    assert [code for code, _, _ in ended] == [2, 2]
    assert "must be prepared before several ranks train on it; run `entrenar prepare`" in ended[0][2]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_killed_rank_ends_the_other_with_its_progress_saved(corpus, tmp_path, shard):
    """After SIGKILL of rank 1, rank 0 ends with code 3 and a remedy; what it holds whole, it saves."""
    words = train_words(corpus, tmp_path, max_steps="100000", save_every="0", shard=shard)
    port = free_port()
    ranks = [start(words, rank, 2, port) for rank in range(2)]
    metrics = tmp_path / "trial" / "metrics.jsonl"
    while not (metrics.is_file() and len(list(read_records(metrics))) >= 3):
        assert ranks[0].poll() is None
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, error = ranks[0].communicate(timeout=TIMEOUT_S)
    ranks[1].communicate(timeout=TIMEOUT_S)
    assert ranks[0].returncode == 3, error
    assert "MachineError: rank 0 lost contact with another rank" in error
    if shard == "none":
        assert latest_good(tmp_path / "trial" / "checkpoints").step == figures(tmp_path / "trial")[-1][0]
    else:
        assert not list((tmp_path / "trial" / "checkpoints").glob("*"))


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_killed_rank_restarts_all_and_they_end_at_the_undisturbed_weights(corpus, undisturbed, tmp_path, shard):
    """`torchrun --max-restarts` starts the same command again, which then continues its own run."""
    run = tmp_path / "trial"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    program = [str(Path(__file__).parent / "dying_program.py"), str(run / "checkpoints"), "1"]
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun, *program, *train_words(corpus, tmp_path, shard=shard), "--overwrite"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Loading checkpoint") == 1
    other = undisturbed[0] / "trial"
    if shard == "full":
        on_ranks(*[train_words(corpus, tmp_path / "undisturbed", shard=shard)] * 2)
        other = tmp_path / "undisturbed" / "trial"
    assert figures(run) == figures(other)
    saved, expected = (
        {file.name: file.read_bytes() for file in latest_good(one / "checkpoints").model.glob("*.safetensors")}
        for one in (run, other)
    )
    assert saved == expected


def test_a_port_in_use_is_named(corpus, tmp_path):
    """Rank 0 ends with code 3, the address and a remedy."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start(train_words(corpus, tmp_path), 0, 2, port)
        _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in error
    assert "choose a free port (torchrun --master-port)" in error


def test_a_rank_that_hangs_is_named_with_its_stack(corpus, tmp_path):
    """Rank 1 stands still: rank 0 waits for its time, names it, and ends with code 3; the stack says where it stood."""
    words = train_words(corpus, tmp_path, max_steps="100000", rank_timeout_s="6")
    port = free_port()
    ranks = [start(words, rank, 2, port) for rank in range(2)]
    run = tmp_path / "trial"
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_bytes():
        assert ranks[0].poll() is None, ranks[0].communicate()
        time.sleep(0.05)
    sums = [run / "ranks" / f"rank-{rank}.sums" for rank in range(2)]
    while True:  # until it stands between two sums, and not inside one that both have come to
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(0.3)
        if int(sums[1].read_text()) < int(sums[0].read_text()):
            break
        os.kill(ranks[1].pid, signal.SIGCONT)
        time.sleep(0.01)
    _, err = ranks[0].communicate(timeout=TIMEOUT_S)
    stacks = (run / "ranks" / "rank-0.stacks").read_text()
    os.kill(ranks[1].pid, signal.SIGCONT)
    ranks[1].communicate(timeout=TIMEOUT_S)
    assert ranks[0].returncode == 3
    assert "lost contact with another rank: rank 1 did not come" in err
    assert "in _add_up" in stacks
    assert latest_good(run / "checkpoints").step > 0
