"""Scoring a folder and a revision: the same numbers from the disk, from git's objects and from the cache."""

import logging
import sqlite3
import subprocess
from pathlib import Path

import pytest

from entrenar.errors import DataError
from entrenar.quality import git
from entrenar.quality.debt import cache, measure, scoring
from entrenar.quality.debt.sources import Entry

from . import planted

TREE = planted.tree({"branches": 20, "copies": 2, "depth": 5, "circle": 1})


def run(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A repository with the planted tree in a package, committed."""
    (tmp_path / "pkg").mkdir()
    for name, text in {**TREE, "__init__.py": ""}.items():
        (tmp_path / "pkg" / name).write_text(text)
    (tmp_path / "pkg" / 'caf\u00e9 "q".py').write_text("X = 1\n")
    run(tmp_path, "init", "-q")
    run(tmp_path, "add", ".")
    run(tmp_path, "commit", "-qm", "first")
    return tmp_path


def at_head(folder, path, project=None):
    found = git.at(folder)
    tree = scoring.tree_of_revision(found, found.resolve("HEAD"), Path(path), project or folder)
    return scoring.score(tree, found.objects)


def test_a_revision_scores_as_the_folder_does(repository):
    """From git's objects without a checkout: to the last bit."""
    for path in ("pkg", "pkg/planted.py"):
        assert at_head(repository, path) == scoring.score_path(repository / path, repository)


def test_a_second_time_nothing_is_measured(repository, monkeypatch):
    """The cache is keyed by the blob's hash: another commit of the same content is known."""
    first = scoring.score_path(repository / "pkg", repository)
    run(repository, "commit", "-q", "--allow-empty", "-m", "second")
    monkeypatch.setattr(measure, "measure", None)
    assert at_head(repository, "pkg") == first
    assert (repository / ".git" / "entrenar-debt.sqlite").exists()


def test_an_edit_is_measured(repository):
    """One changed file changes its score, and what it shares with others."""
    before = scoring.score_path(repository / "pkg", repository)
    (repository / "pkg" / "planted.py").write_text('"""Clean."""\n\nX = 1\n')
    after = scoring.score_path(repository / "pkg", repository)
    assert after.score > before.score


def test_other_versions_of_the_tools_know_nothing(repository):
    """What was measured by another ruff is measured again."""
    scoring.score_path(repository / "pkg", repository)
    entry = Entry("pkg/__init__.py", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    same, other = (cache.Cache(repository / ".git", {**measure.scorer(), **more}) for more in ({}, {"ruff": "0"}))
    assert list(same.load([entry])) == [entry]
    assert other.load([entry]) == {}
    same.close()
    other.close()


@pytest.mark.parametrize("damage", [b"no database at all, just bytes" * 40, None])
def test_a_damaged_cache_costs_time_only(repository, damage, caplog):
    """A warning, and the same score."""
    first = scoring.score_path(repository / "pkg", repository)
    store = repository / ".git" / "entrenar-debt.sqlite"
    if damage is None:
        with sqlite3.connect(store) as connection:
            connection.execute("update measured set body = x'00'")
        connection.close()
    else:
        store.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert scoring.score_path(repository / "pkg", repository) == first
    assert "cannot be used" in caplog.text


def test_a_project_in_a_part_of_a_repository_names_files_from_itself(repository):
    """Its own rules and baseline hold wherever the repository lies."""
    part = repository / "pkg"
    assert at_head(repository, ".", part) == scoring.score_path(part, part)
    assert at_head(repository, "planted.py", part).files[0].path == "planted.py"


def test_files_outside_of_the_project_are_named_from_their_packages(tmp_path, monkeypatch):
    """A package in site-packages."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("lib/pkg/__init__.py", "lib/pkg/sub/__init__.py", "lib/pkg/sub/a.py", "here/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("X = 1\n")
    tree = scoring.score_path(tmp_path / "lib" / "pkg" / "sub", tmp_path / "here")
    assert [file.path for file in tree.files] == ["pkg/sub/__init__.py", "pkg/sub/a.py"]


def test_outside_of_a_repository_there_is_no_cache(tmp_path, monkeypatch):
    """A folder without git is scored all the same, named from itself."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "a.py").write_text("X = 1\n")
    assert [file.path for file in scoring.score_path(tmp_path, tmp_path).files] == ["a.py"]
    assert [file.path for file in scoring.score_path(tmp_path / "a.py", tmp_path).files] == ["a.py"]


def test_without_git_a_folder_is_scored(tmp_path, monkeypatch):
    """Git is needed for history alone."""
    (tmp_path / "a.py").write_text("X = 1\n")
    monkeypatch.setattr(git.subprocess, "run", _no_git(subprocess.run))
    assert scoring.score_path(tmp_path, tmp_path).score < 100


def _no_git(run_):
    def run_without_git(command, **options):
        if command[0] == "git":
            raise FileNotFoundError
        return run_(command, **options)

    return run_without_git


def test_an_empty_tree_is_refused(tmp_path):
    """No Python file is no score."""
    with pytest.raises(DataError, match="holds no Python file to score"):
        scoring.score_path(tmp_path, tmp_path)
