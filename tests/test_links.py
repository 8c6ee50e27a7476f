"""What a folder says lies in it, and links out of it.

A manifest or an index names files of its own folder only. A checkpoint holds no links. Models, adapters and text may be
links: Hugging Face's cache is made of them, and they are read as what they point to.
"""

import json
import shutil
from pathlib import Path

import pytest

from entrenar import recipe
from entrenar.config_file import load_config
from entrenar.data import Corpus
from entrenar.errors import CheckpointError, DataError, FormatError
from entrenar.interop import load_model
from entrenar.train import manifest
from entrenar.train.checkpoint import load

from .small import small_corpus, small_run

OUTSIDE = ["../elsewhere", "/etc/hostname", "a/../../elsewhere", "..", ""]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, a run of one step and its checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    corpus = small_corpus(folder)
    recipe.train(load_config(None, small_run(corpus, folder / "runs", train__max_steps="1")))
    (saved,) = (folder / "runs" / "first" / "checkpoints").iterdir()
    return corpus, saved


def changed(path, change):
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_corpus_names_shards_of_its_own(made, tmp_path, name):
    """Refused before a byte is read."""
    folder = Path(shutil.copytree(made[0], tmp_path / "corpus"))
    changed(folder / "manifest.json", lambda c: c["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises((FormatError, DataError), match=r"must lie in the corpus' folder|is missing"):
        Corpus.open(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_shards_of_its_own(made, tmp_path, name):
    """Refused, naming the tensor and the place."""
    folder = Path(shutil.copytree(made[1] / "model", tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"which is no file name in this folder|lacks the shard"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname"])
def test_a_checkpoint_names_files_of_its_own(made, tmp_path, name):
    """Also where its own hash vouches for the name."""
    folder = Path(shutil.copytree(made[1], tmp_path / "checkpoints" / "step-00000001"))

    def add(content):
        content["files"][name] = {"size": 1, "sha256": "0" * 64}
        del content["manifest_sha256"]
        content["manifest_sha256"] = manifest._hash(content)

    changed(folder / "manifest.json", add)
    with pytest.raises(CheckpointError, match="outside"):
        load(folder)


def test_a_checkpoint_holds_no_links(made, tmp_path):
    """A link may be turned to other bytes after they were checked."""
    folder = Path(shutil.copytree(made[1], tmp_path / "step-00000001"))
    weights = folder / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no regular file"):
        load(folder)


def test_a_model_may_be_made_of_links(made, tmp_path):
    """As the snapshots of Hugging Face's cache are."""
    for file in (made[1] / "model").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert load_model(tmp_path).config == load_model(made[1] / "model").config
