"""The detector finds what is slow, and only that."""

import math
import random
import re

import pytest

from entrenar.errors import ConfigError
from entrenar.trace.anomaly import (
    CALLS,
    MAX_KEYS,
    RECENT,
    STEPS,
    WARM_UP,
    Detector,
    Event,
    Sensitivity,
    event_of_call,
    event_of_span,
    file_class,
    severity_of,
)  # fmt: skip
from entrenar.trace.anomaly_report import Quiet, as_json, line, report
from entrenar.trace.records import Anomaly, Frame, Span, SystemCall


def read_of(duration_us: float, index: int = 0, **more) -> Event:
    return Event("read", round(duration_us * 1e3), at_ns=index * 1_000_000, **more)


def clean(count: int, seed: int = 0, center_us: float = 100.0) -> list[Event]:
    """Log-normal durations, a fifth of their size wide, as reads of a warm file have."""
    generator = random.Random(seed)
    return [read_of(center_us * math.exp(generator.gauss(0, 0.2)), index) for index in range(count)]


def taught(sensitivity: Sensitivity = CALLS, **more) -> Detector:
    detector = Detector(sensitivity, **more)
    detector.see_all(clean(200))
    return detector


@pytest.mark.parametrize(
    ("sigma", "severity"), [(3.0, "low"), (4.0, "low"), (4.01, "medium"), (5.0, "medium"), (5.01, "high")]
)
def test_severities_are_the_specifications(sigma, severity):
    """Low up to 4, Medium up to 5, High above."""
    assert severity_of(sigma) == severity


def test_nothing_is_judged_before_the_warm_up_is_over():
    """The first events of a key raise nothing, however slow, and are counted as learned."""
    detector = Detector()
    found = detector.see_all([read_of(100.0)] * (WARM_UP - 1) + [read_of(1e6)])
    assert found == []
    assert (detector.learned, detector.judged) == (WARM_UP, 0)
    assert detector.see(read_of(1e5)) is not None


def test_a_clean_stream_raises_nothing():
    """Ten thousand ordinary events: no anomaly, no shift."""
    detector = Detector()
    assert detector.see_all(clean(10_000)) == []


def test_the_event_under_test_is_not_in_its_own_baseline():
    """A window of n that held the outlier could not put it beyond √(n-1) σ; this one does."""
    detector = Detector()
    detector.see_all(clean(WARM_UP + 1))
    found = detector.see(read_of(100 * math.exp(3.0)))
    assert found is not None
    assert found.sigma > math.sqrt(WARM_UP)
    assert found.severity == "high"


