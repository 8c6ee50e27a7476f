"""Git's answers: revisions by any name, commits of a range, content by hash, and what is refused."""

import subprocess

import pytest

from entrenar.errors import ConfigError, MachineError
from entrenar.quality import git


def run(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path):
    """Three commits; a tag on the second."""
    place = tmp_path / "work"
    place.mkdir()
    run(place, "init", "-q", "-b", "trunk")
    for number in range(3):
        (place / f"file{number}.py").write_text(f"x = {number}\n")
        run(place, "add", ".")
        run(place, "commit", "-qm", f"commit {number}: \"quotes\" \\ and 'more'")
        if number == 1:
            run(place, "tag", "-a", "checkpoint-epoch-100", "-m", "annotated")
    return place


@pytest.mark.parametrize(
    ("name", "back"), [("HEAD", 0), ("trunk", 0), ("HEAD~2", 2), ("checkpoint-epoch-100", 1), ("HEAD^{/commit 0}", 2)]
)
def test_any_name_of_a_commit_is_understood(folder, name, back):
    """Branches, expressions, annotated tags."""
    assert git.at(folder).resolve(name) == run(folder, "rev-parse", f"HEAD~{back}")


@pytest.mark.parametrize("name", ["nowhere", "HEAD~9", "-h", "--all", "", "HEAD:file0.py"])
def test_a_name_that_is_no_commit_is_refused(folder, name):
    """Options are names like others."""
    with pytest.raises(ConfigError, match="git knows no commit"):
        git.at(folder).resolve(name)


def test_commits_of_a_range_come_oldest_first(folder):
    """With their first line as written."""
    found = git.at(folder).commits(["HEAD~2..HEAD"])
    assert [row.subject for row in found] == [f"commit {n}: \"quotes\" \\ and 'more'" for n in (1, 2)]
    assert found[0].hash == run(folder, "rev-parse", "HEAD~1")
    assert len(git.at(folder).commits(["HEAD"], ["file0.py"])) == 1


def test_a_range_of_unknown_ends_is_refused(folder):
    """With git's own words."""
    with pytest.raises(ConfigError, match=r"git cannot list nowhere..HEAD"):
        git.at(folder).commits(["nowhere..HEAD"])


def test_content_is_read_by_hash(folder):
    """Empty, binary, without a last newline."""
    (folder / "empty.py").touch()
    (folder / "bytes.py").write_bytes(b"\0\xff\n\n  no newline")
    (folder / "link.py").symlink_to("empty.py")
    run(folder, "add", ".")
    run(folder, "commit", "-qm", "odd ones")
    found = git.at(folder)
    blobs = {blob.path: blob.hash for blob in found.blobs(found.resolve("HEAD"))}
    assert set(blobs) == {"file0.py", "file1.py", "file2.py", "empty.py", "bytes.py"}
    contents = found.read(list(blobs.values()))
    assert contents[blobs["bytes.py"]] == b"\0\xff\n\n  no newline"
    assert contents[blobs["empty.py"]] == b""


def test_a_detached_head_and_an_empty_repository_have_no_branch_or_commit(folder, tmp_path):
    """None, not an error."""
    assert git.at(folder).branch() == "trunk"
    run(folder, "checkout", "-q", "--detach")
    assert git.at(folder).branch() is None
    run(tmp_path, "init", "-q", "new")
    assert git.at(tmp_path / "new").head() is None
    assert git.at(tmp_path / "new").dirty_hash() is None


def test_a_dirty_tree_has_a_hash_of_its_difference(folder):
    """Clean: none. Edits and new files: another one each."""
    found = git.at(folder)
    assert found.dirty_hash() is None
    (folder / "file0.py").write_text("x = 9\n")
    edited = found.dirty_hash()
    (folder / "new.py").touch()
    assert None not in (edited, found.dirty_hash())
    assert edited != found.dirty_hash()


def test_a_shallow_clone_says_so_where_history_ends(folder, tmp_path):
    """The remedy is in the message."""
    run(tmp_path, "clone", "-q", "--depth", "1", f"file://{folder}", "shallow")
    found = git.at(tmp_path / "shallow")
    assert found.is_shallow()
    with pytest.raises(ConfigError, match="shallow: `git fetch --unshallow`"):
        found.resolve("HEAD~1")
    with pytest.raises(ConfigError, match="shallow"):
        found.commits(["HEAD~2..HEAD"])
    assert len(found.commits(["HEAD"])) == 1


def test_a_bare_repository_can_be_read(folder, tmp_path):
    """It has commits, if no work tree."""
    run(tmp_path, "clone", "-q", "--bare", str(folder), "bare.git")
    found = git.at(tmp_path / "bare.git")
    assert len(found.blobs(found.resolve("HEAD"))) == 3


def test_outside_of_a_repository_history_is_refused(tmp_path, monkeypatch):
    """And `find` says None."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git.find(tmp_path) is None
    with pytest.raises(ConfigError, match="must lie in a git repository"):
        git.at(tmp_path)


def test_a_machine_without_git_is_named(tmp_path, monkeypatch):
    """The machine's fault: exit code 3."""
    monkeypatch.setenv("PATH", "")
    assert git.find(tmp_path) is None
    with pytest.raises(MachineError, match="git is not installed"):
        git.at(tmp_path)


def test_a_damaged_object_is_the_machine_s_fault(folder):
    """Not an empty file."""
    found = git.at(folder)
    blob = found.blobs(found.resolve("HEAD"))[0].hash
    place = folder / ".git" / "objects" / blob[:2] / blob[2:]
    place.chmod(0o644)
    place.write_bytes(b"damaged")
    with pytest.raises(MachineError, match="git"):
        found.read([blob])
