"""The tokens that end a text are generation_config.json's; the file is kept, and ours is read by transformers."""

import json

import pytest
import transformers

from entrenar.errors import FormatError
from entrenar.interop import hf
from entrenar.interop.convert import Target, convert
from entrenar.interop.generation_config import FILE, read_generation_config
from entrenar.interop.source import open_source


@pytest.fixture
def folder(tmp_path, make_model):
    model = make_model(eos_token_id=2, bos_token_id=1)
    (tmp_path / "model").mkdir()
    hf.save_model(tmp_path / "model", model.config, dict(model.named_parameters()))
    return tmp_path / "model"


ENDS = {
    "one": ({"eos_token_id": 7}, 7),
    "several": ({"eos_token_id": [7, 2]}, (7, 2)),
    "a list of one": ({"eos_token_id": [7]}, 7),
    "none said": ({"temperature": 0.6}, 2),
    "null": ({"eos_token_id": None}, 2),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_file_decides_what_ends_a_text(folder, name):
    """As in transformers' generate; where it is silent, config.json does."""
    values, ends = ENDS[name]
    (folder / FILE).write_text(json.dumps(values))
    assert hf.read_config(folder).eos_token_id == hf.load_model(folder).config.eos_token_id == ends


def test_without_the_file_config_json_decides(folder):
    """Nothing changes for folders of old."""
    (folder / FILE).unlink()
    assert hf.read_config(folder).eos_token_id == 2
    assert read_generation_config(folder) == {}


@pytest.mark.parametrize("kind", ["hf", "nf4"])
def test_a_conversion_keeps_the_file(folder, tmp_path, kind):
    """Its sampling settings and its end tokens, in both of the folder's files."""
    said = {"eos_token_id": [7, 2], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (folder / FILE).write_text(json.dumps(said))
    convert(open_source(folder, is_streamed=kind == "nf4"), Target(tmp_path / "out", kind))
    assert json.loads((tmp_path / "out" / FILE).read_text()) == said
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [7, 2]


def test_a_written_model_keeps_the_file(folder):
    """The road of checkpoints and of merges: a model that was loaded is written with what came with it."""
    (folder / FILE).write_text(json.dumps({"eos_token_id": [7, 2], "top_k": 40}))
    model = hf.load_model(folder)
    hf.save_model(folder, model.config, dict(model.named_parameters()), generation=model.generation)
    written = json.loads((folder / FILE).read_text())
    assert (written["eos_token_id"], written["top_k"]) == ([7, 2], 40)


def test_transformers_ends_where_our_own_models_say(folder):
    """A model that was made here has the file too."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id == 2
    assert theirs.generation_config.bos_token_id == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"must hold a JSON object, got list"),
        ('{"eos_token_id": "</s>"}', r"eos_token_id must be a token's id, or a list, got '</s>'"),
        ('{"eos_token_id": [1, -2]}', r"eos_token_id must be a token's id, or a list, got \[1, -2\]"),
        ('{"bos_token_id": [1]}', r"bos_token_id must be a token's id, got \[1\]"),
    ],
)
def test_a_damaged_file_is_named(folder, content, message):
    """Never passed over: generation would not end."""
    (folder / FILE).write_text(content)
    with pytest.raises(FormatError, match=rf"generation_config\.json:? {message}"):
        hf.load_model(folder)
