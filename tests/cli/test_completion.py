"""`entrenar completion`: in the shells themselves, the scripts complete what the help shows; torch is not loaded."""

import shlex
import shutil
import subprocess
import sys

import pytest

from entrenar.cli import completion
from entrenar.cli.main import COMMANDS

# Typed so far, the word under the cursor last, and some of what is offered.
OFFERS = [
    (["ru"], {"runs"}),
    ([""], set(COMMANDS)),
    (["runs", ""], {"list", "show", "compare", "rm"}),
    (["trace", "run", "--trace-c"], {"--trace-compute", "--trace-compute-all", "--trace-compute-threshold"}),
    (["quality", "gate", "--se"], {"--selftest"}),
    (["train", "--precision", ""], {"float32", "bfloat16"}),
    (["train", "--precision", "bf"], {"bfloat16"}),
    (["train", "--tensorboard", ""], {"true", "false"}),
    (["train", "--tensorboard", "--max-s"], {"--max-steps", "--max-skipped-steps", "--max-seq-len"}),
    (["convert", "a", "b", "--to", "nf"], {"nf4", "nf-bits"}),
    (["generate", "--pro"], {"--prompt"}),
    (["convert", "--refuse"], {"--refuse-if"}),
    (["watch", "sec"], {"second"}),
    (["runs", "show", ""], {"first", "second"}),
    (["train", "--config", "no-such"], set()),
]


@pytest.fixture(scope="module")
def scripts():
    """The script for each shell."""
    return {shell: completion.script(shell) for shell in ("bash", "zsh")}


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs, and what is none."""
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def offered(shell: str, script: str, words: list[str], folder) -> set[str]:
    """Ask a shell what it offers."""
    typed = " ".join(map(shlex.quote, ["entrenar", *words]))
    if shell == "bash":
        ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _entrenar; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    else:
        # Outside of an editor there is no completion widget: compadd prints what fits, as the real one shows it.
        begin = 'compdef() { }; _files() { }\ncompadd() { shift; print -rl -- "${(M@)@:#${words[CURRENT]}*}" }\n'
        script = begin + script
        ask = f"words=({typed}); CURRENT={len(words) + 1}; _entrenar"
    done = subprocess.run([shell], input=f"{script}\n{ask}\n", capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_offers_what_the_help_shows(shell, scripts, runs):
    """Commands, verbs, flags, their values, and the names of runs; files where nothing else is known."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    wrong = {}
    for words, expected in OFFERS:
        found = offered(shell, scripts[shell], words, runs)
        if found != expected:
            wrong[" ".join(words)] = found
    assert wrong == {}


def test_bash_completes_behind_an_equals_sign(scripts, tmp_path):
    """It takes `--precision=bf` apart at the sign."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    for words in (["train", "--precision", "="], ["train", "--precision", "=", ""]):
        assert offered("bash", scripts["bash"], words, tmp_path) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("placeholder", "values"),
    [("{a,b}", ["a", "b"]), ("a|b", ["a", "b"]), ("[true|false]", ["true", "false"]), ("{0,1} [{0,1} ...]", ["0", "1"]),
     ("a,b", ["a", "b"]), ("FILE", []), ("METRIC>NUMBER|x", []), ("", [])],
)  # fmt: skip
def test_values_are_read_from_a_placeholder(placeholder, values):
    """Only where it lists them."""
    assert completion.choices(placeholder) == values


def test_it_is_written_without_torch():
    """Both scripts are printed by the command."""
    program = (
        "import sys; from entrenar.cli.main import main; assert main(['completion', 'zsh']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("#compdef entrenar\n")
