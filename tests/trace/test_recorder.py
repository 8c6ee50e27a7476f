"""The recorder loses nothing: not at the end of a segment, not across threads, forks and kills."""

import os
import signal
import subprocess
import sys
import threading

from entrenar.trace.recorder import HEAD, Recorder
from entrenar.trace.spool import Spool


def test_spans_come_back_as_recorded(tmp_path):
    """Name, parent, times, status and attributes."""
    recorder = Recorder(tmp_path)
    outer = recorder.start(0, "step", 100)
    inner = recorder.start(outer, "größe", 150)
    recorder.mark(inner, "exception", "ValueError: x")
    recorder.end(inner, 180, status=2, attributes={"loss": 2.5})
    recorder.drop(outer, 200)
    events = Spool(tmp_path).drain()
    assert [event.kind for event in events] == ["start", "start", "mark", "end", "drop"]
    assert [(event.span, event.parent, event.at_ns, event.text) for event in events[:2]] == [
        (outer, None, 100, "step"), (inner, outer, 150, "größe"),
    ]  # fmt: skip
    assert (events[3].status, events[3].attributes, events[3].at_ns) == ("error", {"loss": 2.5}, 180)
    assert {event.pid for event in events} == {os.getpid()}
    assert {event.tid for event in events} == {threading.get_native_id()}


def test_segments_are_followed_and_deleted_once_read(tmp_path):
    """Records beyond a segment's end come in the next, in order, and at most one file stays."""
    recorder = Recorder(tmp_path, segment_bytes=HEAD.size * 6)
    spool = Spool(tmp_path)
    ids = [recorder.start(0, f"s{number}") for number in range(50)]
    assert len(list(tmp_path.iterdir())) > 5
    assert [event.span for event in spool.drain()] == ids
    assert len(list(tmp_path.iterdir())) == 1
    more = [recorder.start(0, f"s{number}") for number in range(50)]
    assert [event.span for event in spool.drain()] == more
    assert spool.drain() == []


def test_a_recorder_that_nobody_reads_stops_at_its_share_of_the_disk(tmp_path):
    """The folder stays bounded, and what is lost is counted; when somebody reads, recording goes on."""
    recorder = Recorder(tmp_path, segment_bytes=HEAD.size * 6, max_segments=3)
    for number in range(100):
        recorder.start(0, f"s{number}")
    assert len(list(tmp_path.iterdir())) <= 3
    assert recorder.dropped > 50
    spool = Spool(tmp_path)
    spool.drain()
    recorder.start(0, "again")
    assert [event.text for event in spool.drain()] == ["again"]


def test_a_record_larger_than_a_segment_is_dropped_alone(tmp_path):
    """One attribute of a megabyte does not end the recording."""
    recorder = Recorder(tmp_path, segment_bytes=1000)
    span = recorder.start(0, "a")
    recorder.end(span, attributes={"x": "y" * 5000})
    after = recorder.start(0, "b")
    assert [event.span for event in Spool(tmp_path).drain()] == [span, after]
    assert recorder.dropped == 1


def test_threads_do_not_tear_each_others_records(tmp_path):
    """All spans of eight threads come back whole, with their thread."""
    recorder = Recorder(tmp_path, segment_bytes=4096, max_segments=10_000)

    def work(number):
        for at in range(500):
            recorder.end(recorder.start(0, f"{number}-{at}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts = [event for event in Spool(tmp_path).drain() if event.kind == "start"]
    assert {event.text for event in starts} == {f"{number}-{at}" for number in range(8) for at in range(500)}
    assert len({(event.text.split("-")[0], event.tid) for event in starts}) == 8


def test_a_forked_child_records_for_itself(tmp_path):
    """The child has its own file and its own ids."""
    recorder = Recorder(tmp_path)
    recorder.start(0, "parent")
    pid = os.fork()
    if pid == 0:
        recorder.start(0, "child")
        os._exit(0)
    os.waitpid(pid, 0)
    events = Spool(tmp_path).drain()
    assert {(event.text, event.pid) for event in events} == {("parent", os.getpid()), ("child", pid)}
    assert len({event.span for event in events}) == 2


def test_a_killed_process_loses_no_span(tmp_path):
    """What was recorded before a SIGKILL is there."""
    code = (
        "import os, signal, sys; from pathlib import Path; from entrenar.trace.recorder import Recorder\n"
        "recorder = Recorder(Path(sys.argv[1]))\n"
        "for number in range(1000): recorder.start(0, str(number))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert [event.text for event in Spool(tmp_path).drain()] == [str(number) for number in range(1000)]


def test_a_folder_that_is_gone_costs_spans_and_nothing_else(tmp_path):
    """The program does not notice."""
    folder = tmp_path / "spool"
    folder.mkdir()
    recorder = Recorder(folder, segment_bytes=HEAD.size * 4)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    for _ in range(50):
        recorder.end(recorder.start(0, "x"))
    assert recorder.dropped > 0
