"""Talking in the terminal: commands, faults, and exit codes."""

import io

import pytest
import torch

from entrenar.cli.main import main
from entrenar.data import Tokenizer, train_bpe
from entrenar.interop import save_model
from entrenar.model import Llama, LlamaConfig

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A folder with a tiny random model, a tokenizer and a template."""
    folder = tmp_path_factory.mktemp("talker")
    trained = train_bpe(["user: hello assistant: system: be brief"] * 20, 300)
    tokenizer = Tokenizer(dict(trained.content), {**trained.config, "chat_template": TEMPLATE})
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16,
        max_seq_len=128, eos_token_id=tokenizer.eos_id, initializer_range=0.5,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(folder, config, model.state_dict())
    tokenizer.save(folder)
    return folder, model.eval(), tokenizer


def test_commands(talker, monkeypatch, capsys):
    """The terminal's side, from input to exit code."""
    lines = "hello\n/reset\n\n/system be brief\nhello\n/nonsense\n<|eos|>\n/quit\nnot read\n"
    stream = io.StringIO(lines)
    monkeypatch.setattr("sys.stdin", stream)
    assert main(["chat", str(talker[0]), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert "no command /nonsense; /reset starts over" in captured.out
    assert "spells the control token" in captured.err
    assert stream.readline() == "not read\n"


def test_a_model_without_template_says_so(talker, tmp_path, capsys):
    """Exit code 2 and the way out; a template can be given."""
    _, model, tokenizer = talker
    save_model(tmp_path, model.config, model.state_dict())
    Tokenizer(dict(tokenizer.content), {**tokenizer.config, "chat_template": None}).save(tmp_path)
    assert main(["chat", str(tmp_path)]) == 2
    assert "has no chat_template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature: Input should be greater than or equal to 0"),
        (["--seed", str(2**70)], "--seed: Input should be less than"),
        (["--template", "nowhere.jinja"], "--template must be a text file with a chat template, got nowhere.jinja"),
        (["--eos", "<|no such token|>"], "an end token must be a token's name or an id below 287"),
    ],
)
def test_faulty_options_are_refused(talker, capsys, words, message):
    """Each is exit code 2 and a sentence."""
    assert main(["chat", str(talker[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_template_that_refuses_does_not_end_the_chat(talker, tmp_path, monkeypatch, capsys):
    """The terminal goes on after a sentence."""
    refusing = tmp_path / "template.jinja"
    refusing.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("/system x\nhi\n/system\nhi\n"))
    assert main(["chat", str(talker[0]), "--template", str(refusing), "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "no system; say it another way, or start over" in captured.err
    assert captured.out.count("\n") >= 1
