"""Notebooks that were exported and Cython's C lead back to what a person wrote."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.errors import FormatError
from entrenar.trace.generated_code import c_map, load_maps, notebook_map
from entrenar.trace.source_map import Origin

CELLS = [
    ("markdown", ["# Fine-tuning\n", "some words"]),
    ("code", ["import os\n", "%time x = 1\n", "\n", "def load(path):\n", "    with open(path, 'rb') as stream:\n",
              "        return stream.read()"]),
    ("markdown", "More words: `import os`"),
    ("code", "data = load('/etc/hosts')\nprint(len(data) > 0)\n"),
    ("code", ["!ls\n", "data = load('/etc/hosts')"]),
]  # fmt: skip
# What nbconvert 7.17 makes of it.
EXPORTED = """#!/usr/bin/env python
# coding: utf-8

# # Fine-tuning
# some words

# In[1]:


import os
get_ipython().run_line_magic('time', 'x = 1')

def load(path):
    with open(path, 'rb') as stream:
        return stream.read()


# More words: `import os`

# In[2]:


data = load('/etc/hosts')
print(len(data) > 0)


# In[ ]:


get_ipython().system('ls')
data = load('/etc/hosts')
"""
# An excerpt of what Cython 3.3 makes of fast.pyx: its comments, and with --line-directives its directives.
CYTHON = """
  /* "fast.pyx":5
 * def load(str path):
 *     descriptor = os.open(path, os.O_RDONLY)             # <<<<<<<<<<<<<<
 *     data = os.read(descriptor, 4096)
*/
  __pyx_t_2 = NULL;
  __pyx_t_3 = __Pyx_PyObject_GetAttrStr(__pyx_t_4, __pyx_n_u_open);

  /* "fast.pyx":6
 *     descriptor = os.open(path, os.O_RDONLY)
 *     data = os.read(descriptor, 4096)             # <<<<<<<<<<<<<<
*/
  __pyx_t_4 = NULL;
"""
DIRECTIVES = 'int main(void) {\n#line 12 "fast.pyx"\n  return 0;\n# 40 "other.pyx"\n}\n'


@pytest.fixture
def notebook(tmp_path) -> Path:
    cells = [{"cell_type": kind, "metadata": {}, "source": source} for kind, source in CELLS]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    path = tmp_path / "finetune.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "finetune.py").write_text(EXPORTED)
    return path


def test_a_line_of_an_exported_notebook_is_a_line_of_a_cell(notebook):
    """Also where two cells hold the same line, and where a magic was turned into a call."""
    maps = load_maps([notebook])
    script = str(notebook.with_suffix(".py"))
    text = EXPORTED.splitlines()
    at = {line: index for index, line in reversed(list(enumerate(text, 1)))}
    assert maps.origin(script, at["        return stream.read()"]) == Origin(f"{notebook}#cell1", 6)
    assert maps.origin(script, at["data = load('/etc/hosts')"]) == Origin(f"{notebook}#cell2", 1)
    assert maps.origin(script, len(text)) == Origin(f"{notebook}#cell3", 2)
    assert str(maps.origin(script, len(text))) == "[finetune.ipynb#cell3:2]"


def test_an_export_that_was_edited_is_refused(notebook):
    """A map of another text would lead to wrong lines."""
    script = notebook.with_suffix(".py")
    script.write_text(EXPORTED.replace("def load(path)", "def load(file)"))
    with pytest.raises(FormatError, match=r"line 4 of code cell 1 is not in it: 'def load\(path\):'"):
        notebook_map(notebook, script)
    notebook.write_text("{}")
    with pytest.raises(FormatError, match="cells must be a list"):
        notebook_map(notebook, script)


def test_cythons_comments_lead_to_the_pyx(tmp_path):
    """C lines belong to the .pyx line quoted above them."""
    path = tmp_path / "fast.c"
    path.write_text(CYTHON)
    maps = c_map(path)
    lines = CYTHON.splitlines()
    assert maps.origin("/build/fast.c", lines.index("  __pyx_t_2 = NULL;") + 1) == Origin("fast.pyx", 5)
    assert maps.origin("/build/fast.c", len(lines)) == Origin("fast.pyx", 6)
    assert maps.origin("/build/fast.c", 2) is None
    assert maps.language == "cython"


def test_line_directives_are_read(tmp_path):
    """Both spellings of the preprocessor; the line below the directive is the one that it names."""
    path = tmp_path / "out.c"
    path.write_text(DIRECTIVES)
    maps = load_maps([path])
    assert maps.origin("out.c", 3) == Origin("fast.pyx", 12)
    assert maps.origin("out.c", 5) == Origin("other.pyx", 40)


def test_plain_c_is_refused(tmp_path):
    """There is nothing to trace back."""
    path = tmp_path / "plain.c"
    path.write_text("int main(void) { return 0; }\n")
    with pytest.raises(FormatError, match="must carry #line directives or Cython's quotations"):
        c_map(path)


@pytest.mark.skipif(shutil.which("jupyter-nbconvert") is None, reason="nbconvert is not installed")
def test_an_export_made_now_is_read(notebook, tmp_path):
    """The recording above is what nbconvert writes."""
    out = tmp_path / "now"
    subprocess.run(
        ["jupyter-nbconvert", "--to", "script", "--output-dir", str(out), str(notebook)],
        check=True,
        capture_output=True,
    )
    script = next(out.iterdir()).rename(out / "finetune.py")
    last = len(script.read_text().rstrip().splitlines())
    assert notebook_map(notebook, script).origin(str(script.resolve()), last) == Origin(f"{notebook}#cell3", 2)


def test_a_debugger_agrees_on_cythons_lines(tmp_path):
    """The compiler that reads the directives puts a symbol where the map says."""
    if shutil.which("gcc") is None or shutil.which("addr2line") is None:
        pytest.skip("needs gcc and addr2line")
    path = tmp_path / "out.c"
    path.write_text('int f(int x) {\n#line 12 "fast.pyx"\n  return x + 1;\n}\n')
    library = tmp_path / "out.o"
    subprocess.run(["gcc", "-g", "-O0", "-c", str(path), "-o", str(library)], check=True)
    done = subprocess.run(["addr2line", "-e", str(library), "0x7"], capture_output=True, text=True, check=True)
    file, line = done.stdout.strip().rsplit("/", 1)[-1].split(":")
    assert c_map(path).origin("out.c", 3) == Origin(file, int(line.split()[0]))
    assert sys.platform == "linux"
