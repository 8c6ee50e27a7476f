"""What several ranks take: a share of the rows, float32 sums, and the link (`planning.ranks`, `scale.link`)."""

import pytest

from entrenar.config_file import load_config
from entrenar.errors import ConfigError
from entrenar.planning import RanksPlan, plan_run
from entrenar.scale import Link, measure_link, measure_loopback, sent_bytes
from entrenar.train import World

IMPORTS_BYTES = 1 << 28


def planned(ranks, **flags):
    flags = {key.replace("__", "."): value for key, value in flags.items()}
    config = load_config(None, {
        "data.batch_size": "6", "data.seq_len": "32", "model.vocab_size": "300", "model.hidden_size": "64",
        "model.num_layers": "2", "model.num_heads": "4", "model.intermediate_size": "128", "model.max_seq_len": "64",
        "compute_dtype": "float32", "train.threads": "1",
    } | flags)  # fmt: skip
    return plan_run(config, None, IMPORTS_BYTES, ranks=ranks)


def test_a_rank_takes_its_share_of_the_rows():
    """A third of the tokens and of the products, the same weights."""
    alone, share = planned(1), planned(3)
    assert share.tokens * 3 == alone.tokens
    assert share.step.flops * 3 == alone.step.flops
    assert share.step.tensors["weights"] == alone.step.tensors["weights"]
    assert share.step.trained_tensors == 2 * 9 + 2


def test_ranks_sum_in_float32():
    """Gradients of bfloat16 weights are added up in float32 as soon as there are two ranks: twice the bytes."""
    alone, share = (planned(ranks, train__precision="bfloat16") for ranks in (1, 2))
    kept = 4 * alone.step.trained_parameters
    assert share.step.tensors["gradients"] - alone.step.tensors.get("gradients", 0) >= 0.4 * kept


def test_rows_that_cannot_be_shared_are_refused():
    """The run would say so at its start."""
    with pytest.raises(ConfigError, match=r"must be a multiple of the number of ranks \(4\), got 6"):
        planned(4)


@pytest.mark.parametrize(("ranks", "size", "sent"), [(1, 100, 0), (2, 100, 100), (4, 100, 150), (1000, 1000, 1998)])
def test_a_sum_sends_nearly_twice_the_tensor(ranks, size, sent):
    """2 (N-1)/N."""
    assert sent_bytes(ranks, size) == sent


def test_the_time_of_a_step_is_that_of_a_share_and_of_the_sums():
    """By hand: 20 tensors of float32, and a link of 1 MB/s that takes 1 ms for a sum."""
    share, alone = planned(2), planned(1)
    link = Link(bytes_per_s=1e6, latency_s=1e-3)
    both = RanksPlan(2, share, alone, link)
    sums_s = 20 * 1e-3 + 4 * share.step.trained_parameters / 1e6
    assert both.sum_s == pytest.approx(sums_s)
    assert both.step_s == pytest.approx(share.step.step_s + sums_s)
    assert both.efficiency == pytest.approx(both.alone_s / (2 * both.step_s))
    assert RanksPlan(1, alone, alone, link).efficiency == 1.0


def test_the_link_is_what_large_and_small_sums_take(monkeypatch):
    """A world whose sums take 1 ms and a second for each 16 MB has that latency and that rate."""
    clock = [0.0]

    def add_up(tensor):
        clock[0] += 1e-3 + (tensor.nbytes > 4) * tensor.nbytes / (16 << 20)

    monkeypatch.setattr("entrenar.scale.link.time.perf_counter", lambda: clock[0])
    link = measure_link(World(0, 4, add_up))
    assert link.latency_s == pytest.approx(1e-3)
    assert link.bytes_per_s == pytest.approx(1.5 * (16 << 20))


def test_two_processes_of_this_machine_measure_their_link():
    """They meet, add up, and answer with figures above zero."""
    link = measure_loopback()
    assert link.latency_s > 0
    assert link.bytes_per_s > 0
