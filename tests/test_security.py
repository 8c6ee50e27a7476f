"""What a stranger's file could do to the machine, and a changed clock to a run: looked for in each source.

Nothing is unpickled, evaluated or handed to a shell, and durations are measured by clocks that nobody sets.
"""

import ast
from collections.abc import Iterator

import pytest

from .house import modules

_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls by their last two names; gather_object and its kin pickle what they send.
_CALLS = {
    "torch.load": "unpickles", "eval": "runs text", "exec": "runs text", "os.system": "runs a shell",
    "os.popen": "runs a shell", "yaml.load": "builds any object", "tempfile.mktemp": "names a file others may take",
    "time.time": "a clock that people set", "datetime.now": "a clock that people set",
}  # fmt: skip
_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list")
# A date or a time stamp that a person or another program reads, never a duration.
_STAMPS = {
    "train.trackers": "time.time", "data.sft.chat_worker": "datetime.now", "cli.verify": "datetime.now",
    "recipe.sessions": "datetime.now",
}  # fmt: skip


def _dangers(tree: ast.AST) -> Iterator[str]:
    """Yield each dangerous name that a source uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(call: ast.Call) -> Iterator[str]:
    names = ast.unparse(call.func).split(".")
    for name in (names[-1], ".".join(names[-2:])):
        if (name in _CALLS and (name == names[-1]) == (len(names) == 1)) or name in _OBJECTS:
            yield name
    for keyword in call.keywords:
        if keyword.arg in ("shell", "allow_pickle") and not _is_false(keyword.value):
            yield f"{keyword.arg}=True"
        if keyword.arg == "weights_only" and _is_false(keyword.value):
            yield "weights_only=False"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_no_source_does_what_a_file_could_abuse(module):
    """No pickle, no evaluated text, no shell; a clock that people set is read for stamps alone."""
    found = set(_dangers(module.tree))
    assert found - {_STAMPS.get(module.name)} == set()


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("eval(text)", "eval"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("os.system(text)", "os.system"),
        ("torch.distributed.all_gather_object(a, b)", "all_gather_object"),
        ("started = time.time()", "time.time"),
        ("datetime.datetime.now()", "datetime.now"),
    ],
)
def test_a_planted_danger_is_seen(source, danger):
    """Every kind is found, and what only looks like one is not."""
    assert danger in set(_dangers(ast.parse(source)))
    assert set(_dangers(ast.parse("model.eval(); np.load(p, allow_pickle=False); run(a, shell=False)"))) == set()
