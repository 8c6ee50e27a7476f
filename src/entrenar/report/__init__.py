"""One self-contained HTML page about one or more runs: what happened, what differs, and what to do next."""

from entrenar.report.findings import Finding, findings
from entrenar.report.history import History, read_history
from entrenar.report.page import render

__all__ = ["Finding", "History", "findings", "read_history", "render"]
