"""Figures beside the loss: right tokens, right answers, right labels, each equal to a count made the plain way."""

import numpy as np
import pytest
import torch

from entrenar.data import Batch, train_bpe
from entrenar.errors import DataError
from entrenar.infer import Question, accuracy, exact_match, token_hits, write_answers
from entrenar.model import Llama, LlamaConfig


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and ran"] * 4, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random model; its likeliest tokens are as good as any."""
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
        max_seq_len=48, initializer_range=0.5, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(requires_grad=False)


def greedy(model, prompt, count):
    """The likeliest continuation, one whole forward for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_greedy_and_do_not_depend_on_the_batch(model, tokenizer):
    """What is written in a batch of prompts of different length is what each prompt gives alone."""
    prompts = [tokenizer.encode(text, bos=True) for text in ("the cat", "on the mat and", "ran")]
    alone = []
    for prompt in prompts:
        stream = tokenizer.decode_stream(prompt)
        ids = greedy(model, prompt, 6)
        alone.append(
            stream.feed(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids) + stream.finish()
        )
    assert write_answers(model, tokenizer, prompts, 6) == alone
    assert write_answers(model, tokenizer, prompts, 6, rows=1) == alone
    assert write_answers(model, tokenizer, [], 6) == []


def test_exact_match_compares_whole_answers(model, tokenizer):
    """The model's own answer is right, another is not, and spaces around an answer do not count."""
    prompt = tuple(tokenizer.encode("the cat", bos=True))
    own = write_answers(model, tokenizer, [prompt], 5)[0]
    right = (*tokenizer.encode(f" {own.strip()}"), tokenizer.eos_id)
    questions = [Question(prompt, right), Question(prompt, (*tokenizer.encode("xyz"), tokenizer.eos_id))]
    assert exact_match(model, tokenizer, questions, 5) == [True, False]


def test_accuracy_chooses_the_likeliest_label(model, tokenizer):
    """The label is chosen by the sum of its tokens' log probabilities, whatever its length."""
    labels = [tuple(tokenizer.encode(text)) for text in (" cat", " the mat sat", "x")]
    prompts = [tuple(tokenizer.encode(text, bos=True)) for text in ("the", "on the", "ran and", "mat")]
    best = []
    for prompt in prompts:
        scores = []
        for label in labels:
            logits = model(torch.tensor([[*prompt, *label]]))[0].double().log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(label)))
        best.append(labels[int(np.argmax(scores))])
    wanted = [best[0], best[1], labels[(labels.index(best[2]) + 1) % 3], best[3]]
    questions = [Question(prompt, label) for prompt, label in zip(prompts, wanted, strict=True)]
    extra = [Question(prompts[0], label) for label in labels]
    assert accuracy(model, questions + extra)[:4] == [True, True, False, True]
    many = accuracy(model, (questions + extra) * 3)
    assert many == accuracy(model, questions + extra) * 3
    assert sum(many) == 3 * (3 + 1)


def test_a_task_needs_questions_and_labels(model, tokenizer):
    """No row, or answers that are no labels, cannot be measured."""
    question = Question((1, 2), (3,))
    with pytest.raises(DataError, match="a task needs at least one row with an answer"):
        exact_match(model, tokenizer, [], 4)
    with pytest.raises(DataError, match="metric = accuracy needs 2 to 64 different answers"):
        accuracy(model, [question, question])


def test_token_hits_counts_the_likeliest_targets(model):
    """Only targets count, and in a packed row each document by itself."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 200, (2, 12), generator=generator)
    documents = (((0, 5), (5, 12)), ((0, 12),))
    likeliest = model(ids, documents=documents).argmax(-1)
    targets = likeliest.clone()
    targets[0, :3] = -100
    targets[1, 4:8] = (targets[1, 4:8] + 1) % 200
    batch = Batch(ids, targets, documents, None)
    assert list(token_hits(model, [batch, batch])) == [(17, 21), (17, 21)]
