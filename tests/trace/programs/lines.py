"""Reads whose size names the line that made them and whose file names the function: the truth about attribution.

Usage: lines.py FOLDER REPEATS. Functions, generators, recursion, lambdas, threads and a forked child.
"""

import os
import sys
import threading
from pathlib import Path

FOLDER = Path(sys.argv[1])
NAMES = ("outer", "inner", "helper", "generator", "recursive", "worker", "child", "Größe")


def line():
    return sys._getframe(1).f_lineno


FILES = {}
for name in NAMES:
    (FOLDER / name).write_bytes(b"z" * 10_000)
    FILES[name] = os.open(FOLDER / name, os.O_RDONLY)


def inner(count):
    for _ in range(count):
        os.pread(FILES["inner"], 1000 + line(), 0)
        os.pread(
            FILES["inner"],
            1000 + line() - 2,  # a call stands at the line it begins on
            5,
        )


def helper():
    os.pread(FILES["helper"], 1000 + line(), 0)
    return [read() for read in [lambda: os.pread(FILES["helper"], 1000 + line(), 0)] for _ in range(2)]


def generator(count):
    for at in range(count):
        yield os.pread(FILES["generator"], 1000 + line(), at)


def recursive(depth):
    os.pread(FILES["recursive"], 1000 + line(), 0)
    if depth:
        recursive(depth - 1)
    os.pread(FILES["recursive"], 1000 + line(), 0)


def Größe():  # noqa: N802, PLC2401 - a name that is not ASCII is meant
    os.pread(FILES["Größe"], 1000 + line(), 0)


def outer(count):
    for _ in range(count):
        os.pread(FILES["outer"], 1000 + line(), 0)
        inner(3)
        helper()
        for _ in generator(3):
            os.pread(FILES["outer"], 1000 + line(), 0)
        recursive(4)
        Größe()


def worker(count):
    for _ in range(count):
        os.pread(FILES["worker"], 1000 + line(), 0)
        helper()


def child(count):
    for _ in range(count):
        os.pread(FILES["child"], 1000 + line(), 0)


repeats = int(sys.argv[2])
threads = [threading.Thread(target=worker, args=(repeats,)) for _ in range(3)]
for thread in threads:
    thread.start()
outer(repeats)
for thread in threads:
    thread.join()
pid = os.fork()
if pid == 0:
    child(repeats)
    os._exit(0)
os.waitpid(pid, 0)
