"""Read a tree from git: revisions, the files of each, their content. Ask git itself, and read from its objects."""

import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrenar.errors import ConfigError, MachineError

_LINK = "120000"
_SUBMODULE = "160000"


@dataclass(frozen=True)
class Commit:
    """A commit: its hash, when it was made (ISO 8601), and its first line."""

    hash: str
    date: str
    subject: str


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its path from the root, and its content's hash."""

    path: str
    hash: str


@dataclass(frozen=True)
class Repository:
    """A work tree, or a bare repository, and the folder of its objects, shared by all its work trees."""

    root: Path
    objects: Path

    def resolve(self, revision: str) -> str:
        """Return the hash of the commit that a branch, tag, hash or expression names.

        Raises: ConfigError for a name that git does not know.
        """
        done = self._try("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if done.returncode:
            raise ConfigError(f"git knows no commit {revision!r} in {self.root}{self._shallow_remedy()}")
        return done.stdout.decode().strip()

    def commits(self, selection: Sequence[str], paths: Sequence[str] = ()) -> list[Commit]:
        """Return the commits of a selection in `git log`'s words that touch one of the paths, oldest first.

        Raises: ConfigError for a selection that git does not understand.
        """
        done = self._try("log", "-z", "--reverse", "--format=%H%x00%cI%x00%s", *selection, "--", *paths)
        if done.returncode:
            raise ConfigError(
                f"git cannot list {' '.join(selection)}: {_first_line(done.stderr)}{self._shallow_remedy()}"
            )
        fields = done.stdout.decode("utf-8", "replace").rstrip("\0").split("\0")
        return [Commit(*fields[start : start + 3]) for start in range(0, len(fields) - 2, 3)]

    def blobs(self, commit: str, paths: Sequence[str] = ()) -> list[Blob]:
        """Return the files of a commit at or under the paths: no links, no submodules."""
        listed = self._bytes("ls-tree", "-r", "-z", "--full-tree", commit, "--", *paths)
        found = []
        for row in filter(None, listed.split(b"\0")):
            about, _, path = row.partition(b"\t")
            mode, _, name = about.decode().split(" ")
            if mode not in (_LINK, _SUBMODULE):
                found.append(Blob(path.decode("utf-8", "replace"), name))
        return found

    def read(self, blobs: Sequence[str]) -> Mapping[str, bytes]:
        """Return the content of each blob."""
        asked = "".join(f"{blob}\n" for blob in blobs).encode()
        out = self._bytes("cat-file", "--batch", given=asked)
        contents, at = {}, 0
        for blob in blobs:
            end = out.index(b"\n", at)
            header = out[at:end].split(b" ")
            if len(header) != 3:
                raise MachineError(
                    f"git has no readable object {blob} in {self.root}; `git fsck` names what is damaged"
                )
            size = int(header[2])
            contents[blob] = out[end + 1 : end + 1 + size]
            at = end + 2 + size
        return contents

    def head(self) -> str | None:
        """Return the hash of the commit that is checked out; None before the first one."""
        done = self._try("rev-parse", "--verify", "--quiet", "HEAD")
        return None if done.returncode else done.stdout.decode().strip()

    def branch(self) -> str | None:
        """Return the branch that is checked out; None on a detached head."""
        done = self._try("symbolic-ref", "--short", "--quiet", "HEAD")
        return None if done.returncode else done.stdout.decode().strip()

    def dirty_hash(self) -> str | None:
        """Return the SHA-256 of the difference to the last commit, untracked files' names included; None if clean."""
        changes = self._bytes("status", "--porcelain", "-z")
        if not changes:
            return None
        difference = self._bytes("diff", "--binary", "HEAD") if self.head() else b""
        return hashlib.sha256(changes + difference).hexdigest()

    def listed(self, folder: Path) -> list[str]:
        """Return the files of a folder of the work tree that are tracked or would be, named from the folder."""
        listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
        return sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})

    def is_shallow(self) -> bool:
        """Return whether the history was cut when this repository was cloned."""
        return self._bytes("rev-parse", "--is-shallow-repository").strip() == b"true"

    def _shallow_remedy(self) -> str:
        return "; this clone is shallow: `git fetch --unshallow` brings the rest" if self.is_shallow() else ""

    def _bytes(self, *words: str, given: bytes | None = None) -> bytes:
        done = self._try(*words, given=given)
        if done.returncode:
            raise MachineError(f"git {words[0]} failed in {self.root}: {_first_line(done.stderr)}")
        return done.stdout

    def _try(self, *words: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        return _git(self.root, *words, given=given)


def find(path: Path) -> Repository | None:
    """Return the repository that `path` lies in, or None where there is none or no git."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    try:
        found = _git(folder, "rev-parse", "--path-format=absolute", "--git-common-dir")
        top = _git(folder, "rev-parse", "--show-toplevel")
    except MachineError:
        return None
    if found.returncode:
        return None
    objects = Path(os.fsdecode(found.stdout.rstrip(b"\n")))
    # A bare repository has no work tree; its commits can be read all the same.
    return Repository(objects if top.returncode else Path(os.fsdecode(top.stdout.rstrip(b"\n"))), objects)


def at(path: Path) -> Repository:
    """Return the repository that `path` lies in.

    Raises: ConfigError if there is none; MachineError if git is not installed.
    """
    found = find(path)
    if found is None:
        _git(Path(), "--version")
        raise ConfigError(f"{path} must lie in a git repository; history is read from its commits")
    return found


def _git(folder: Path, *words: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1"}
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words], input=given, capture_output=True, check=False, env=environment
        )
    except FileNotFoundError as missing:
        raise MachineError("git is not installed or not on PATH") from missing


def _first_line(text: bytes) -> str:
    return text.decode("utf-8", "replace").strip().partition("\n")[0]