def test_a_burst_does_not_hide_itself():
    """Of forty slow events in a row each is found, as an anomaly or inside the shift that they are."""
    detector = taught()
    points = detector.see_all([read_of(5000, index) for index in range(40)])
    assert len(points) == RECENT // 2 + 1
    (shift,) = detector.shifts
    assert len(points) + shift.events - (RECENT // 2 + 1) == 40


def test_a_shift_is_one_finding_and_ends_when_the_old_level_is_back():
    """A new level that stays is reported once, with its length; so is nothing when it goes back."""
    detector = taught()
    slow = [read_of(700, index) for index in range(300)]
    found = detector.see_all(slow)
    assert [anomaly.kind for anomaly in found].count("shift") == 1
    assert len(found) <= RECENT // 2 + 1
    (shift,) = detector.shifts
    assert shift.ended_ns is None
    assert shift.events == 300
    assert shift.began.baseline_ns == pytest.approx(100_000, rel=0.1)
    assert shift.began.duration_ns == 700_000
    assert detector.see_all(clean(100, seed=1)) == []
    assert shift.ended_ns is not None
    assert shift.events == pytest.approx(300, abs=RECENT)


def test_a_rise_upon_a_rise_leaves_the_first_open():
    """Back from the second level to the first, the first shift still lasts; back at the start, none does."""
    detector = taught()

    def open_shifts() -> list[bool]:
        return [shift.ended_ns is None for shift in detector.shifts]

    detector.see_all([read_of(700, index) for index in range(300)])
    detector.see_all([read_of(9000, index) for index in range(100)])
    assert open_shifts() == [True, True]
    detector.see_all([read_of(720, index) for index in range(100)])
    assert open_shifts() == [True, False]
    detector.see_all(clean(100, seed=2))
    assert open_shifts() == [False, False]


def test_a_warm_cache_is_no_anomaly():
    """A key that starts slow and gets fast raises nothing, and soon judges against the fast level."""
    detector = Detector()
    assert detector.see_all([read_of(4000)] * 100 + [read_of(10)] * 40) == []
    assert detector.see(read_of(500)) is not None


def test_sizes_and_targets_have_baselines_of_their_own():
    """A read of a megabyte is not compared with one of a page, nor a corpus with a pipe."""
    detector = Detector()
    for _ in range(100):
        assert detector.see(read_of(10, size=4096, target=".bin")) is None
        assert detector.see(read_of(900, size=1 << 20, target=".bin")) is None
        assert detector.see(read_of(5000, size=4096, target="pipe")) is None
    assert detector.see(read_of(900, size=4096, target=".bin")) is not None


def test_each_guard_alone_keeps_quiet():
    """Far in σ is not enough: the event must also be a multiple of the median, and a stated time above it."""
    assert taught().see(read_of(250)) is None  # over 4 σ, below 3 times
    tiny = Detector()
    tiny.see_all(clean(200, center_us=1.0))
    assert tiny.see(read_of(150)) is None  # 150 times, yet less than 200 µs more
    assert tiny.see(read_of(250)) is not None
    assert taught(Sensitivity(ratio=2.0, excess_us=100)).see(read_of(250)) is not None


def test_time_on_the_run_queue_is_not_the_calls_own():
    """A call that waited for a processor is judged by the rest of its duration."""
    late = read_of(4100, waited_ns=4_000_000)
    assert taught().see(late) is None
    assert taught().see(read_of(4100)) is not None


def test_steps_have_their_own_measure():
    """Half as much again, and 2 ms, is news for a step and its phases; not for a system call or a layer."""
    for name, is_news in (("step 17", True), ("forward", True), ("attention_layer_0", False)):
        detector = Detector()
        spans = [Span(1, None, name, 1, 1, 0, round(30e6 * (1 + index % 3 / 100))) for index in range(100)]
        assert detector.see_all(event for span in spans if (event := event_of_span(span))) == []
        slow = event_of_span(Span(1, None, name, 1, 1, 0, 50_000_000))
        assert slow is not None
        found = detector.see(slow)
        assert (found is not None) == is_news
        assert found is None or found.severity == "high"
    assert Detector(Sensitivity(threshold=9.0))._phases.threshold == 9.0
    assert Detector()._phases.ratio == STEPS.ratio


def test_only_high_calls_the_alarm():
    """`on_high` gets each High anomaly and no other."""
    pulled: list[Anomaly] = []
    detector = Detector(Sensitivity(ratio=1.01, excess_us=1), on_high=pulled.append)
    detector.see_all(clean(2000))
    pulled.clear()
    detector.counts = dict.fromkeys(detector.counts, 0)
    detector.see_all([read_of(100 * math.exp(0.2 * sigma)) for sigma in (3.5, 4.5, 8.0)])
    assert detector.counts == {"low": 1, "medium": 1, "high": 1}
    assert [anomaly.severity for anomaly in pulled] == ["high"]


def test_memory_is_bounded():
    """Files without end share the baseline of their operation's name."""
    detector = Detector(keep=10)
    detector.see_all(read_of(10, target=f".{index}") for index in range(MAX_KEYS + 500))
    assert len(detector._keys) == MAX_KEYS + 1
    slow = [event for index in range(2000) for event in (read_of(10), read_of(900 if index % 3 == 0 else 10))]
    detector.see_all(slow)
    assert sum(detector.counts.values()) > 10
    assert len(detector.anomalies) == 10


def test_zscore_is_the_classic_with_the_event_left_out():
    """The method to compare with: mean and deviation of the last hundred, in raw time."""
    detector = Detector(method="zscore")
    detector.see_all([read_of(100 + index % 2) for index in range(100)])
    found = detector.see(read_of(1100))
    assert found is not None
    assert found.baseline_ns == pytest.approx(100_500, rel=1e-6)
    assert found.sigma == pytest.approx((1100 - 100.5) / 10.05, rel=1e-3)  # the floor of a tenth


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "anomaly threshold must be > 0, got 0.0"),
        ({"threshold": math.nan}, "anomaly threshold must be > 0, got nan"),
        ({"ratio": 1.0}, "anomaly ratio must be > 1, got 1.0"),
    ],
)
def test_a_senseless_sensitivity_is_refused(settings, message):
    """The rule and the value are named."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sensitivity(**settings)


def test_an_unknown_method_is_refused():
    """The methods there are are named."""
    with pytest.raises(ConfigError, match="must be one of robust, zscore, got 'magic'"):
        Detector(method="magic")


def test_calls_and_spans_become_events():
    """A call is known by name, kind of file, size and its innermost line; an unfinished one is left out."""
    frame = Frame("load", "/a/loader.py", 7)
    call = SystemCall("pread64", 1, 2, 30, 4000, 4096, None, 4096, "/data/train.bin", stack=(frame,), span=9)
    event = event_of_call(call)
    assert event is not None
    assert event.key == ("pread64", ".bin", 13)
    assert (event.frame, event.span, event.duration_ns) == (frame, 9, 4000)
    assert event_of_call(SystemCall("read", 1, 2, 30, None)) is None
    assert event_of_call(SystemCall("futex", 1, 2, 30, 10**9)) is None
    span = event_of_span(Span(9, None, "forward_pass", 1, 2, 100, 350))
    assert span is not None
    assert (span.operation, span.duration_ns) == ("forward_pass", 250)
    assert event_of_span(Span(9, None, "forward_pass", 1, 2, 100, None)) is None


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/d/a.bin", ".bin"), ("socket:[1]", "socket"), ("pipe:[2]", "pipe"), ("/dev/null", "device"),
     ("/proc/self/stat", "kernel"), ("/etc/passwd", "file"), ("/home/me/.bashrc", "file"), ("", ""),
     ("anon_inode:[eventfd]", "anonymous")],
)  # fmt: skip
def test_files_are_told_apart_by_kind(path, kind):
    """A descriptor's target is named by its kind, not by its path."""
    assert file_class(path) == kind


