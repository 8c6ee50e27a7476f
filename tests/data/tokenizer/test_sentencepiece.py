"""`entrenar.data.tokenizer.sentencepiece`: a `.model` file gives the ids that sentencepiece gives."""

import io
import json
import random
import struct
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.sentencepiece import read_sentencepiece
from entrenar.errors import EntrenarError, FormatError

SENTENCES = [
    "the cat sat on the mat",
    "a dog and a cat ran away",
    "return the value of x",
    "for i in range(10): print(i)",
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small BPE models: like LLaMA's; with sentencepiece's whitespace rules; and without byte fallback."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    kinds = {
        "llama": {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": True},
        "squeezed": {"byte_fallback": True, "remove_extra_whitespaces": True, "add_dummy_prefix": True},
        "plain": {"byte_fallback": False, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    }
    paths = {}
    for name, options in kinds.items():
        paths[name] = folder / f"{name}.model"
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=360 if options["byte_fallback"] else 90,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        paths[name].write_bytes(buffer.getvalue())
    return paths


@pytest.fixture(scope="session")
def pairs(trained: dict[str, Path]) -> list[tuple[Tokenizer, sentencepiece.SentencePieceProcessor]]:
    return [(Tokenizer.load(path), sentencepiece.SentencePieceProcessor(str(path))) for path in trained.values()]


LIKELY = st.lists(st.sampled_from(["the", "cat", " ", "  ", "\n", "a", "at", "é", "<s>", "<0x41>", "in", "▁"])).map(
    "".join
)


@pytest.mark.property
@pytest.mark.kills("data.tokenizer.tokenizer", "before + found.ids + after", "before + found.ids[::-1] + after")
@given(LIKELY | st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_ids_equal_sentencepiece(pairs: list[tuple[Tokenizer, sentencepiece.SentencePieceProcessor]], text: str):
    """For every string, with and without byte fallback, dummy prefix and squeezed whitespace."""
    for ours, theirs in pairs:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.property
@pytest.mark.kills("data.tokenizer.token_bytes", 'return content.removeprefix(b" ")', "return content")
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=40))
def test_byte_fallback_round_trips(pairs: list[tuple[Tokenizer, sentencepiece.SentencePieceProcessor]], text: str):
    """A model like LLaMA's gives every string back (but U+2581, which it writes for a space)."""
    ours, theirs = pairs[0]
    assert ours.decode(ours.encode(text)) == text == theirs.decode(theirs.encode(text))


def test_control_tokens_and_flags(trained: dict[str, Path]):
    """BOS, EOS and the leading space come from the file."""
    tokenizer = Tokenizer.load(trained["llama"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, None, True)
    assert tokenizer.adds_space is True
    assert Tokenizer.load(trained["plain"]).adds_space is False
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("a</s>", allow_special=True)[-1] == 2


def test_saved_conversion_equals_the_model(trained: dict[str, Path], tmp_path: Path):
    """tokenizer.json written from a .model has the same hash and ids."""
    tokenizer = Tokenizer.load(trained["llama"])
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


def test_a_model_with_unicode_normalization(tmp_path: Path):
    """The NFKC table in the file is applied: ligatures, full-width letters and odd spaces give sentencepiece's ids."""
    path, buffer = tmp_path / "nfkc.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(buffer.getvalue())
    ours, theirs = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(str(path))
    assert ours.bos_id is None
    for text in ("ﬁne ｔｈｅ cat", "the\u00a0cat\tsat", "①②³ x", "  a cat  "):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text) != ours.encode("the")


def test_llama2_vectors(shared_data: Path):
    """All 47 strings of llama.cpp and all 5 of Meta's reference have the published ids, from .model and .json."""
    vectors = shared_data / "tokenizers/vectors"
    texts = (vectors / "ggml-vocab-llama-spm.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (vectors / "ggml-vocab-llama-spm.gguf.out").read_text("utf-8").split("\n")[: len(texts)]
    expected = [[int(index) for index in line.split()] for line in lines]
    cases = json.loads((vectors / "llama2c_test_c.json").read_text())["cases"]
    for source in ("llama2/tokenizer.model", "llama2_hf/tokenizer.json"):
        tokenizer = Tokenizer.load(shared_data / "tokenizers" / source)
        assert tokenizer.encode_batch(texts) == expected
        assert [tokenizer.decode(ids) for ids in expected] == texts
        for case in cases:
            assert tokenizer.encode(case["text"], bos=case["bos"], eos=case["eos"]) == case["ids"]


def _adversarial(model: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Strings in which two merges of equal score overlap, and runs of one or two characters of every length."""
    pieces = {
        model.id_to_piece(index)
        for index in range(model.vocab_size())
        if not (model.is_control(index) or model.is_byte(index) or model.is_unknown(index))
    }
    overlaps = [
        piece + piece[len(piece) - cut :]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces and piece[: len(piece) - cut] == piece[cut:]
    ]
    runs = [" " * length for length in range(1, 70)] + [unit * 33 for unit in sorted(pieces)[:500] if len(unit) < 3]
    rng = random.Random(0)
    known = sorted(pieces)
    mixed = ["".join(rng.choices(known, k=8)) for _ in range(2000)]
    return [text.replace("▁", " ") for text in overlaps + runs + mixed]


@pytest.mark.parametrize("source", ["tokenizers/llama2/tokenizer.model", "tokenizers/tok512/tok512.model"])
def test_real_models_equal_sentencepiece_where_merges_tie(shared_data: Path, source: str):
    """Overlapping splits of one piece, runs of spaces and 2,000 mixtures of pieces give sentencepiece's ids."""
    ours = Tokenizer.load(shared_data / source)
    theirs = sentencepiece.SentencePieceProcessor(str(shared_data / source))
    texts = _adversarial(theirs)
    assert ours.encode_batch(texts) == theirs.encode(texts)


def test_model_without_byte_fallback_gives_unknowns(shared_data: Path):
    """tok105 turns a newline into its unknown token, as sentencepiece does, and runs of unknowns into one."""
    path = shared_data / "models/tok105_5000/tok105.model"
    ours, theirs = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(str(path))
    for text in ("a\nb", "\n\n\né", "  two  spaces  ", ""):
        assert ours.encode(text) == theirs.encode(text)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind))


def _model(*extra: bytes, trainer: bytes = b"", unknown: bytes = b"") -> bytes:
    return (
        (unknown or _piece("<unk>", kind=2))
        + _piece("<s>", kind=3)
        + _piece("</s>", kind=3)
        + b"".join(extra)
        + (_field(2, _field(3, 2) + trainer))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pieces: there are none"),
        (b"hello world", "is not a sentencepiece model: at the message"),
        (b"\x0a\xff\xff\xff\xff\x0f", "field 1 claims 4294967295 bytes, 0 are left"),
        (b"\x80" * 12, "a variable-length integer of more than 10 bytes"),
        (_model()[:-1], "field 2 claims"),
        (b"\x0a", "it ends in the middle of a field"),
        (b"\x0b", "wire type 3"),
        (_model(_field(1, _field(1, b"\xff"))), r"at pieces\[3\]: 'utf-8' codec can't decode"),
        (_model(_piece("")), r"pieces\[3\] must have text and a finite score, got ''"),
        (_model(_piece("a", float("nan"))), r"pieces\[3\] must have text and a finite score, got 'a' and nan"),
        (_model(_piece("<s>")), r"pieces\[3\] repeats piece 1, '<s>'"),
        (_model(trainer=_field(3, 1)), r"trainer_spec.model_type must be 2 \(BPE\) or 4 \(CHAR\), got 1"),
        (_model(trainer=_field(24, 1)), "only models that write a space as a leading '▁'"),
        (_model(trainer=_field(41, 9)), "trainer_spec.bos_id is 9, of 3 pieces"),
        (_model(unknown=_piece("<unk>")), "trainer_spec.unk_id is 0, which is not a piece of type UNKNOWN"),
        (_model(trainer=_field(40, b"x")), "at trainer_spec: an integer field holds bytes"),
    ],
)
def test_each_fault_of_a_model_file_is_named(tmp_path: Path, data: bytes, message: str):
    """FormatError names the file and what is wrong with which field."""
    path = tmp_path / "bad.model"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.load(path)
    assert "bad.model" in str(caught.value)


def test_a_model_written_by_hand_is_read(tmp_path: Path):
    """The writer of these tests and the reader agree on every field."""
    path = tmp_path / "small.model"
    pieces = [_piece("a", -1.0), _piece("b", -2.0), _piece("ab", -0.5), _piece("<x>", kind=4)]
    path.write_bytes(_model(*pieces, trainer=_field(43, -1)) + _field(3, _field(3, 0) + _field(4, 0)))
    model = read_sentencepiece(path)
    assert model.pieces[3:] == [("a", -1.0, 1), ("b", -2.0, 1), ("ab", -0.5, 1), ("<x>", 0.0, 4)]
    assert (model.pad_id, model.add_dummy_prefix, model.remove_extra_whitespaces) == (-1, False, False)
    assert Tokenizer.load(path).encode("aab<x>b") == [3, 5, 6, 4]


@pytest.mark.fuzz
def test_damaged_models_give_our_errors_only(trained: dict[str, Path], tmp_path: Path):
    """150 damaged files: each loads or raises one of our errors."""
    whole = trained["llama"].read_bytes()
    rng, path, refused = random.Random(0), tmp_path / "damaged.model", 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            Tokenizer.load(path).encode("the cat")
        except EntrenarError:
            refused += 1
    assert refused > 50
