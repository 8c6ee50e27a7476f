"""A loop like that of training, with a slow loader, a slow operation and a slow save; argv[1] is where it saves."""

import gc
import os
import sys
import time

from opentelemetry import trace

STEPS = 25
tracer = trace.get_tracer("planted")


def compute(seconds: float) -> None:
    """Keep the processor busy; by the clock, so that shares are the same on a busy machine."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def slow_load(descriptor: int) -> bytes:
    time.sleep(0.06)
    return os.pread(descriptor, 4096, 0)


def slow_save(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, bytes(1 << 16))
    time.sleep(0.3)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    corpus = os.open(__file__, os.O_RDONLY)
    # Enough live objects that a full collection takes more than a millisecond.
    kept = [[index] for index in range(300_000)]
    for step in range(STEPS):
        with tracer.start_as_current_span(f"step {step}"):
            with tracer.start_as_current_span("data"):
                slow_load(corpus)
            with tracer.start_as_current_span("forward"), tracer.start_as_current_span("compute: slow_op"):
                compute(0.04)
            with tracer.start_as_current_span("backward"):
                compute(0.004)
            if step == 2:
                gc.collect()
            if step % 5 == 4:
                with tracer.start_as_current_span("checkpoint"):
                    slow_save(sys.argv[1])
    del kept


if __name__ == "__main__":
    main()
