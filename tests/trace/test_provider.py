"""A program that calls the OpenTelemetry API is recorded as it says, and notices nothing."""

import pytest
from opentelemetry import trace as api

from entrenar.trace import launch, provider
from entrenar.trace.recorder import Recorder
from entrenar.trace.spool import Spool

WANTS = {"trace_id": 0xABC << 64, "parent": 0xDEF}


def recorded(tmp_path, use):
    wants = launch.Wants(tmp_path, **WANTS)
    use(provider.Provider(Recorder(tmp_path), wants).get_tracer("test"))
    return Spool(tmp_path).drain()


def test_nested_spans_have_their_parents_and_attributes(tmp_path):
    """The outermost span's parent is the one that TRACEPARENT named."""

    def use(tracer):
        with tracer.start_as_current_span("step", attributes={"step": 3}) as span:
            assert api.get_current_span() is span
            assert span.get_span_context().trace_id == WANTS["trace_id"]
            with tracer.start_as_current_span("forward"):
                pass
            span.set_attribute("loss", 2.5)
        assert not span.is_recording()
        span.end()  # a second end is no second record

    events = recorded(tmp_path, use)
    assert [(event.kind, event.text) for event in events] == [
        ("start", "step"), ("start", "forward"), ("end", ""), ("end", ""),
    ]  # fmt: skip
    assert events[0].parent == WANTS["parent"]
    assert events[1].parent == events[0].span
    assert (events[0].attributes, events[3].attributes) == ({"step": 3}, {"loss": 2.5})


def test_an_exception_goes_through_and_marks_the_span(tmp_path):
    """The span's status is error, its text is kept."""

    def use(tracer):
        with pytest.raises(ValueError, match="no"), tracer.start_as_current_span("step"):
            raise ValueError("no")

    events = recorded(tmp_path, use)
    assert [event.kind for event in events] == ["start", "mark", "end"]
    assert events[1].text == "exception\0ValueError: no"
    assert events[2].status == "error"
    assert events[2].attributes == {"error.message": "ValueError: no"}


def test_events_links_status_and_times_of_the_api(tmp_path):
    """The rest of the API's span."""
    other = api.SpanContext(1, 2, is_remote=True)

    def use(tracer):
        span = tracer.start_span("a", links=[api.Link(other)])
        span.add_event("saved", {"step": 1})
        span.update_name("b")
        span.set_status(api.StatusCode.OK)
        span.end()

    events = recorded(tmp_path, use)
    assert events[1].text == "saved\0step=1"
    assert events[2].status == "ok"
    assert events[2].attributes == {"links": [["0" * 31 + "1", "0" * 15 + "2"]], "name": "b"}


def test_a_start_time_of_the_calendar_is_turned_into_ours(tmp_path, monkeypatch):
    """Explicit times are Unix time in the API, monotonic in the recorder."""
    monkeypatch.setattr(provider.time, "time_ns", lambda: 1_000)
    monkeypatch.setattr(provider.time, "monotonic_ns", lambda: 50)
    events = recorded(tmp_path, lambda tracer: tracer.start_span("a", start_time=990).end(995))
    assert [event.at_ns for event in events] == [40, 45]


def test_without_a_tracer_nothing_is_recorded(tmp_path, monkeypatch):
    """No folder, or one that cannot be written, gives the API's own no-op."""
    monkeypatch.delenv(launch.SPOOL, raising=False)
    assert isinstance(provider.from_environment(), api.NoOpTracerProvider)
    environment = launch.environment({}, tmp_path / "python", launch.Wants(tmp_path, **WANTS))
    monkeypatch.setenv(launch.SPOOL, environment[launch.SPOOL])
    assert isinstance(provider.from_environment(), provider.Provider)
    monkeypatch.setattr(provider, "Recorder", lambda _: (_ for _ in ()).throw(OSError("full")))
    assert isinstance(provider.from_environment(), api.NoOpTracerProvider)
