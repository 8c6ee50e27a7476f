"""Group the system calls of a trace by duration and size with k-means, following the specification.

A z-score fails where durations have several modes (cached and cold reads, small and large writes): the slow mode hides
in the spread. Clusters of the *logarithm* of the duration find the modes; on raw microseconds a few long calls take
all the clusters, with a silhouette of 0.996 (`docs/log.md`, 2026-11-26).

- Features: the natural logarithm of the duration, and `SIZE_WEIGHT` times the bytes' logarithm. Durations span more
  than sizes do once the weight is applied, so a size alone makes no cluster, yet it parts two modes that touch.
- k-means++ and the silhouette are scikit-learn's (Arthur & Vassilvitskii 2007; Rousseeuw 1987). The silhouette needs
  all pairs, so it is taken over a sample of at most `SILHOUETTE_SAMPLE` events, drawn with a fixed seed.
- Without a number of clusters, the one from 2 to `MOST_CLUSTERS` with the best silhouette is taken.
- Clusters are numbered by rising mean duration: the last is the slowest.
- The z-score of an event is robust and in logarithms too, over all calls of its name.
"""

import importlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from entrenar.errors import ConfigError, DataError, MachineError
from entrenar.stats import median_and_mad
from entrenar.trace.anomaly import WAITS
from entrenar.trace.cluster_schema import checked
from entrenar.trace.records import SystemCall

SIZE_WEIGHT = 0.2
SILHOUETTE_SAMPLE = 2_000
MOST_CLUSTERS = 8
OUTLIER_SIGMA = 8.0
ALARM_SIGMA = 3.0
# A cluster is abnormal for a call if it holds less than this share of its events and lies this far above its usual one.
RARE_SHARE = 0.05
FAR_RATIO = 5.0
_SPREAD_FLOOR = 0.1
_MAD_TO_SIGMA = 1.4826
_LISTED_OUTLIERS = 100

Point = tuple[float, float]


@dataclass(frozen=True)
class Timed:
    """One finished call: its name, duration and the bytes it moved."""

    name: str
    duration_us: float
    size_bytes: int = 0


@dataclass(frozen=True)
class Agreement:
    """The agreement of clusters and z-score on the abnormal events; the counts add up to all events."""

    both: int
    clusters_alone: int
    z_score_alone: int
    neither: int

    @property
    def kappa(self) -> float:
        """Cohen's kappa: 1 for full agreement, 0 for what chance would give; 1 if neither finds anything."""
        total = self.both + self.clusters_alone + self.z_score_alone + self.neither
        by_clusters = (self.both + self.clusters_alone) / total
        by_z = (self.both + self.z_score_alone) / total
        chance = by_clusters * by_z + (1 - by_clusters) * (1 - by_z)
        observed = (self.both + self.neither) / total
        return 1.0 if chance == 1.0 else (observed - chance) / (1 - chance)


@dataclass(frozen=True)
class Clusters:
    """The result of k-means on the events: `labels` has one cluster number per event, `z_scores` one σ."""

    events: Sequence[Timed]
    labels: Sequence[int]
    z_scores: Sequence[float]
    silhouette: float
    tried: dict[int, float]
    agreement: Agreement

    @property
    def count(self) -> int:
        """Number of clusters."""
        return max(self.labels) + 1

    def members(self, cluster: int) -> list[Timed]:
        """Return the events of a cluster."""
        return [event for event, label in zip(self.events, self.labels, strict=True) if label == cluster]

    def outliers(self) -> list[tuple[Timed, float]]:
        """Return the events more than `OUTLIER_SIGMA` above the median of their name, the furthest first."""
        far = [pair for pair in zip(self.events, self.z_scores, strict=True) if pair[1] > OUTLIER_SIGMA]
        return sorted(far, key=lambda pair: -pair[1])


