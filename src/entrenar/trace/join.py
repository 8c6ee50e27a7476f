"""Give every system call the span that was active on its thread when it was made.

The tracer and the program read the same clock, and a thread is stopped while the tracer looks at its call, so that all
that the thread recorded before is there to be read: a walk along the times of one thread is exact. A call waits until
it is older than the shortest span that is kept, because a shorter one is dropped when it ends and its calls are its
parent's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from entrenar.trace.records import Mark, Span, SystemCall
from entrenar.trace.spool import SpanEvent


@dataclass
class Joined:
    """The result of a batch. `span_names` are the names of the spans of `calls`; `opened` may be replaced later."""

    calls: list[SystemCall] = field(default_factory=list)
    span_names: list[str | None] = field(default_factory=list)
    ended: list[Span] = field(default_factory=list)
    opened: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


class Join:
    """Spans and calls of all threads, joined so far."""

    def __init__(self) -> None:
        self._open: dict[int, Span] = {}
        self._stacks: dict[int, list[Span]] = {}
        self._dependent: set[int] = set()
        self._waiting: list[SystemCall] = []
        # Spans that ended within reach of a call that still waits, and dropped ones, by thread.
        self._events: dict[int, list[SpanEvent]] = {}

    def take(self, events: Sequence[SpanEvent], calls: Sequence[SystemCall], until_ns: int | None) -> Joined:
        """Join calls that began before `until_ns` (all, if it is None) with the spans; later ones wait."""
        joined = Joined()
        for event in events:
            self._events.setdefault(event.tid, []).append(event)
        ready = [call for call in (*self._waiting, *calls) if until_ns is None or call.start_ns < until_ns]
        self._waiting = [
            call for call in (*self._waiting, *calls) if until_ns is not None and call.start_ns >= until_ns
        ]
        by_thread: dict[int, list[SystemCall]] = {}
        for call in ready:
            by_thread.setdefault(call.tid, []).append(call)
        for tid in by_thread.keys() | self._events.keys():
            self._walk(tid, sorted(by_thread.get(tid, ()), key=lambda call: call.start_ns), until_ns, joined)
        # A span may end in the batch that it began in.
        joined.opened = [span for span in joined.opened if span.id in self._open]
        return joined

    def active(self, tid: int) -> Span | None:
        """Return the innermost span that is open on a thread."""
        stack = self._stacks.get(tid)
        return stack[-1] if stack else None

    def open_spans(self) -> list[Span]:
        """Return all spans that have not ended, outermost first."""
        return sorted(self._open.values(), key=lambda span: span.start_ns)

    def _walk(self, tid: int, calls: list[SystemCall], until_ns: int | None, joined: Joined) -> None:
        events = sorted(self._events.pop(tid, ()), key=lambda event: event.at_ns)
        dropped = {event.span for event in events if event.kind == "drop"}
        at = 0
        for call in calls:
            while at < len(events) and events[at].at_ns <= call.start_ns:
                self._apply(events[at], dropped, joined)
                at += 1
            span = self.active(tid)
            joined.calls.append(call if span is None else replace(call, span=span.id))
            joined.span_names.append(span.name if span else None)
        while at < len(events) and (until_ns is None or events[at].at_ns < until_ns):
            self._apply(events[at], dropped, joined)
            at += 1
        if events[at:]:
            self._events[tid] = events[at:]

    def _apply(self, event: SpanEvent, dropped: set[int], joined: Joined) -> None:
        if event.kind == "start":
            span = Span(
                event.span, event.parent, event.text, event.pid, event.tid, event.at_ns, None, "unset", event.attributes
            )
            self._open[span.id] = span
            if event.ends_with_parent:
                self._dependent.add(span.id)
            if span.id not in dropped:
                self._stacks.setdefault(event.tid, []).append(span)
                joined.opened.append(span)
        elif event.kind == "mark":
            kind, _, text = event.text.partition("\0")
            joined.marks.append(Mark(kind, text, event.at_ns, event.pid, event.tid, event.span or None))
        else:
            self._close(event, joined)

    def _close(self, event: SpanEvent, joined: Joined) -> None:
        span = self._open.pop(event.span, None)
        if span is None:
            return
        # A span may end on another thread than it began on.
        stack = self._stacks.get(span.tid, [])
        if span in stack:
            at = stack.index(span)
            for inner in [inner for inner in stack[at + 1 :] if inner.id in self._dependent]:
                self._close(replace(event, span=inner.id, status="unset", attributes={}), joined)
            stack.remove(span)
        self._dependent.discard(span.id)
        if event.kind == "end":
            joined.ended.append(
                replace(
                    span, end_ns=event.at_ns, status=event.status, attributes={**span.attributes, **event.attributes}
                )
            )