# ---- lines and reports ----


def an_anomaly(sigma: float, severity: str, **more) -> Anomaly:
    return Anomaly("read", "point", 0, 5_234_000, 102_300, sigma, severity, **more)


def test_the_line_is_the_specifications():
    """Both forms of the line, and the Python line after it where it is known."""
    medium = an_anomaly(4.2, "medium")
    assert line(medium) == "⚠️ ANOMALY: read took 5234 µs (4.2σ from baseline 102.3 µs) - 🟡 Medium"
    assert line(medium, short=True) == "⚠️ ANOMALY: read took 5234 µs (4.2σ) - 🟡 Medium"
    placed = an_anomaly(6.3, "high", frame=Frame("load", "/src/loader.py", 42))
    assert line(placed).endswith("- 🔴 High  [loader.py:42 in load]")


def test_the_report_is_the_specifications_and_adds_up():
    """Section 4.3's report, line by line, and the appendix's total."""
    detector = Detector()
    detector.counts = {"low": 12, "medium": 8, "high": 3}
    detector.judged, detector.learned = 4000, 320
    assert report(detector).splitlines() == [
        "=== Real-Time Anomaly Detection Report ===",
        "Total anomalies detected: 23",
        "Severity Distribution:",
        "  🔴 High (>5.0σ):   3 anomalies (likely hardware issues)",
        "  🟡 Medium (4-5σ):  8 anomalies (investigate)",
        "  🟢 Low (3-4σ):    12 anomalies (noise)",
        "Judged 4,000 events; 320 more taught it what is normal, the first 32 of each kind",
    ]
    assert "Total anomalies: 23 (3 High, 8 Medium, 12 Low)" in report(detector, short=True)


