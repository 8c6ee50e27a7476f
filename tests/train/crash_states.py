"""Every state that a disk may be in after the power fails, from a record of what a process did to its files.

The model is the weakest that POSIX allows (Pillai et al. 2014, "All File Systems Are Not Created Equal"): a file has
the content of its last fsync, or any later one, or a torn one; an entry of a folder is durable once the folder was
fsynced, and of those since then any subset may have reached the disk, in any order. A rename is one step: both names or
neither.

`Recorder` watches a folder and notes each change; `states` builds what may be left at each moment. States that differ
only inside of unfinished files (`.incomplete-…`) are one, because nobody reads those.
"""

import hashlib
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from entrenar import files

Tree = dict[str, bytes | None]
"""Content of each file, None for a folder, by path."""
Unit = tuple[tuple[int, str, int | None], ...]
"""Changes of entries that happen together: folder, name, and what the name stands for from then on."""

_ENTRIES = ("rename", "replace", "mkdir", "unlink", "rmdir", "open", "truncate")
_MOST_EXHAUSTIVE = 7  # pending changes whose every subset is built; of more, some
_SAMPLES = 64


@dataclass(frozen=True)
class Moment:
    """The folder between two operations.

    Attributes:
        done: the operation that has just been done.
        mark: what the process had promised by then.
        folders: durable entries, by folder.
        pending: changes of entries that are not durable.
        contents: for each file its durable content, None if it has none, and the one that processes see.
    """

    done: str
    mark: Any
    folders: Mapping[int, Mapping[str, int]]
    pending: tuple[Unit, ...]
    contents: Mapping[int, tuple[bytes | None, bytes]]


