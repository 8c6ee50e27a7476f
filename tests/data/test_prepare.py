"""`entrenar.data.prepare`: sources become a corpus, the same one every time, and bad sources are named."""

from pathlib import Path

from entrenar.data import Corpus, PrepareConfig, Tokenizer, prepare, train_bpe


def _tokenizer() -> Tokenizer:
    return train_bpe(["some words and other words"] * 3, 300)


def test_every_document_comes_back_from_the_shards(tmp_path: Path):
    """Decoding the shards at their BOS and EOS gives the documents, in order."""
    documents = [f"document {number}\nwith two lines é" for number in range(50)]
    source = tmp_path / "text.txt"
    source.write_text("\n<|end|>\n".join(documents), "utf-8")
    tokenizer = _tokenizer()
    config = PrepareConfig(document_separator="<|end|>", val_fraction=0)
    manifest = prepare([source], tmp_path / "corpus", config, tokenizer=tokenizer)
    corpus = Corpus.open(tmp_path / "corpus")
    stream = corpus.stream("train")
    ids = stream.read(0, len(stream)).tolist()
    found, current = [], []
    for index in ids:
        if index == tokenizer.bos_id:
            current = []
        elif index == tokenizer.eos_id:
            found.append(tokenizer.decode(current))
        else:
            current.append(index)
    assert found == documents
    assert manifest.splits["train"].bytes == sum(len(document.encode()) for document in documents)
    assert manifest.lossy_documents == 0
