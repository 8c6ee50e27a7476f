"""Text comes in whole characters, without prompt, stop text or end token, however tokens cut it."""

import codecs
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer
from entrenar.errors import ConfigError
from entrenar.infer import Completion, GenerateConfig, TextTokenizer, complete, named_tokens, stream
from entrenar.infer.complete import StopFilter
from entrenar.model import Llama, LlamaConfig


class PieceDecoder:
    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, /) -> str:
        return self._utf8.decode(self._table[token_id])


class Pieces:
    """A tokenizer whose token i stands for piece i; text is encoded as the one piece that it equals."""

    add_bos = True
    bos_id = 0
    special_ids = frozenset({0})

    def __init__(self, *pieces: bytes) -> None:
        self.table = [b"", *pieces]

    def id_of(self, token: str, /) -> int | None:
        return {"<first>": 0}.get(token)

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def encode(self, text: str, *, bos: bool, allow_special: bool = False) -> list[int]:  # noqa: ARG002
        ids = [self.table.index(text.encode())] if text else []
        return [0, *ids] if bos else ids

    def decode_stream(self, context: Iterable[int], /) -> PieceDecoder:
        assert list(context), "the prompt is the context"
        return PieceDecoder(self.table)


def counting_model(num_tokens: int, eos: int | None = None, context: int = 64) -> Llama:
    """A model that writes token i + 1 after token i: silent blocks between a one-hot embedding and a shifted head."""
    config = LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=2 * num_tokens,
        num_layers=1,
        num_heads=1,
        intermediate_size=2,
        max_seq_len=context,
        eos_token_id=eos,
    )
    model = Llama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0 if weight.ndim == 1 else 0.0)
        model.model.embed_tokens.weight[:, :num_tokens] = torch.eye(num_tokens)
        model.head_weight[:, :num_tokens] = torch.eye(num_tokens).roll(1, dims=0)
    return model


def greedy(max_new_tokens: int, **options: object) -> GenerateConfig:
    return GenerateConfig(max_new_tokens=max_new_tokens, temperature=0, **options)


def test_characters_cut_by_tokens_arrive_whole() -> None:
    """A character whose bytes lie in several tokens comes in one piece, with the last of them."""
    tokenizer = Pieces(b"a", b"\xf0\x9f", b"\x98", b"\x80\xc3", b"\xa9", b"z")
    model = counting_model(7)
    assert list(stream(model, tokenizer, "", greedy(6))) == ["a", "😀", "é", "z"]
    assert complete(model, tokenizer, [""], greedy(6))[0].text == "a😀éz"


def test_half_a_character_at_the_end_is_not_shown() -> None:
    """Where writing ends in the middle of a character, the text ends before it."""
    tokenizer = Pieces(b"a", b"\xf0\x9f", b"\x98")
    assert complete(counting_model(4), tokenizer, [""], greedy(3)) == [Completion("a", (1, 2, 3), "length")]


def test_stop_text_across_tokens_is_never_shown() -> None:
    """A stop text that several tokens make up ends the text before its first character."""
    tokenizer = Pieces(b"one ", b"tw", b"o#", b"##", b"# three")
    model = counting_model(6)
    pieces = list(stream(model, tokenizer, "", greedy(5, stop=("####",))))
    assert pieces == ["one ", "tw", "o"]
    (completion,) = complete(model, tokenizer, [""], greedy(5, stop=("####",)))
    assert completion == Completion("one two", (1, 2, 3, 4, 5), "stop")


def test_text_held_back_for_a_stop_that_does_not_come_is_shown() -> None:
    """The beginning of a stop text appears once it is certain that the rest does not follow."""
    tokenizer = Pieces(b"one #", b"# tw", b"o##")
    assert list(stream(counting_model(4), tokenizer, "", greedy(3, stop=("####",)))) == ["one ", "## tw", "o", "##"]


def test_rows_of_a_batch_end_each_in_its_way() -> None:
    """Each prompt has its own text and its own reason to end."""
    tokenizer = Pieces(b"a", b"b", b"c", b"d", b"e", b"f", b"g")
    model = counting_model(8, eos=7, context=6)
    completions = complete(model, tokenizer, ["a", "f", "", "d"], greedy(3, stop=("d",)))
    assert completions == [
        Completion("bc", (2, 3, 4), "stop"),
        Completion("", (), "eos"),
        Completion("abc", (1, 2, 3), "length"),
        Completion("ef", (5, 6), "eos"),
    ]
    (cut,) = complete(model, tokenizer, [""], greedy(50, eos_token_ids=()))
    assert cut == Completion("abcde", (1, 2, 3, 4, 5), "context")


def test_a_stop_that_names_a_control_token_ends_at_its_id() -> None:
    """A control token never shows up in the text, so its id is what stops; it is no end token of the model."""
    tokenizer = Pieces(b"a", b"b", b"c")
    model = counting_model(4)  # after the last piece it writes token 0 again
    (completion,) = complete(model, tokenizer, ["a"], greedy(9, stop=("<first>",)))
    assert completion == Completion("bc", (2, 3), "stop")
    assert list(stream(model, tokenizer, "a", greedy(9, stop=("<first>",)))) == ["b", "c"]


def test_end_tokens_are_named_or_numbered() -> None:
    """A name wins over a number; what is neither is refused."""
    tokenizer = Pieces(b"a", b"b")
    assert named_tokens(tokenizer, ["<first>", "2"], 3) == (0, 2)
    for word in ("nothing", "3", "-1", ""):
        with pytest.raises(ConfigError, match=rf"a token's name or an id below 3, got '{word}'"):
            named_tokens(tokenizer, [word], 3)


def test_the_projects_tokenizer_fits() -> None:
    """`entrenar.data.Tokenizer` has what generation asks for."""
    needed: type[TextTokenizer] = Tokenizer
    assert callable(needed.encode)
    assert callable(needed.decode_stream)


TEXTS = st.text(alphabet="ab#", max_size=24)


@pytest.mark.property
@pytest.mark.kills("infer.complete", "released = len(self._held) - self._num_held()", "released = len(self._held)")
@settings(deadline=None, max_examples=300)
@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3), data=st.data())
def test_stop_filter_does_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """Cut anywhere, the text that passes is what stands before the stop text that is complete first."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
    stop_filter, passed, place = StopFilter(stops), "", 0
    while place < len(text):
        size = data.draw(st.integers(1, len(text) - place))
        passed += stop_filter.push(text[place : place + size])
        assert expected.startswith(passed)
        place += size
    assert passed + stop_filter.finish() == expected
    assert stop_filter.is_stopped == bool(ends)