def timed_calls(calls: Iterable[SystemCall]) -> list[Timed]:
    """Return the finished calls, those left out whose purpose is to wait."""
    return [
        Timed(call.name, max(call.duration_ns, 1) / 1e3, call.size_bytes or 0)
        for call in calls
        if call.duration_ns is not None and call.name not in WAITS
    ]


def cluster(events: Sequence[Timed], count: int | None = None, *, seed: int = 0) -> Clusters:
    """Group events into `count` clusters, or into as many as part them best.

    Raises: ConfigError for fewer than 2 clusters; DataError for too few events or too few different ones;
    MachineError if scikit-learn is not installed.
    """
    if count is not None and count < 2:
        raise ConfigError(f"the number of clusters must be >= 2, got {count}; leave it out to have it chosen")
    features = [_feature(event) for event in events]
    different = len(set(features))
    wanted = 2 if count is None else count
    if different <= wanted:
        raise DataError(
            f"{wanted} clusters need more than {wanted} different events, got {different} among {len(events)}; "
            "trace a longer run, or ask for fewer clusters"
        )
    counts = [wanted] if count is not None else range(2, min(MOST_CLUSTERS, different - 1) + 1)
    trials = {number: _k_means(features, number, seed) for number in counts}
    tried = {number: silhouette(features, labels, seed=seed) for number, labels in trials.items()}
    best = max(tried, key=lambda number: tried[number])
    labels = _by_duration(events, trials[best])
    z_scores = _z_scores(events)
    return Clusters(events, labels, z_scores, tried[best], tried, _agreement(events, labels, z_scores))


def silhouette(features: Sequence[Point], labels: Sequence[int], *, seed: int = 0) -> float:
    """Return scikit-learn's silhouette coefficient over at most `SILHOUETTE_SAMPLE` events."""
    sample = None if len(features) <= SILHOUETTE_SAMPLE else SILHOUETTE_SAMPLE
    score = _scikit_learn("metrics").silhouette_score(features, labels, sample_size=sample, random_state=seed)
    return float(score)


def _feature(event: Timed) -> Point:
    return math.log(event.duration_us), SIZE_WEIGHT * math.log1p(event.size_bytes)


def _k_means(features: Sequence[Point], count: int, seed: int) -> list[int]:
    k_means = _scikit_learn("cluster").KMeans(n_clusters=count, n_init=10, random_state=seed)
    labels: list[int] = k_means.fit_predict(features).tolist()
    return labels


def _scikit_learn(module: str) -> Any:
    # Seconds of import, for this command alone.
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MachineError(
            "clusters need scikit-learn, which is not installed; run pip install 'entrenar[trace]'"
        ) from error


def _by_duration(events: Sequence[Timed], labels: Sequence[int]) -> list[int]:
    """Number clusters by rising mean duration."""
    durations = defaultdict(list)
    for event, label in zip(events, labels, strict=True):
        durations[label].append(event.duration_us)
    order = sorted(durations, key=lambda label: statistics.fmean(durations[label]))
    number = {label: index for index, label in enumerate(order)}
    return [number[label] for label in labels]


def _z_scores(events: Sequence[Timed]) -> list[float]:
    logarithms = defaultdict(list)
    for event in events:
        logarithms[event.name].append(math.log(event.duration_us))
    measure = {name: median_and_mad(values) for name, values in logarithms.items()}
    return [
        (math.log(event.duration_us) - measure[event.name][0])
        / max(_MAD_TO_SIGMA * measure[event.name][1], _SPREAD_FLOOR)
        for event in events
    ]


