"""`entrenar config` shows configs and runs nothing."""

import json
import tomllib

import pytest

from entrenar.cli.main import main


@pytest.fixture
def files(tmp_path):
    (tmp_path / "old.toml").write_text('[data]\ncorpus = ["corpora/a"]\n[model]\nnum_layers = 2\n')
    (tmp_path / "new.toml").write_text('[data]\ncorpus = ["corpora/a"]\n[model]\nnum_layers = 3\n')
    return tmp_path


def test_print_resolves_the_config_and_the_flags(files, capsys):
    """What is printed is a config file: with the flag in it, and read back to the same."""
    assert main(["config", "print", "--config", str(files / "old.toml"), "--lr", "0.25"]) == 0
    printed = capsys.readouterr().out
    table = tomllib.loads(printed)
    assert (table["model"]["num_layers"], table["optim"]["lr"]) == (2, 0.25)
    (files / "again.toml").write_text(printed)
    assert main(["config", "print", "--config", str(files / "again.toml")]) == 0
    assert capsys.readouterr().out == printed


def test_validate_counts_parameters_or_tells_every_fault(files, capsys):
    """A valid config ends with 0; a wrong one with 2 and the file's name."""
    assert main(["config", "validate", "--config", str(files / "old.toml")]) == 0
    assert "old.toml: valid; " in capsys.readouterr().out
    (files / "old.toml").write_text("[model]\nnum_layers = 0\n")
    assert main(["config", "validate", "--config", str(files / "old.toml")]) == 2
    assert "num_layers" in capsys.readouterr().err


def test_diff_ends_like_diff(files, capsys):
    """1 and the options that differ, or 0 and none."""
    old, new = str(files / "old.toml"), str(files / "new.toml")
    assert main(["config", "diff", old, new]) == 1
    said = capsys.readouterr().out
    assert "num_layers" in said
    assert len(said.splitlines()) == 1
    assert main(["config", "diff", old, old]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_schema_is_a_json_schema(capsys):
    """Editors complete config files from it."""
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert "optim" in schema["properties"]
