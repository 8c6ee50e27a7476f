"""A trace goes through the launcher into the program, by the W3C's header."""

import json
import sys
from pathlib import Path

import pytest

from entrenar.trace import launch

VECTORS = Path(__file__).resolve().parents[3] / "shared/data/oracles/w3c_traceparent.json"
VALID = "00-12345678901234567890123456789012-1234567890123456-01"


@pytest.mark.parametrize(
    "header",
    [
        "", "00", VALID[:-1], VALID + "0", VALID.upper().replace("00-", "FF-", 1), "ff" + VALID[2:], "000" + VALID[2:],
        VALID.replace("12345678901234567890123456789012", "0" * 32),
        VALID.replace("-1234567890123456-", f"-{'0' * 16}-"),
        VALID + "-what-the-future-brings", VALID.replace("1", "g", 1), VALID.replace("-", "-0", 1),
    ],
)  # fmt: skip
def test_an_invalid_traceparent_is_none(header):
    """Wrong lengths, wrong letters, ids of zeros, version ff, and a tail that version 00 does not have."""
    assert launch.parse_traceparent(header) is None


def test_a_valid_traceparent_of_this_and_of_later_versions_is_read():
    """A later version may append; both ids come out."""
    wanted = (0x12345678901234567890123456789012, 0x1234567890123456)
    assert launch.parse_traceparent(VALID) == launch.parse_traceparent(f" {VALID}\t") == wanted
    assert launch.parse_traceparent("cc" + VALID[2:] + "-what-the-future-brings") == wanted
    assert launch.traceparent(*wanted) == VALID


@pytest.mark.skipif(not VECTORS.exists(), reason="the W3C's published vectors are not on this machine")
def test_the_published_vectors_are_judged_as_published():
    """Those of version 00, and those that hold for any version but all-zero ids, which are no trace."""
    vectors = json.loads(VECTORS.read_text())
    zeros = ("0" * 32, "0" * 16)
    for header in vectors["base_any_version"]["valid"] + vectors["version_00_strict"]["valid"]:
        is_trace = not any(part in zeros for part in header.split("-")[1:3])
        assert (launch.parse_traceparent(header) is not None) == is_trace, header
    for header in vectors["base_any_version"]["invalid"]:
        assert launch.parse_traceparent(header) is None, header
    for header in vectors["version_00_strict"]["invalid"]:
        assert launch.parse_traceparent(header) is None or not header.startswith("00"), header


def test_what_the_tracer_wants_reaches_the_program(tmp_path):
    """Folder, trace, parent, groups and threshold come out as they went in, and the rest of the environment stays."""
    wants = launch.Wants(tmp_path, 0xABC, 0xDEF, "layers", 100_000)
    told = launch.environment({"HOME": "/root"}, Path("/bin/sh"), wants)
    assert launch.wanted(told) == wants
    assert told["HOME"] == "/root"
    assert "OTEL_PYTHON_TRACER_PROVIDER" not in told, "a program of another environment could not load our provider"


def test_a_program_that_nobody_traces_has_nothing_to_heed(tmp_path):
    """No variable, or a folder that is gone, is no tracer."""
    assert launch.wanted({}) is None
    assert launch.wanted({launch.SPOOL: str(tmp_path / "gone"), "TRACEPARENT": VALID}) is None
    assert launch.wanted({launch.SPOOL: str(tmp_path)}) is None


def test_a_launchers_trace_goes_on_and_without_one_a_new_begins():
    """TRACEPARENT in, or a random id."""
    assert launch.inherited({"TRACEPARENT": VALID}).parent == 0x1234567890123456
    new = launch.inherited({"TRACEPARENT": "nonsense"})
    assert new.parent is None
    assert new.trace_id != launch.inherited({}).trace_id


def test_our_own_python_is_told_of_the_provider_if_the_installation_knows_it(tmp_path, monkeypatch):
    """The entry point decides."""
    program = Path(sys.prefix) / "bin" / "python"
    monkeypatch.setattr(launch, "entry_points", lambda **_: ["entrenar"])
    told = launch.environment({}, program, launch.Wants(tmp_path, 1, 2))
    assert told["OTEL_PYTHON_TRACER_PROVIDER"] == "entrenar"
    monkeypatch.setattr(launch, "entry_points", lambda **_: [])
    assert "OTEL_PYTHON_TRACER_PROVIDER" not in launch.environment({}, program, launch.Wants(tmp_path, 1, 2))
