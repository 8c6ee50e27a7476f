"""A model without a template is trained on Alpaca's prompts, and asked in them later, by anyone's program."""

import pytest
import transformers

from entrenar.data import train_bpe
from entrenar.data.sft.alpaca import alpaca_template, has_inputs, marking_answers, tokenizer_to_train
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.data.sft.encode import Encoder
from entrenar.data.sft.shapes import read_shape
from entrenar.data.tokenizer.tokenizer import Tokenizer

ROWS = [
    {"instruction": "do", "output": "done"},
    {"instruction": "do", "input": "this", "output": "done"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {
        "messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"},
            {"role": "user", "content": "\n"}, {"role": "assistant", "content": "e\n"},
        ]
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a template."""
    return train_bpe(["### Instruction: do this ### Response: done"] * 9, 400)


def turns(row):
    """Return a row as the messages that the template knows."""
    return [{"role": turn.role, "content": turn.content} for turn in read_shape(row, None).turns]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_trained_ids_are_those_of_the_saved_template(row, adds_bos, plain, tmp_path):
    """Training's ids, the ids of `chat`, and transformers' ids are one."""
    tokenizer = Tokenizer(dict(plain.content), {**plain.config, "add_bos_token": adds_bos})
    with Encoder(tokenizer, "auto", "answers") as encoder:
        trained = encoder.encode(read_shape(row, None), "").ids.tolist()
    saved = tokenizer_to_train(tokenizer, "auto")
    saved.save(tmp_path)
    with ChatTemplate(Tokenizer.load(tmp_path)) as chat:
        assert chat.encode(turns(row)) == trained
        prompt = chat.encode(turns(row)[:-1], add_generation_prompt=True)
        assert trained[: len(prompt)] == prompt
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(turns(row), tokenize=True, return_dict=False) == trained


@pytest.mark.parametrize("row", ROWS)
def test_a_run_on_the_saved_template_trains_the_same(row, plain, tmp_path):
    """A second fine-tuning, over the first one's model, writes rows as the first one did."""
    tokenizer_to_train(plain, "auto").save(tmp_path)
    examples = []
    for tokenizer in (plain, Tokenizer.load(tmp_path)):
        with Encoder(tokenizer, "auto", "answers") as encoder:
            examples.append(encoder.encode(read_shape(row, None), ""))
    assert examples[0].ids.tolist() == examples[1].ids.tolist()
    assert examples[0].is_trained.tolist() == examples[1].is_trained.tolist()


def test_a_template_of_its_own_stays_unless_alpaca_is_asked_for(plain):
    """Auto keeps the tokenizer's, alpaca replaces it, plain and chat change nothing."""
    own = Tokenizer(dict(plain.content), {**plain.config, "chat_template": "{{ messages[0]['content'] }}"})
    assert tokenizer_to_train(own, "auto") is own
    assert tokenizer_to_train(own, "chat") is own
    assert tokenizer_to_train(plain, "plain") is plain
    assert marking_answers(own) is own
    assert not has_inputs(own)
    replaced = tokenizer_to_train(own, "alpaca")
    assert replaced.chat_template == alpaca_template(own)
    assert has_inputs(replaced)
    assert "{% generation" in marking_answers(replaced).chat_template
    assert "{% generation" not in replaced.chat_template