@dataclass
class Recorder:
    """Notes what becomes of a folder; `mark` is the latest promise, such as the step that was saved."""

    root: Path
    mark: Any = None
    moments: list[Moment] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)
    _ids: dict[int, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _seen: dict[int, dict[str, int]] = field(default_factory=dict)
    _visible: dict[int, bytes] = field(default_factory=dict)
    _last: dict[int, bytes] = field(default_factory=dict)
    _durable: dict[int, bytes] = field(default_factory=dict)
    _folders: dict[int, dict[str, int]] = field(default_factory=dict)
    _pending: list[Unit] = field(default_factory=list)

    def begin(self) -> None:
        """Take what is there for durable."""
        with self._lock:
            self._look("begin", is_one=False)
            self._durable = dict(self._visible)
            self._folders = {folder: dict(entries) for folder, entries in self._seen.items()}
            self._pending.clear()
            self.moments.clear()
            self._note("begin")

    def promise(self, mark: Any) -> None:
        """Note that from now on nothing may be lost that `mark` stands for."""
        with self._lock:
            self.mark = mark
            self._look(f"promise {mark}", is_one=False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note each operation of this process inside the block."""
        self.begin()
        with ExitStack() as stack:
            for name in _ENTRIES:
                is_one = name in ("rename", "replace")
                stack.enter_context(mock.patch.object(os, name, self._watched(getattr(os, name), name, is_one=is_one)))
            stack.enter_context(mock.patch.object(os, "fsync", self._synced(os.fsync)))
            exchange = self._watched(files._exchange, "exchange", is_one=True)
            stack.enter_context(mock.patch.object(files, "_exchange", exchange))
            yield

    def _watched(self, call: Callable[..., Any], name: str, *, is_one: bool) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                if is_one:
                    self._look(f"before {name}", is_one=False)
                result = call(*arguments, **named)
                self._look(name, is_one=is_one)
            return result

        return run

    def _synced(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def run(descriptor: int) -> None:
            with self._lock:
                call(descriptor)
                self._look("before fsync", is_one=False)
                number = self._ids.get(os.fstat(descriptor).st_ino)
                if number in self._visible:
                    self._durable[number] = self._visible[number]
                elif number in self._seen:
                    self._folders[number] = dict(self._seen[number])
                    self._pending = [unit for unit in self._pending if all(folder != number for folder, _, _ in unit)]
                self._note("fsync")

        return run

    def _look(self, done: str, *, is_one: bool) -> None:
        """Compare the folder with how it was; what changed in one operation is one unit, else each change is."""
        before, self._seen, self._visible = self._seen, {}, {}
        inodes = self._walk(self.root)
        self._ids = {inode: number for inode, number in self._ids.items() if inode in inodes}
        changes = [
            (folder, name, entries.get(name))
            for folder, entries in {**{folder: {} for folder in before}, **self._seen}.items()
            for name in {**before.get(folder, {}), **entries}
            if before.get(folder, {}).get(name) != entries.get(name)
        ]
        self._pending += [tuple(changes)] if is_one and changes else [(change,) for change in changes]
        for folder in self._seen:
            self._folders.setdefault(folder, {})
        self._note(done)

    def _walk(self, folder: Path) -> set[int]:
        own = self._number(folder.stat().st_ino)
        inodes, entries = {folder.stat().st_ino}, {}
        for path in sorted(folder.iterdir()):
            try:
                inode, is_folder = path.stat().st_ino, path.is_dir()
                content = b"" if is_folder else path.read_bytes()
            except FileNotFoundError:
                continue
            entries[path.name] = self._number(inode)
            inodes.add(inode)
            if is_folder:
                inodes |= self._walk(path)
            else:
                self._visible[self._number(inode)] = content
        self._seen[own] = entries
        return inodes

    def _number(self, inode: int) -> int:
        """Return a number that is given once: the kernel gives an inode's again when the file is gone."""
        if inode not in self._ids:
            self._ids[inode] = next(self._numbers)
        return self._ids[inode]

    def _note(self, done: str) -> None:
        self._last.update(self._visible)
        contents = {number: (self._durable.get(number), content) for number, content in self._last.items()}
        folders = {folder: dict(entries) for folder, entries in self._folders.items()}
        self.moments.append(Moment(done, self.mark, folders, tuple(self._pending), contents))


@dataclass
class Count:
    """How many states were built, and how many of them differ."""

    built: int = 0
    different: int = 0


def states(recorder: Recorder, count: Count) -> Iterator[tuple[Moment, Tree]]:
    """Yield each different state that the disk may be in, with the moment of the power loss."""
    chance = random.Random(0)
    known: set[tuple[str, bytes]] = set()
    root = min(recorder.moments[0].folders)
    for moment, tree in ((each, tree) for each in recorder.moments for tree in _states_at(each, root, chance)):
        count.built += 1
        key = (repr(moment.mark), _key(tree))
        if key not in known:
            known.add(key)
            count.different += 1
            yield moment, tree


def _states_at(moment: Moment, root: int, chance: random.Random) -> Iterator[Tree]:
    """Yield the states at one moment: for each choice of entries each choice of contents."""
    for units in _subsets(len(moment.pending), chance):
        yield from _trees(moment, _entries(moment, units), root, chance)


def _subsets(size: int, chance: random.Random) -> Iterator[Collection[int]]:
    """Yield every subset of few changes; of many the first ones, each alone, all but each, and some by chance."""
    every = range(size)
    if size <= _MOST_EXHAUSTIVE:
        for count in range(size + 1):
            yield from itertools.combinations(every, count)
        return
    yield from (range(first) for first in range(size + 1))
    yield from ((one,) for one in every)
    yield from ({*every} - {one} for one in every)
    yield from ([one for one in every if chance.random() < 0.5] for _ in range(_SAMPLES))


def _entries(moment: Moment, units: Collection[int]) -> dict[int, dict[str, int]]:
    """Return the entries of all folders after some of the pending changes."""
    folders = {folder: dict(entries) for folder, entries in moment.folders.items()}
    for folder, name, target in (change for one in sorted(units) for change in moment.pending[one]):
        entries = folders.setdefault(folder, {})
        if target is None:
            entries.pop(name, None)
        else:
            entries[name] = target
    return folders


def _trees(
    moment: Moment, folders: Mapping[int, Mapping[str, int]], root: int, chance: random.Random
) -> Iterator[Tree]:
    """Yield the tree for each choice of the contents that are not durable; of many choices, some."""
    places = dict(_places(folders, root, ""))
    choices = {
        path: [None] if number in folders else _contents(path, *moment.contents[number])
        for path, number in places.items()
    }
    open_paths = [path for path, some in choices.items() if len(some) > 1]
    if len(open_paths) <= 3:
        yield from (dict(zip(choices, contents, strict=True)) for contents in itertools.product(*choices.values()))
        return
    first = {path: some[0] for path, some in choices.items()}
    yield first
    yield {path: some[min(1, len(some) - 1)] for path, some in choices.items()}
    yield from ({**first, path: content} for path in open_paths for content in choices[path])
    yield from ({path: chance.choice(some) for path, some in choices.items()} for _ in range(_SAMPLES))


def _contents(path: str, durable: bytes | None, visible: bytes) -> list[bytes | None]:
    """Return what a file may hold; of an unfinished one nobody reads it."""
    if durable == visible or files.TEMPORARY_PREFIX in path:
        return [visible]
    return _torn(durable or b"", visible)


def _torn(durable: bytes, visible: bytes) -> list[bytes | None]:
    """Return what a file may hold; what was appended to durable content does not harm it."""
    kept = durable if visible.startswith(durable) else b""
    half = visible[: (len(kept) + len(visible)) // 2]
    return list(dict.fromkeys([durable, visible, half, kept + bytes(len(visible) - len(kept))]))


def _places(folders: Mapping[int, Mapping[str, int]], folder: int, prefix: str) -> Iterator[tuple[str, int]]:
    for name, number in folders[folder].items():
        yield prefix + name, number
        if number in folders:
            yield from _places(folders, number, f"{prefix}{name}/")


def _key(tree: Tree) -> bytes:
    """Return what tells states apart: of an unfinished file or folder, only that it is there."""
    digest = hashlib.sha256()
    for path, content in sorted(tree.items()):
        top, _, below = path.partition("/")
        if top.startswith(files.TEMPORARY_PREFIX):
            if not below:
                digest.update(b"unfinished")
        else:
            digest.update(f"{path} {hashlib.sha256(content or b'').hexdigest()} {content is None}".encode())
    return digest.digest()


def build(tree: Tree, place: Path) -> None:
    """Put a state at `place`, in the place of an earlier one."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (place / path).mkdir(parents=True, exist_ok=True)
        else:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
