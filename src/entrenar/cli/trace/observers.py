"""Those who watch a trace while it is made, for the terminal: lines of calls, lines of anomalies."""

import sys
from collections.abc import Sequence

from entrenar.trace import alarm, anomaly_report, report_text
from entrenar.trace.anomaly import Detector, Sensitivity, event_of_call, event_of_span
from entrenar.trace.hot_paths import is_library
from entrenar.trace.join import Joined
from entrenar.trace.records import Anomaly, SystemCall


class CallLines:
    """Prints calls as they come: those of the program's own code, each with its line, or all if none is asked for."""

    def __init__(self, *, with_source: bool, with_time: bool) -> None:
        self._with_source, self._with_time = with_source, with_time

    def __call__(self, batch: Joined) -> Sequence[Anomaly]:
        """Print what came."""
        for call in batch.calls:
            if not self._with_source or _is_own(call):
                line = report_text.call_line(call, with_source=self._with_source, with_time=self._with_time)
                print(line, file=sys.stderr)
        return ()


def _is_own(call: SystemCall) -> bool:
    """Return whether the program's own code made a call, other than by an import."""
    is_import = bool(call.stack) and call.stack[0].file.startswith("<frozen importlib")
    return not is_import and any(not is_library(frame) for frame in call.stack)


class AnomalyLines:
    """Judges calls and spans as they end, prints what is slow, and pulls the alarm."""

    def __init__(self, sensitivity: Sensitivity, method: str, on_high: str | None) -> None:
        self._pid = 0
        action = None
        if on_high is not None:
            action = alarm.Alarm(self._stop if on_high == "stop" else alarm.run_command(on_high))
        self._quiet = anomaly_report.Quiet()
        self.detector = Detector(sensitivity, method=method, on_high=action)

    def __call__(self, batch: Joined) -> Sequence[Anomaly]:
        """Judge what came."""
        if not self._pid and batch.calls:
            self._pid = batch.calls[0].pid
        events = [event_of_call(call) for call in batch.calls] + [event_of_span(span) for span in batch.ended]
        found = self.detector.see_all(event for event in events if event is not None)
        for anomaly in found:
            if (line := self._quiet.line(anomaly)) is not None:
                print(line, file=sys.stderr)
        return found

    def _stop(self, anomaly: Anomaly) -> None:
        if self._pid:
            alarm.stop_process(self._pid)(anomaly)
            print(f"[entrenar trace: stopping process {self._pid}: {anomaly_report.line(anomaly)}]", file=sys.stderr)
