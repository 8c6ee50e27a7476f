"""`recipe.quickstart`: the whole first run, small; its figures are those of the model that it leaves."""

import math

import pytest
import torch

from entrenar.data import stories
from entrenar.recipe import Observer, open_model
from entrenar.recipe import quickstart as module
from entrenar.recipe.quickstart import QuickstartConfig, quickstart


def two_steps(config, corpus, whole=module.run_config):
    """Return the run of a quickstart, ended by steps and not by a clock."""
    run = whole(config, corpus)
    return run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 2, "max_time_s": None})})


@pytest.fixture
def small(monkeypatch):
    """Few stories, so that seconds do."""
    monkeypatch.setattr(module, "NUM_STORIES", 600)
    monkeypatch.setattr(module, "NUM_NEW_STORIES", 12)
    monkeypatch.setattr(module, "NUM_TOLD", 2)
    monkeypatch.setattr(module, "run_config", two_steps)
    monkeypatch.setattr(module, "_TOKENS_PER_STORY", 24)


def test_the_first_run_trains_measures_and_tells(small, tmp_path):
    """Looks come before and after, new stories cost what the kept model spends, and the bound is the grammar's."""
    config = QuickstartConfig(runs_dir=tmp_path / "runs", corpora_dir=tmp_path / "corpora", threads=1)
    looks = []
    report = quickstart(config, Observer(), looks.append)
    assert looks[0] == report.before
    assert len(report.after.texts) == 2
    assert report.outcome.step == 2
    assert report.is_undertrained
    assert report.outcome.last_record.held_out["keeps_characters"] == looks[-1].check.keeps_characters
    assert report.best_bits_per_byte < report.gzip_bits_per_byte < 8
    assert report.best_bits_per_byte < report.evaluation.bits_per_byte
    assert report.num_known == 0
    model, tokenizer = open_model(report.run_dir)
    new = [story.text for story in stories.stories(12, module.NEW_SEED)]
    assert module.measure(model, tokenizer, new) == report.evaluation


def test_whole_texts_are_measured_one_by_one(small, tmp_path):
    """The bits of all texts are the sum of -log2 of each token's probability, each text by itself."""
    config = QuickstartConfig(runs_dir=tmp_path / "runs", corpora_dir=tmp_path / "corpora", threads=1)
    model, tokenizer = open_model(quickstart(config, Observer()).run_dir)
    texts = ["Ella had a red kite.", "Hugo came by and stopped."]
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            logs = model(ids[:, :-1]).double().log_softmax(-1)
        bits -= float(logs.gather(-1, ids[:, 1:, None]).sum()) / math.log(2)
    found = module.measure(model, tokenizer, texts)
    assert found.bits_per_byte == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)


def test_a_text_of_your_own_has_no_grammar(small, tmp_path):
    """`text` is learned the same way; what only a grammar knows is absent, not made up."""
    source = tmp_path / "mine.txt"
    source.write_text("\n\n".join(f"Line {number} of a text that is about nothing at all." for number in range(3000)))
    config = QuickstartConfig(text=source, name="mine", runs_dir=tmp_path / "runs",
                              corpora_dir=tmp_path / "corpora", threads=1)  # fmt: skip
    report = quickstart(config, Observer())
    assert report.after.check is None
    assert report.best_bits_per_byte is None
    assert 0 < report.gzip_bits_per_byte < 8
    assert "keeps_characters" not in report.outcome.last_record.held_out
