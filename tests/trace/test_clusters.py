"""Clusters find planted modes, the silhouette is scikit-learn's, and the JSON is the specification's."""

import json
import math
import random
import re
import sys

import pytest

from entrenar.errors import ConfigError, DataError, FormatError, MachineError
from entrenar.trace.cluster_schema import checked
from entrenar.trace.clusters import (
    SILHOUETTE_SAMPLE,
    Agreement,
    Timed,
    as_json,
    cluster,
    report,
    separation,
    silhouette,
    timed_calls,
)
from entrenar.trace.records import SystemCall

metrics = pytest.importorskip("sklearn.metrics", reason="clusters need scikit-learn: pip install 'entrenar[trace]'")

MODES = {
    "three": [(10, 800), (200, 150), (5000, 50)],
    "five": [(5, 300), (30, 300), (200, 200), (1500, 150), (20_000, 50)],
}


def planted(modes, *, sizes=None, seed=0) -> tuple[list[Timed], list[int]]:
    """Log-normal durations a quarter wide around each mode, and which mode each belongs to."""
    generator = random.Random(seed)
    events, truth = [], []
    for mode, (center_us, count) in enumerate(modes):
        for _ in range(count):
            size = 1 << generator.randrange(9, 20) if sizes is None else sizes[mode]
            events.append(Timed("read", center_us * math.exp(generator.gauss(0, 0.25)), size))
            truth.append(mode)
    return events, truth


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "chosen"])
def test_planted_modes_are_recovered(modes, is_told):
    """Adjusted Rand index above 0.9, with the number of modes told or not, and sizes that say nothing."""
    events, truth = planted(modes)
    found = cluster(events, len(modes) if is_told else None)
    assert found.count == len(modes)
    assert metrics.adjusted_rand_score(truth, found.labels) > 0.9


def test_size_parts_modes_that_touch():
    """Where the size goes with the mode, it helps."""
    modes = [(20, 500), (40, 300), (80, 200)]
    blind, truth = planted(modes, sizes=[4096] * 3)
    told, _ = planted(modes, sizes=[4096, 1 << 16, 1 << 20])
    by_time = metrics.adjusted_rand_score(truth, cluster(blind, 3).labels)
    by_both = metrics.adjusted_rand_score(truth, cluster(told, 3).labels)
    assert by_both > 0.9
    assert by_both > by_time


def test_the_silhouette_is_scikit_learns():
    """Equal to scikit-learn's own on the same features; a sample only where there are too many pairs."""
    events, _ = planted(MODES["three"])
    found = cluster(events, 3)
    features = [(math.log(event.duration_us), 0.2 * math.log1p(event.size_bytes)) for event in events]
    assert len(events) <= SILHOUETTE_SAMPLE
    assert found.silhouette == pytest.approx(metrics.silhouette_score(features, found.labels), abs=1e-9)
    many = features * 3
    assert silhouette(many, list(found.labels) * 3) == pytest.approx(found.silhouette, abs=0.05)


def test_clusters_are_numbered_by_duration():
    """The last cluster is the slowest."""
    found = cluster(planted(MODES["five"])[0], 5)
    means = [sum(e.duration_us for e in found.members(n)) / len(found.members(n)) for n in range(5)]
    assert means == sorted(means)


def test_an_extreme_call_is_an_outlier_of_its_own_name():
    """A slow fsync is no outlier among fsyncs; the same time is one among reads."""
    generator = random.Random(0)
    events = [Timed("read", 10 * math.exp(generator.gauss(0, 0.2))) for _ in range(300)]
    events += [Timed("fsync", 9000 * math.exp(generator.gauss(0, 0.2))) for _ in range(100)]
    events.append(Timed("read", 9000.0))
    ((outlier, sigma),) = cluster(events, 2).outliers()
    assert outlier == Timed("read", 9000.0)
    assert sigma > 8


def test_both_ways_are_compared_event_by_event():
    """The counts add up to all events; where both find the same, kappa is 1."""
    events, _ = planted([(10, 980), (5000, 20)], sizes=[4096, 4096])
    agreement = cluster(events, 2).agreement
    assert agreement.both == 20
    assert agreement.both + agreement.clusters_alone + agreement.z_score_alone + agreement.neither == 1000
    # By hand, 2x2 table: observed 0.9, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert Agreement(both=50, clusters_alone=0, z_score_alone=10, neither=40).kappa == pytest.approx(0.8)
    assert Agreement(0, 0, 0, 10).kappa == 1.0


def test_waits_and_unfinished_calls_are_left_out():
    """A futex waits on purpose; a call that never returned has no duration."""
    calls = [
        SystemCall("read", 1, 1, 0, 5000, size_bytes=10),
        SystemCall("futex", 1, 1, 0, 10**9),
        SystemCall("read", 1, 1, 0, None),
    ]
    assert timed_calls(calls) == [Timed("read", 5.0, 10)]


