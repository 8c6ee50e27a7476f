"""Write spans to a mapped file: no system call per span, no thread, nothing lost when the process is killed.

A record is a start or an end. It lies in a segment, a file of fixed size that is mapped into memory; its pages belong
to the kernel, so that they survive a SIGKILL. The collector (`spool.py`) reads segments while they grow and deletes
those that are full. If nobody collects, the recorder stops when its share of the disk is used up.

    record = length u32, span u64, parent u64, time u64, thread u32, status u8, kind u8, 2 zero bytes, text
"""

import itertools
import json
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<IQQQIBBxx")
# The kind is written last: a record counts once it is not zero.
START, END, DROP, MARK, NEXT_SEGMENT = 1, 2, 3, 4, 255
STATUS = ("unset", "ok", "error")
SUFFIX = ".spans"
SEGMENT_BYTES = 1 << 20
MAX_SEGMENTS = 256


class Recorder:
    """The spans of one process. Safe to use from several threads, from signal handlers and after a fork."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, max_segments: int = MAX_SEGMENTS) -> None:
        """Write segments to the existing `folder` while at most `max_segments` of this process lie there.

        Raises: OSError.
        """
        self._folder, self._segment_bytes, self._max_segments = folder, segment_bytes, max_segments
        self._lock = threading.Lock()
        self._native_id = threading.local()
        self.dropped = 0
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        """Start a file of this process: after a fork the child must not write to its parent's."""
        self._lock = threading.Lock()
        self._native_id = threading.local()
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._segments = 0
        self._ids = itertools.count(secrets.randbits(31) << 32 | 1)
        self._map: mmap.mmap | None = None
        self._at = 0
        try:
            self._open_segment()
        except OSError:
            self._map = None

    def start(
        self,
        parent: int,
        name: str,
        at_ns: int | None = None,
        *,
        attributes: Mapping[str, Any] | None = None,
        ends_with_parent: bool = False,
    ) -> int:
        """Record that a span begins on this thread, now if `at_ns` is None; return its id. `parent` 0 is none.

        If nobody ends it, one that `ends_with_parent` ends with the span around it on its thread.
        """
        number = next(self._ids)
        now = time.monotonic_ns() if at_ns is None else at_ns
        text = f"{name}\0{json.dumps(attributes, default=str)}" if attributes else name
        self._write(START, number, parent, now, int(ends_with_parent), text.encode())
        return number

    def end(
        self, number: int, at_ns: int | None = None, *, status: int = 0, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a span ends."""
        text = json.dumps(attributes, default=str).encode() if attributes else b""
        self._write(END, number, 0, time.monotonic_ns() if at_ns is None else at_ns, status, text)

    def drop(self, number: int, at_ns: int) -> None:
        """Record that a span ended that is not worth keeping."""
        self._write(DROP, number, 0, at_ns, 0, b"")

    def mark(self, span: int, kind: str, text: str) -> None:
        """Record an instant under a span."""
        self._write(MARK, span, 0, time.monotonic_ns(), 0, f"{kind}\0{text}".encode())

    def _write(self, kind: int, number: int, parent: int, at_ns: int, status: int, text: bytes) -> None:
        size = HEAD.size + len(text)
        with self._lock:
            at = self._at
            if at + size + HEAD.size > self._segment_bytes and not self._next_segment(size):
                return
            at = self._at
            self._at = at + size
            mapped = self._map
        if mapped is None:
            self.dropped += 1
            return
        try:
            thread = self._native_id.value
        except AttributeError:
            thread = self._native_id.value = threading.get_native_id()
        if text:
            mapped[at + HEAD.size : at + size] = text
        HEAD.pack_into(mapped, at, size, number, parent, at_ns, thread, status, kind)

    def _next_segment(self, size: int) -> bool:
        """Go on in a new segment; return whether the record has a place there."""
        if size + HEAD.size > self._segment_bytes:
            self.dropped += 1
            return False
        if self._map is not None:
            HEAD.pack_into(self._map, self._at, HEAD.size, 0, 0, 0, 0, 0, NEXT_SEGMENT)
        self._map = None
        try:
            oldest = self._folder / f"{self._name}-{self._segments - self._max_segments:06d}{SUFFIX}"
            if self._segments >= self._max_segments and oldest.exists():
                self.dropped += 1
                return False
            self._open_segment()
        except OSError:  # the disk is full or the folder is gone: the program continues without spans
            self.dropped += 1
            return False
        return True

    def _open_segment(self) -> None:
        path = self._folder / f"{self._name}-{self._segments:06d}{SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserved now: a write to a mapped page that has no place on the disk would kill the process.
            os.posix_fallocate(descriptor, 0, self._segment_bytes)
            self._map = mmap.mmap(descriptor, self._segment_bytes)
        finally:
            os.close(descriptor)
        self._segments += 1
        self._at = 0
