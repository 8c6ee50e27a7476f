"""Small inputs of strangers that once went wrong, each run as its own script says: the right answer, no traceback.

The inputs lie outside of the repository (`../shared/cases/turn2`, where it is there); the classes they stand for have
tests of their own, which `docs/peer_bugs.md` lists.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "cases" / "turn2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"the inputs are not here: {CASES}"),
]
# What the output of each case must show, in this order, and what it must not.
SHOWN = {
    "01_row_fields_dropped": [r"97 tokens, 19 of them trained", r"Tools: \[", r"<call>\{\"name\": \"add\""],
    "02_weight_ignored": [r"BAD<\|im_end\|> \n", r"«GOOD", r"7 of them trained"],
    "03_named_templates": [r"Hi Tom", r"«Hello Lily"],
    "04_added_tokens_ignored": [r"l2added2 32002 \[32000, 1792, 13, 18567, 32001\]", r"l2jdec 32002 \[32000, 1792"],
    "05_generation_config": [r"named Lily\n", r"generation_config\.json", r"named Lily"],
    "06_padded_vocab": [r"Once upon a time"],
    "07_quarantine_loses_the_rest": [r"998 of 999 rows", r"1 step after", r"quarantine holds rows, and the rest"],
    "08_json_and_csv_rows_lost": [r"another value begins here", r"never closed", r"two columns have the name"],
    "09_templates": [r"'label' of the template is null", r"Q: Say 1« one", r"Q: Say 2« two"],
    "10_prepare_folders": [r"650 documents", r"3 documents"],
    "11_gguf_rope_keys": [r"\"rope_type\": \"linear\"", r"\"factor\": 4\.0"],
    "12_stale_index": [r"holds two sets of weights"],
    "15_max_steps": [r"30 steps after"],
    "16_tracebacks": [r"b\[/red\]", r"--seed: ", r"train\.seed", r"--temperature", r"/none\.jinja", r"No space left"],
    "17_template_surroundings": [r"<unk><\|im_start\|>", r"«Hello Lily<\|im_end\|>»"],
    "19_no_val_split": [r"nothing is held out", r"Training complete"],
    "20_prerendered_text": [r"2 rows spell control tokens"],
    "21_small": [r"1 document", r"the files are empty", r"System role not supported"],
}
_RAISES = ("12_stale_index",)  # its script is a Python program that shows the library's error


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy that may be written to, with the program on PATH."""
    place = tmp_path_factory.mktemp("cases") / "turn2"
    shutil.copytree(CASES, place)
    return place


@pytest.mark.parametrize("case", sorted(SHOWN))
def test_a_stranger_s_input_gives_the_right_answer(case, place):
    """The output shows what is right, in order, and no command ends in a traceback."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(place / case / "run.sh")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    start = 0
    for pattern in SHOWN[case]:
        found = re.compile(pattern).search(done.stdout, start)
        assert found, f"{pattern!r} is not in what follows:\n{done.stdout[start:]}"
        start = found.end()
    assert ("Traceback" in done.stdout) == (case in _RAISES)
