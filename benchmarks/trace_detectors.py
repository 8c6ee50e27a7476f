"""How well the detectors and the clusters of a trace do, on faults whose truth is known.

    python benchmarks/trace_detectors.py injected           delays that strace puts into a loop of reads and writes
    python benchmarks/trace_detectors.py clean [--seconds]  the same loop with nothing injected: the false alarms
    python benchmarks/trace_detectors.py clusters           planted modes: adjusted Rand index, silhouette
    python benchmarks/trace_detectors.py diff               two traces of the same program: how often a change is told
    python benchmarks/trace_detectors.py cost               µs an event

`injected`: strace delays chosen calls and marks each as DELAYED, which is the truth; its own durations are what the
detector sees. A delayed call counts as found if the detector named it or if it lies inside a level shift that the
detector reported. Calls in the warm-up of their key are not counted, as no detector could know them.

`clean`: durations are taken in the process, and around each call the kernel's own count of the time that the thread
waited for a processor (schedstat), so that a call that really was slow, because a neighbour had the processor, can be
told from one that was not.

`diff`: spans of steps whose noise is drawn with a stated deviation and autocorrelation, in two runs of one program and
in two where one phase is slower by a stated ratio.
"""

import argparse
import collections
import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import turns

from entrenar.trace.anomaly import Detector, Event, file_class

# name: strace's injection, and what it is meant to be like
FAULTS = {
    "clean": None,
    "read +300 µs": "pread64:delay_enter=300:when=501+197",
    "read +1 ms": "pread64:delay_enter=1000:when=501+197",
    "read +5 ms": "pread64:delay_enter=5000:when=501+197",
    "burst of 40 reads, +2 ms": "pread64:delay_enter=2000:when=5001..5040",
    "log write +20 ms": "write:delay_enter=20000:when=101+37",
    "reads +500 µs from 5,001 on": "pread64:delay_enter=500:when=5001+",
}
LINE = re.compile(
    r"^(?:\[pid +\d+\] )?(?:\d+ +)?(?P<at>\d+\.\d+) (?P<name>\w+)\((?P<fd>\d+)<(?P<path>[^>]*)>.* = (?P<result>-?\d+)"
    r"(?P<delayed> \(DELAYED\))? <(?P<seconds>[\d.]+)>$"
)


def loop(folder: str, steps: int) -> None:
    """A loop like that of training: eight reads of a batch, arithmetic, a line of log, a checkpoint now and then."""
    import numpy

    corpus, log, saved = _files(folder)
    matrix = numpy.ones((160, 160), dtype=numpy.float32)
    for step in range(steps):
        for index in range(8):
            size = 4096 << (index % 3)
            os.pread(corpus, size, (step * 8 + index) * 7919 * 16 % (1 << 23))
        matrix @ matrix
        os.write(log, b"step %d loss 3.14159\n" % step)
        if step % 200 == 199:
            os.write(saved, bytes(1 << 20))
            os.fsync(saved)


def _files(folder: str) -> tuple[int, int, int]:
    corpus = Path(folder) / "corpus.bin"
    if not corpus.exists():
        corpus.write_bytes(os.urandom(1 << 24))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return (
        os.open(corpus, os.O_RDONLY),
        os.open(Path(folder) / "log.jsonl", flags),
        os.open(Path(folder) / "model.safetensors", flags),
    )


