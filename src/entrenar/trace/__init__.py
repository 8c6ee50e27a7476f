"""One trace of a program: spans, system calls with the Python line that made them, anomalies, and views of all that.

Nothing here knows about training: a span comes in through the OpenTelemetry API, a system call through ptrace.
"""