def _agreement(events: Sequence[Timed], labels: Sequence[int], z_scores: Sequence[float]) -> Agreement:
    abnormal = _abnormal(events, labels)
    counts = Counter(
        ((event.name, label) in abnormal, sigma > ALARM_SIGMA)
        for event, label, sigma in zip(events, labels, z_scores, strict=True)
    )
    return Agreement(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def _abnormal(events: Sequence[Timed], labels: Sequence[int]) -> set[tuple[str, int]]:
    """Return the clusters, by name of call, that are rare for the name and far above its usual cluster."""
    durations: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event, label in zip(events, labels, strict=True):
        durations[event.name][label].append(event.duration_us)
    abnormal = set()
    for name, by_label in durations.items():
        total = sum(map(len, by_label.values()))
        usual_us = statistics.median(by_label[max(by_label, key=lambda label: len(by_label[label]))])
        for label, values in by_label.items():
            if len(values) < RARE_SHARE * total and statistics.median(values) >= FAR_RATIO * usual_us:
                abnormal.add((name, label))
    return abnormal


# ---- what is told ----


def as_json(clusters: Clusters, *, compare: bool = False) -> dict[str, Any]:
    """Return section 4.4's object, `ml_analysis`; with `compare` also `ml_compare`, the agreement with the z-score."""
    slowest = clusters.members(clusters.count - 1)
    names = [name for name, _ in Counter(event.name for event in slowest).most_common()]
    answer: dict[str, Any] = {
        "ml_analysis": {
            "clusters": clusters.count,
            "silhouette_score": round(clusters.silhouette, 4),
            "high_latency_cluster": {
                "cluster_id": clusters.count - 1,
                "avg_latency_us": round(sum(event.duration_us for event in slowest) / len(slowest), 3),
                "syscalls": names,
                "count": len(slowest),
            },
            "outliers": [
                {"syscall": event.name, "latency_us": round(event.duration_us, 3), "z_score": round(sigma, 2)}
                for event, sigma in clusters.outliers()[:_LISTED_OUTLIERS]
            ],
        }
    }
    if compare:
        agreement = clusters.agreement
        answer["ml_compare"] = {
            "events": len(clusters.events),
            "silhouette_by_clusters": {str(count): round(value, 4) for count, value in clusters.tried.items()},
            "abnormal_by_both": agreement.both,
            "abnormal_by_clusters_alone": agreement.clusters_alone,
            "abnormal_by_z_score_alone": agreement.z_score_alone,
            "kappa": round(agreement.kappa, 4),
        }
    return answer


def separation(silhouette_score: float) -> str:
    """Return the word for a silhouette: good above 0.5, fair above 0.25, else poor.

    The bounds are those of Kaufman & Rousseeuw 1990, table 2.4 (their "strong" and "reasonable" are both good here, as
    the specification calls 0.72 good).
    """
    if silhouette_score > 0.5:
        return "good separation"
    return "fair separation" if silhouette_score > 0.25 else "poor separation"


def report(analysis: dict[str, Any]) -> str:
    """Return appendix A's lines from the object of section 4.4.

    Raises: FormatError for a missing field.
    """
    found = checked(analysis)
    slowest, outliers = found["high_latency_cluster"], found["outliers"]
    score = found["silhouette_score"]
    lines = [
        "=== ML Anomaly Analysis ===",
        f"Clusters: {found['clusters']}",
        f"Silhouette Score: {score:.2f} ({separation(score)})",
        f"High-latency cluster: {slowest['count']} syscalls ({', '.join(slowest['syscalls'])}),"
        f" {slowest['avg_latency_us']:,.0f} µs on average",
        f"Outliers: {len(outliers)} extreme syscalls (>{OUTLIER_SIGMA:g}σ)",
    ]
    lines += [f"  {row['syscall']} took {row['latency_us']:,.0f} µs ({row['z_score']:.1f}σ)" for row in outliers[:5]]
    if "ml_compare" in analysis:
        other = analysis["ml_compare"]
        lines.append(
            f"Against the z-score (>{ALARM_SIGMA:g}σ): {other['abnormal_by_both']} abnormal by both, "
            f"{other['abnormal_by_clusters_alone']} by clusters alone, {other['abnormal_by_z_score_alone']} by z-score "
            f"alone (kappa {other['kappa']:.2f})"
        )
    return "\n".join(lines)
