"""Every way to the gradient is the same, and one that is not is named."""

import json

import numpy as np
import pytest
import torch

from entrenar import ops
from entrenar.cli.main import main
from entrenar.config_file import load_config
from entrenar.data import Batch, Loader, PrepareConfig, prepare
from entrenar.interop import load_model
from entrenar.model import llama
from entrenar.recipe import numerics, two_processes

WAYS = 9


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    words = np.random.default_rng(0).choice(["def", "return", "value", "self", "0"], size=(200, 30))
    (folder / "text.txt").write_text("\n----\n".join(" ".join(row) for row in words), encoding="utf-8")
    options = PrepareConfig(vocab_size=300, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", options)
    path = folder / "run.toml"
    path.write_text(
        f'[data]\ncorpus = ["{folder / "corpus"}"]\nbatch_size = 3\nseq_len = 24\n'
        "[model]\nvocab_size = 300\nhidden_size = 32\nnum_layers = 2\nnum_heads = 4\nnum_kv_heads = 2\n"
        "intermediate_size = 48\nmax_seq_len = 24\ntie_word_embeddings = true\n[train]\nmax_steps = 4\nthreads = 1\n"
    )
    return path


class OneProcess:
    """What two processes do, one after the other: starting them takes seconds, and one test is enough for that."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End nothing."""

    def gradients(self, model, shares):
        """Sum over both."""
        one, other = (numerics._gradients(model, [share]) for share in shares)
        return {name: one[name] + other[name] for name in one}


@pytest.fixture
def two_real_processes():
    """Asked for by the tests that start them."""


@pytest.fixture(autouse=True)
def _one_process(request, monkeypatch):
    if "two_real_processes" not in request.fixturenames:
        monkeypatch.setattr(numerics, "TwoProcesses", OneProcess)


def found(config_file, **flags) -> dict[str, numerics.Finding]:
    config = load_config(config_file, {key.replace("__", "."): value for key, value in flags.items()})
    return {finding.way: finding for finding in numerics.compare_ways(config).findings}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_gives_the_same_gradient(config_file, precision):
    """In float64 all agree to rounding, in the run's own precision within what it rounds itself."""
    findings = found(config_file, train__precision=precision)
    assert len(findings) == WAYS
    assert {way for way, f in findings.items() if f.is_same is not True} == {"compiled"}
    assert "train.compile is off" in findings["compiled"].note
    assert all(f.float64 < 1e-12 for f in findings.values() if f.float64 is not None)
    assert findings["activations recomputed (full)"].same_bits
    assert findings["saved, loaded and resumed"].same_bits


def test_windows_that_cross_documents_are_compared_too(config_file):
    """Without document masks the packing is still checked, on rows cut in two."""
    findings = found(config_file, data__mask_documents="false", train__precision="float32")
    assert findings["packed documents each alone"].is_same


@pytest.mark.parametrize("op", ["swiglu", "rms_norm", "attention", "rope", "linear"])
def test_a_wrong_backward_is_seen_against_plain_torch(op, config_file, monkeypatch):
    """An op whose gradient is a thousandth off differs from autograd, though every cut of the batch agrees with it."""
    right = getattr(ops, op)

    def wrong(*arguments, **options):
        value = right(*arguments, **options)
        return value + 0.001 * (value - value.detach())

    monkeypatch.setattr(ops, op, wrong)
    differing = {way: f for way, f in found(config_file).items() if f.is_same is False}
    assert set(differing) == {"plain torch, differentiated by autograd"}
    assert next(iter(differing.values())).worst.startswith("model.")


def detached(piece, x):
    return piece(x.detach())


def nudged(folder):
    model = load_model(folder)
    model.model.norm.weight.data[0] += 0.01
    return model


split, attention, cross_entropy = Batch.split, ops.attention, ops.linear_cross_entropy


def blind(*qkv, **options):
    return attention(*qkv, **options | {"documents": None})


def enlarged(*inputs, **options):
    return 1.01 * cross_entropy(*inputs, **options)


def first_rank(*corpora, **options):
    return Loader(*corpora, **options | {"rank": 0})


PLANTS = {
    "one row at a time": (Batch, "split", lambda batch, rows: split(batch, rows)[:-1]),
    "packed documents each alone": (ops, "attention", blind),
    "activations recomputed (full)": (llama, "recomputed", detached),
    "activations recomputed (selective)": (llama, "recomputed", detached),
    "loss in chunks of 7 tokens": (numerics, "linear_cross_entropy", enlarged),
    "saved, loaded and resumed": (numerics, "load_model", nudged),
    "two ranks, each a process": (numerics, "Loader", first_rank),
}


@pytest.mark.parametrize("way", PLANTS)
def test_a_fault_in_one_way_is_found_there(way, config_file, monkeypatch):
    """A lost row, a blind mask, a cut graph, a wrong factor, a changed weight, a rank that reads the other's share."""
    monkeypatch.setattr(*PLANTS[way])
    findings = found(config_file)
    assert findings[way].is_same is False
    assert findings[way].worst
    assert sum(finding.is_same is True for finding in findings.values()) >= WAYS - 4


def test_a_difference_ends_with_one_and_names_the_way(config_file, monkeypatch, capsys):
    """The table, the exit code and the message say which way is another, and where most."""
    right = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda gate, up: right(gate, up) + 0.01 * (gate - gate.detach()))
    assert main(["doctor", "--numerics", "--config", str(config_file)]) == 1
    said = capsys.readouterr()
    assert "OTHER  plain torch, differentiated by autograd" in said.out
    assert "same   one row at a time" in said.out
    assert "gradients differ: plain torch, differentiated by autograd (most in model.layers." in said.err