def test_bands_begin_at_the_threshold():
    """With a threshold of 4.5 there is no Low, and Medium begins there."""
    text = report(Detector(Sensitivity(threshold=4.5)))
    assert "Medium (4.5-5σ)" in text
    assert "Low" not in text
    assert "Medium" not in report(Detector(Sensitivity(threshold=6)))


def test_a_shift_has_its_line_and_its_place_in_the_report():
    """The levels, how long, and how many events."""
    detector = taught()
    found = detector.see_all([read_of(700, index) for index in range(300)])
    shift = next(anomaly for anomaly in found if anomaly.kind == "shift")
    assert re.fullmatch(r"⚠️ SHIFT: read went from [\d.]+ µs to 700.0 µs and stays there", line(shift))
    assert re.search(
        r"Level shift: read went from [\d.]+ µs to 700.0 µs until the end \(300 events\)", report(detector)
    )
    detector.see_all([read_of(100, 300 + index) for index in range(60)])
    assert re.search(r"to 700.0 µs for 0\.3\d\d s \(\d+ events\)", report(detector))


def test_json_holds_the_same_totals():
    """The JSON form adds up as the text does, with durations in µs."""
    detector = taught()
    detector.see(read_of(5000, frame=Frame("load", "loader.py", 3)))
    values = as_json(detector)
    assert values["total"] == sum(values["severity"].values()) == 1
    assert values["anomalies"][0]["duration_us"] == 5000.0
    assert values["anomalies"][0]["source"] == {"file": "loader.py", "line": 3, "function": "load"}
    assert (values["events_learned"], values["events_judged"]) == (WARM_UP, 201 - WARM_UP)


def test_a_flood_of_one_operation_is_a_line_a_second():
    """One line a second for each operation, with what was held back; a shift and a far worse one always pass."""
    quiet = Quiet()

    def at(seconds: float, operation: str = "read", kind: str = "point", ms: int = 5) -> str | None:
        return quiet.line(Anomaly(operation, kind, round(seconds * 1e9), ms * 1_000_000, 100_000, 6.0, "high"))

    assert [at(0.0) is None, at(0.5) is None, at(0.9) is None, at(0.9, "write") is None] == [False, True, True, False]
    assert at(0.95, kind="shift").startswith("⚠️ SHIFT: read")
    assert at(2.5).endswith("🔴 High")
    at(2.6)
    assert at(4.0).endswith("(and 1 of read since the last line)")
    assert at(4.1, ms=10) is None
    assert at(4.2, ms=11).endswith("(and 1 of read since the last line)")


@pytest.mark.parametrize("delay_us", [300, 1000, 5000])
def test_planted_delays_are_found_at_the_stated_rate_of_false_alarms(delay_us):
    """Of reads one in 300 takes ten times as long and one in 97 is delayed: 95 % found, below 4 false in 1,000."""
    generator = random.Random(delay_us)
    detector = Detector()
    found = injected = false = 0
    for index in range(20_000):
        duration_us = 15 * math.exp(generator.gauss(0, 0.35)) * (10 if generator.random() < 1 / 300 else 1)
        is_delayed = index > 500 and index % 97 == 0
        anomaly = detector.see(read_of(duration_us + delay_us * is_delayed, index))
        injected += is_delayed
        found += is_delayed and anomaly is not None
        false += not is_delayed and anomaly is not None
    assert found >= 0.95 * injected
    assert false <= 4e-3 * detector.judged
