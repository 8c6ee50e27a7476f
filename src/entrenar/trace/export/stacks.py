"""Where time went as stacks: folded for flamegraph.pl, speedscope's JSON, and pprof's protobuf.

A stack is the Python functions around a system call and the call itself, weighted by time; and, for spans, the spans
around one another, weighted by the own time of each.
"""

import gzip
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from entrenar.trace.hot_paths import IDLE, described
from entrenar.trace.reader import Reader

Stack = tuple[str, ...]
_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def call_stacks(reader: Reader) -> dict[Stack, tuple[int, int]]:
    """Return (nanoseconds, calls) of each stack of functions that ends in a system call, outermost first."""
    stacks: dict[Stack, list[int]] = defaultdict(lambda: [0, 0])
    for tally in reader.tallies():
        if tally.span_name == IDLE:
            continue
        functions = tuple(described(frame) for frame in reversed(tally.stack))
        total = stacks[(*functions, f"syscall: {tally.name}")]
        total[0] += tally.total_ns
        total[1] += tally.calls
    return {stack: (ns, calls) for stack, (ns, calls) in stacks.items()}


def span_stacks(reader: Reader) -> dict[Stack, tuple[int, int]]:
    """Return (own nanoseconds, count) of each nesting of spans, outermost first; what never ended is left out."""
    spans = {span.id: span for span in reader.spans() if span.duration_ns is not None}
    stacks: dict[Stack, list[int]] = defaultdict(lambda: [0, 0])
    paths: dict[int, Stack] = {}
    for span in spans.values():  # parents begin before their children
        path = (*paths.get(span.parent or 0, ()), span.name)
        paths[span.id] = path
        stacks[path][0] += span.duration_ns or 0
        stacks[path][1] += 1
        parent = spans.get(span.parent or 0)
        # A child on another thread does not take its parent's time.
        if parent is not None and parent.tid == span.tid:
            stacks[path[:-1]][0] -= span.duration_ns or 0
    return {path: (max(ns, 0), count) for path, (ns, count) in stacks.items()}


def flamegraph(reader: Reader) -> Iterator[str]:
    """Yield lines of folded stacks: frames with semicolons, then microseconds."""
    for stack, (ns, _) in sorted({**span_stacks(reader), **call_stacks(reader)}.items()):
        if ns >= 1000:
            yield ";".join(frame.replace(";", ",") for frame in stack) + f" {ns // 1000}\n"


def speedscope(reader: Reader) -> dict[str, Any]:
    """Return speedscope's file format: one profile of the system calls, one of the spans, in microseconds."""
    numbers: dict[str, int] = {}
    profiles = []
    for name, stacks in (("system calls by function", call_stacks(reader)), ("spans", span_stacks(reader))):
        if not stacks:
            continue
        samples = [[numbers.setdefault(frame, len(numbers)) for frame in stack] for stack in stacks]
        weights = [ns / 1e3 for ns, _ in stacks.values()]
        profiles.append({
            "type": "sampled", "name": name, "unit": "microseconds", "startValue": 0, "endValue": sum(weights),
            "samples": samples, "weights": weights,
        })  # fmt: skip
    return {
        "$schema": _SCHEMA,
        "exporter": "entrenar trace",
        "name": " ".join(reader.info().command),
        "shared": {"frames": [{"name": frame} for frame in numbers]},
        "profiles": profiles,
    }


def pprof(reader: Reader) -> bytes:
    """Return a gzipped pprof profile (github.com/google/pprof/proto/profile.proto) of the system calls.

    The message is small enough to be written field by field: there is no kept Python library for it.
    """
    strings: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str], int] = {}
    locations: dict[tuple[int, int], int] = {}
    out = bytearray()

    def text(value: str) -> int:
        return strings.setdefault(value, len(strings))

    def location(function: str, file: str, line: int) -> int:
        number = functions.setdefault((function, file), len(functions) + 1)
        return locations.setdefault((number, line), len(locations) + 1)

    for kind, unit in (("syscalls", "count"), ("time", "nanoseconds")):
        out += _message(1, _number(1, text(kind)) + _number(2, text(unit)))
    for tally in reader.tallies():
        ids = [location(f"syscall: {tally.name}", "", 0)]
        ids += [location(frame.function, frame.file, frame.line) for frame in tally.stack]
        sample = _message(1, b"".join(map(_varint, ids)))
        sample += _message(2, _varint(tally.calls) + _varint(tally.total_ns))
        out += _message(2, sample)
    for (function, line), number in locations.items():
        out += _message(4, _number(1, number) + _message(4, _number(1, function) + _number(2, line)))
    for (name, file), number in functions.items():
        out += _message(5, _number(1, number) + _number(2, text(name)) + _number(4, text(file)))
    for value in strings:
        out += _message(6, value.encode())
    info = reader.info()
    out += _number(9, info.started_ns + info.unix_offset_ns)
    out += _number(10, (info.ended_ns or info.started_ns) - info.started_ns)
    return gzip.compress(bytes(out), mtime=0)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body