def test_what_was_asked_for_and_not_measured_ends_with_five(config_file, monkeypatch, capsys):
    """A compiler that cannot compile here is neither a pass nor a fault."""

    def refuse(_):
        raise exc.InternalTorchDynamoError("no compiler on this machine")

    exc = torch._dynamo.exc  # imported before the name below is taken
    monkeypatch.setattr(torch, "compile", refuse)
    assert main(["doctor", "--numerics", "--compiled", "--config", str(config_file)]) == 5
    assert "NotMeasured: compiled: not measured: no compiler on this machine" in capsys.readouterr().err
    assert main(["doctor", "--numerics", "--config", str(config_file)]) == 0


@pytest.mark.usefixtures("two_real_processes")
def test_two_processes_give_the_gradient_of_one(config_file, capsys):
    """Two processes meet, each takes its share, and their sum is the whole batch's gradient."""
    assert main(["doctor", "--numerics", "--config", str(config_file)]) == 0
    assert "same   two ranks, each a process" in capsys.readouterr().out


@pytest.mark.usefixtures("two_real_processes")
def test_processes_that_cannot_meet_are_not_measured(config_file, monkeypatch, capsys):
    """A way that was not measured is no pass: code 5, with the reason."""
    monkeypatch.setattr(two_processes, "__name__", "entrenar.no_such_module")
    assert main(["doctor", "--numerics", "--config", str(config_file)]) == 5
    assert "process 0 of 2 failed: " in capsys.readouterr().err


def test_the_json_holds_what_the_table_shows(config_file, capsys):
    """Each way with its figures, and nothing else on the standard output."""
    assert main(["doctor", "--numerics", "--config", str(config_file), "--json", "--seq-len", "16"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["rows"], table["seq_len"], len(table["findings"])) == (2, 16, WAYS)
    assert all(row["is_same"] for row in table["findings"] if row["way"] != "compiled")


def test_flags_of_numerics_alone_are_refused(capsys):
    """`--json` without `--numerics` would be ignored, so it is an error."""
    assert main(["doctor", "--json"]) == 2
    assert "belong to --numerics; add it, or leave them out" in capsys.readouterr().err


def test_nan_is_a_difference():
    """A gradient that is NaN is not the same as any."""
    plain = {"w": torch.ones(3)}
    assert numerics._distance(plain, {"w": torch.tensor([1.0, float("nan"), 1.0])})[1] == "w"
    assert numerics._distance(plain, {})[0] == float("inf")
    assert numerics._distance(plain, plain) == (0.0, "")
