"""A small tokenizer and small corpora for the tests of `entrenar.data`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from entrenar.data import Corpus, PrepareConfig, Tokenizer, prepare, train_bpe

SEPARATOR = "<|end|>"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with a few merges."""
    text = "the cat sat on the mat and the dog ran under another warm table\n    return the mat\n"
    return train_bpe([text] * 4, 300)


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Corpus]:
    """Make a corpus out of documents; keyword arguments are `PrepareConfig`'s."""

    def make(documents: list[str], name: str = "corpus", encoder: Tokenizer = tokenizer, **options: object) -> Corpus:
        source = tmp_path / f"{name}.txt"
        source.write_text(f"\n{SEPARATOR}\n".join(documents), "utf-8")
        config = PrepareConfig.model_validate({"document_separator": SEPARATOR, "val_fraction": 0, **options})
        prepare([source], tmp_path / name, config, tokenizer=encoder)
        return Corpus.open(tmp_path / name)

    return make
