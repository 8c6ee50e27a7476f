"""OTLP for the terminal: says when the collector answers, when it does not, and where to look."""

import argparse
import sys
from collections.abc import Sequence

from entrenar.trace.join import Joined
from entrenar.trace.otlp_exporter import OtlpExport, viewer_url
from entrenar.trace.records import Anomaly
from entrenar.trace.session import Session


class Export:
    """An exporter and the messages it prints for the user."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._endpoint = parsed.otlp_endpoint
        self._export = OtlpExport(
            self._endpoint, parsed.otlp_service_name, protocol=parsed.otlp_protocol, on_state=self._tell
        )

    def begin(self, session: Session) -> None:
        """Learn the trace."""
        self._export.begin(session.info, session.root_id)

    def take(self, batch: Joined) -> Sequence[Anomaly]:
        """Send what came."""
        return self._export(batch)

    def finish(self, session: Session) -> None:
        """Send the rest."""
        self._export.close(session.process_spans())

    def conclude(self) -> None:
        """Print how much was sent and where to view it."""
        if self._export.dropped:
            print(
                f"[entrenar: OTLP: {self._export.dropped:,} spans were not taken by {self._endpoint}; the trace file "
                "has them: entrenar trace export --to otlp]",
                file=sys.stderr,
            )
        if self._export.sent:
            print(f"\nView traces at: {viewer_url(self._endpoint)}", file=sys.stderr)

    def _tell(self, is_up: bool) -> None:  # noqa: FBT001 - a callback
        if is_up:
            print("[entrenar: OTLP export enabled]", file=sys.stderr, flush=True)
        else:
            print(f"[entrenar: OTLP: no collector answers at {self._endpoint}; spans wait for it]", file=sys.stderr)