def traced(folder: str, fault: str | None, steps: int) -> list[tuple[Event, bool]]:
    """Run the loop under strace; return its calls on files of the folder, and whether each was delayed."""
    trace = Path(folder) / "strace.txt"
    command = ["strace", "-f", "-ttt", "-T", "-y", "-s", "0", "-o", str(trace), "-e", "trace=pread64,write,fsync"]
    if fault is not None:
        # -P: only calls on these files are counted and delayed, not what the interpreter reads as it starts.
        command += ["-e", f"inject={fault}"]
    for name in ("corpus.bin", "log.jsonl", "model.safetensors"):
        command += ["-P", str(Path(folder) / name)]
    worker = [sys.executable, __file__, "loop", "--folder", folder, "--steps", str(steps)]
    subprocess.run([*command, *worker], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events = []
    for text in trace.read_text().splitlines():
        match = LINE.match(text)
        if match is None or not match["path"].startswith(folder):
            continue
        event = Event(
            match["name"], round(float(match["seconds"]) * 1e9), round(float(match["at"]) * 1e9),
            file_class(match["path"]), max(int(match["result"]), 0),
        )  # fmt: skip
        events.append((event, match["delayed"] is not None))
    return events


def score(events: list[tuple[Event, bool]], detector: Detector) -> dict[str, Any]:
    """Hold what a detector finds against what was injected."""
    tally: collections.Counter[str] = collections.Counter()
    for event, delayed in events:
        learned = detector.learned
        found = detector.see(event)
        if detector.learned > learned:
            tally["in warm-up"] += delayed
            continue
        point = found is not None and found.kind == "point"
        in_shift = bool(detector._keys[event.key].level.open)
        tally["injected"] += delayed
        tally["named"] += delayed and point
        tally["found"] += delayed and (point or found is not None or in_shift)
        tally["alarms"] += point
        tally["false"] += point and not delayed
        tally["false high"] += point and not delayed and found.severity == "high"
    judged = detector.judged
    return {
        "events_judged": judged,
        "injected": tally["injected"],
        "recall": tally["found"] / tally["injected"] if tally["injected"] else None,
        "recall_named_alone": tally["named"] / tally["injected"] if tally["injected"] else None,
        "precision": tally["named"] / tally["alarms"] if tally["alarms"] else None,
        "false_alarms_per_1000": 1000 * tally["false"] / judged,
        "false_high_per_1000": 1000 * tally["false high"] / judged,
        "shifts": len(detector.shifts),
    }


def injected(steps: int, rounds: int) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name, fault in FAULTS.items():
                events = traced(folder, fault, steps)
                for method in ("robust", "zscore"):
                    load = round(os.getloadavg()[0], 1)
                    row = {"round": number, "fault": name, "method": method, "load_average": load} | score(
                        events, Detector(method=method)
                    )
                    print(row, file=sys.stderr, flush=True)
                    rows.append(row)
    return {"steps": steps, "rows": rows}


def clean(seconds: float, pause_s: float) -> dict[str, Any]:
    """Time the loop's calls in the process; judge them as they are, and without the time on the run queue."""
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        corpus, log, saved = _files(folder)
        matrix = numpy.ones((160, 160), dtype=numpy.float32)
        watch = Watch()
        ends = time.monotonic() + seconds
        step = 0
        while time.monotonic() < ends:
            for index in range(8):
                size = 4096 << (index % 3)
                watch.call("pread64", ".bin", size, os.pread, corpus, size, (step * 8 + index) * 126704 % (1 << 23))
            watch.call("compute: matmul", "", matrix.size, numpy.matmul, matrix, matrix)
            watch.call("write", ".jsonl", 20, os.write, log, b"step 0000 loss 3.14159\n")
            if step % 200 == 199:
                watch.call("fsync", ".safetensors", 0, os.fsync, saved)
            step += 1
            time.sleep(pause_s)
        return {"seconds": seconds, "steps": step, "pause_s": pause_s} | watch.summary(seconds)


class Watch:
    """Times calls, and what the kernel says of each thread's wait for a processor; runs both detectors as it goes."""

    def __init__(self) -> None:
        self.schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self.plain = Detector()
        self.net = Detector()
        self.explained: collections.Counter[str] = collections.Counter()
        self.alarms: list[dict[str, Any]] = []

    def waited_ns(self) -> int:
        """Return how long this thread has waited for a processor so far."""
        return int(os.pread(self.schedstat, 64, 0).split()[1])

    def call(self, name: str, target: str, size: int, function: Any, *arguments: Any) -> None:
        """Time one call and judge it."""
        waited = self.waited_ns()
        started = time.monotonic_ns()
        function(*arguments)
        duration = time.monotonic_ns() - started
        waited = min(self.waited_ns() - waited, duration)
        found = self.plain.see(Event(name, duration, started, target, size))
        self.net.see(Event(name, duration, started, target, size, waited_ns=waited))
        if found is not None and found.kind == "point":
            explained = waited >= 0.5 * (duration - found.baseline_ns)
            self.explained[found.severity] += explained
            self.alarms.append(
                {"name": name, "us": duration / 1e3, "waited_us": waited / 1e3, "sigma": round(found.sigma, 1)}
            )

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return the rates of alarms."""
        answer: dict[str, Any] = {"events_judged": self.plain.judged}
        for name, detector in (("as timed", self.plain), ("without run-queue wait", self.net)):
            total = sum(detector.counts.values())
            answer[name] = {
                "alarms": total,
                "severity": detector.counts,
                "alarms_per_1000": 1000 * total / detector.judged,
                "high_per_1000": 1000 * detector.counts["high"] / detector.judged,
                "high_per_minute": 60 * detector.counts["high"] / seconds,
                "shifts": len(detector.shifts),
            }
        answer["as timed"]["of_these_explained_by_run_queue_wait"] = dict(self.explained)
        answer["alarms"] = self.alarms[:2000]
        return answer


def clustered(rounds: int) -> dict[str, Any]:
    """Plant modes of known centers, a quarter wide in log duration; hold the clusters against the truth."""
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    from entrenar.trace import clusters

    cases = {
        "3 modes (10, 200, 5000 µs), sizes that say nothing": ([(10, 2400), (200, 450), (5000, 150)], None),
        "5 modes (5, 30, 200, 1500, 20000 µs)": (
            [(5, 900), (30, 900), (200, 600), (1500, 450), (20_000, 150)], [4096] * 5,
        ),
        "2 modes that touch (10, 35 µs)": ([(10, 1800), (35, 1200)], [4096] * 2),
        "3 modes that touch (20, 40, 80 µs), sizes that go with them": (
            [(20, 1500), (40, 900), (80, 600)], [4096, 1 << 16, 1 << 20],
        ),
    }  # fmt: skip
    rows = []
    for name, (modes, sizes) in cases.items():
        for seed in range(rounds):
            events, truth = planted(modes, sizes, seed)
            for told in (len(modes), None):
                found = clusters.cluster(events, told)
                features = [clusters._feature(event) for event in events]
                own = silhouette_score(features, found.labels, sample_size=clusters.SILHOUETTE_SAMPLE, random_state=0)
                row = {
                    "case": name, "seed": seed, "told": told, "clusters": found.count,
                    "adjusted_rand_index": adjusted_rand_score(truth, found.labels), "silhouette": found.silhouette,
                    "difference_from_scikit_learn": abs(found.silhouette - own),
                }  # fmt: skip
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    return {"rows": rows, "worst_adjusted_rand_index": min(row["adjusted_rand_index"] for row in rows)}


def planted(modes: Any, sizes: Any, seed: int) -> tuple[list[Any], list[int]]:
    """Draw events around the centers of modes, and return them with the mode of each."""
    import math
    import random

    from entrenar.trace.clusters import Timed

    generator = random.Random(seed)  # noqa: S311 - durations, not secrets
    events, truth = [], []
    for mode, (center_us, count) in enumerate(modes):
        for _ in range(count):
            size = 1 << generator.randrange(9, 20) if sizes is None else sizes[mode]
            events.append(Timed("read", center_us * math.exp(generator.gauss(0, 0.25)), size))
            truth.append(mode)
    return events, truth


def differences(rounds: int) -> dict[str, Any]:
    """Compare traces that were written by hand: one program twice, and one whose backward is slower."""
    rows = []
    noises = ((0.05, 0.0), (0.05, 0.7), (0.15, 0.7), (0.15, 0.9))
    with tempfile.TemporaryDirectory() as folder:
        for (deviation, correlation), ratio in itertools.product(noises, (1.0, 1.1, 1.3)):
            found = [changed(Path(folder), ratio, deviation, correlation, number) for number in range(rounds)]
            expected = {"backward", "step"} if ratio > 1 else set()
            row = {
                "deviation": deviation, "autocorrelation": correlation, "ratio": ratio, "runs": rounds,
                "backward_told": sum("backward" in names for names in found) / rounds,
                "something_else_told": sum(bool(names - expected) for names in found) / rounds,
            }  # fmt: skip
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return {"steps": 200, "rows": rows}


def changed(folder: Path, ratio: float, deviation: float, correlation: float, number: int) -> set[str]:
    """Write two traces, the second with a slower backward, and return which spans the comparison names."""
    from entrenar.trace.compare import compare
    from entrenar.trace.reader import Reader

    paths = [folder / f"{which}.sqlite" for which in ("before", "after")]
    for path, slower, seed in ((paths[0], 1.0, 2 * number), (paths[1], ratio, 2 * number + 1)):
        write_steps(path, slower, deviation, correlation, seed)
    with Reader(paths[0]) as before, Reader(paths[1]) as after:
        return {change.name for change in compare(before, after).changes}


def write_steps(path: Path, slower: float, deviation: float, correlation: float, seed: int) -> None:
    """Write 200 steps of four phases; noise of one step carries over to the next by `correlation`."""
    import random

    from entrenar.trace.records import Span, TraceInfo
    from entrenar.trace.store import Writer

    generator = random.Random(seed)  # noqa: S311 - durations, not secrets
    writer = Writer(path)
    spans, now, number, noise = [], 0, 1, 0.0
    for step in range(200):
        noise = correlation * noise + generator.gauss(0, deviation * (1 - correlation**2) ** 0.5)
        started, parent = now, number
        number += 1
        for name, ms in (("data", 2.0), ("forward", 20.0), ("backward", 40.0 * slower), ("optimizer", 5.0)):
            end = now + round(1e6 * ms * max(0.2, 1 + noise + generator.gauss(0, deviation / 2)))
            spans.append(Span(number, parent, name, 1, 1, now, end))
            now, number = end, number + 1
        spans.append(Span(parent, None, f"step {step}", 1, 1, started, now))
    writer.add_info(TraceInfo(("train",), 1, 0, 0, "none", ended_ns=now))
    writer.add_spans(spans)
    writer.close()


def cost(events: int) -> dict[str, Any]:
    """Time `see` alone, on ordinary events."""
    import random

    generator = random.Random(0)  # noqa: S311 - durations, not secrets
    stream = [
        Event("pread64", round(1e4 * generator.lognormvariate(0, 0.3)), index, ".bin", 4096) for index in range(events)
    ]
    rows = {}
    for method in ("robust", "zscore"):
        detector = Detector(method=method)
        started = time.process_time()
        detector.see_all(stream)
        rows[method] = 1e6 * (time.process_time() - started) / events
    return {"events": events, "us_per_event": rows}


def main() -> None:
    """Measure one part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["injected", "clean", "clusters", "diff", "cost", "loop"])
    parser.add_argument("--folder")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--pause-s", type=float, default=0.01)
    chosen = parser.parse_args()
    if chosen.part == "loop":
        loop(chosen.folder, chosen.steps)
        return
    if chosen.part == "injected":
        with contextlib.suppress(PermissionError):
            os.nice(-15)  # a neighbor's time slice in the middle of a call is not the detector's fault
    parts = {
        "injected": lambda: injected(chosen.steps, chosen.rounds),
        "clean": lambda: clean(chosen.seconds, chosen.pause_s),
        "clusters": lambda: clustered(5),
        "diff": lambda: differences(40),
        "cost": lambda: cost(200_000),
    }
    turns.write_result(f"trace_{chosen.part}", turns.machine() | parts[chosen.part]())


if __name__ == "__main__":
    main()