# ---- what is told ----


def test_the_json_has_the_fields_of_the_specification_and_no_others():
    """Section 4.4, field by field, and the comparison beside it when it is asked for."""
    answer = as_json(cluster(planted(MODES["three"])[0], 3))
    assert list(answer) == ["ml_analysis"]
    analysis = json.loads(json.dumps(answer))["ml_analysis"]
    assert list(analysis) == ["clusters", "silhouette_score", "high_latency_cluster", "outliers"]
    assert list(analysis["high_latency_cluster"]) == ["cluster_id", "avg_latency_us", "syscalls", "count"]
    assert analysis["high_latency_cluster"]["cluster_id"] == 2
    assert analysis["high_latency_cluster"]["count"] == 50
    assert analysis["high_latency_cluster"]["avg_latency_us"] == pytest.approx(5000 * math.exp(0.25**2 / 2), rel=0.15)
    assert all(list(row) == ["syscall", "latency_us", "z_score"] for row in analysis["outliers"])
    assert "ml_compare" in as_json(cluster(planted(MODES["three"])[0], 3), compare=True)


SPECIFIED = {
    "ml_analysis": {
        "clusters": 5,
        "silhouette_score": 0.72,
        "high_latency_cluster": {
            "cluster_id": 4, "avg_latency_us": 12345, "syscalls": ["read", "fsync", "write"], "count": 23,
        },
        "outliers": [{"syscall": "read", "latency_us": 45678, "z_score": 8.2}],
    }
}  # fmt: skip


def test_the_report_is_the_appendixs():
    """The specification's own object gives the specification's own lines."""
    lines = report(SPECIFIED).splitlines()
    assert lines[0] == "=== ML Anomaly Analysis ==="
    assert "Silhouette Score: 0.72 (good separation)" in lines
    assert any(line.startswith("High-latency cluster: 23 syscalls (read, fsync, write)") for line in lines)
    assert "Outliers: 1 extreme syscalls (>8σ)" in lines


@pytest.mark.parametrize(
    ("score", "word"), [(0.72, "good"), (0.51, "good"), (0.5, "fair"), (0.26, "fair"), (0.2, "poor")]
)
def test_separation_has_bounds(score, word):
    """0.72 is good, as the specification says."""
    assert separation(score) == f"{word} separation"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["ml_analysis"], "ml_analysis is missing"),
        (["ml_analysis", "clusters"], "ml_analysis.clusters is missing"),
        (["ml_analysis", "silhouette_score"], "ml_analysis.silhouette_score is missing"),
        (["ml_analysis", "high_latency_cluster"], "ml_analysis.high_latency_cluster is missing"),
        (["ml_analysis", "high_latency_cluster", "avg_latency_us"], "high_latency_cluster.avg_latency_us is missing"),
        (["ml_analysis", "outliers", 0, "z_score"], "ml_analysis.outliers[0].z_score is missing"),
    ],
)
def test_a_missing_field_is_refused(path, message):
    """Every field of the specification is needed; the message names the one that is not there."""
    profile = json.loads(json.dumps(SPECIFIED))
    place = profile
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(FormatError, match=re.escape(message)):
        report(profile)


def test_a_field_of_the_wrong_kind_is_refused():
    """A silhouette of "N/A" and a list for a profile are refused; all faults are named at once."""
    profile = json.loads(json.dumps(SPECIFIED))
    profile["ml_analysis"]["silhouette_score"] = "N/A"
    profile["ml_analysis"]["clusters"] = True
    with pytest.raises(FormatError, match=r"clusters is True.*silhouette_score is 'N/A'"):
        checked(profile)
    with pytest.raises(FormatError, match="ml_analysis is missing"):
        checked([])
    with pytest.raises(FormatError, match="ml_analysis is list, not an object"):
        checked({"ml_analysis": []})


@pytest.mark.parametrize(
    ("events", "count", "error", "message"),
    [
        ([Timed("read", 5.0)] * 100, None, DataError, "more than 2 different events, got 1 among 100"),
        ([], 3, DataError, "more than 3 different events, got 0"),
        ([Timed("read", 5.0)], 1, ConfigError, "number of clusters must be >= 2, got 1"),
    ],
)
def test_what_cannot_be_clustered_is_refused(events, count, error, message):
    """The rule and the count are named."""
    with pytest.raises(error, match=message):
        cluster(events, count)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    """The extra to install is in the message."""
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MachineError, match=r"pip install 'entrenar\[trace\]'"):
        cluster(planted(MODES["three"])[0], 3)
