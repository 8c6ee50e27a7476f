"""The first run: a small LLaMA reads small stories for a few minutes, and then tells some of its own.

Everything here is the ordinary road (prepare, train, generate, evaluate) with settings that suit two busy cores. The
stories come from a grammar, so three things are known that a real corpus hides: the fewest bits that any model could
spend on a story, whether a story that the model tells follows the rules, and whether it is new.
"""

import dataclasses
import gzip
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrenar.config import RunConfig
from entrenar.data import Corpus, DataConfig, Example, PrepareConfig, Tokenizer, held_out_batches, prepare, stories
from entrenar.files import atomic_write
from entrenar.infer import Evaluation, GenerateConfig, complete, evaluate
from entrenar.model import Llama, LlamaConfig
from entrenar.planning.threads import fastest_threads
from entrenar.recipe.models import open_model
from entrenar.recipe.pretrain import train
from entrenar.recipe.quickstart_config import ENOUGH_STEPS, NEW_SEED, NUM_STORIES, QuickstartConfig
from entrenar.recipe.start import Observer
from entrenar.train import CheckpointConfig, OptimConfig, Outcome, ScheduleConfig, TrainConfig

NUM_NEW_STORIES = 200
NUM_TOLD = 16
_LIVE = 4  # stories told at each evaluation while training
_TOKENS_PER_STORY, _TEMPERATURE = 256, 0.5
# The stories have about 500 words and forms. A tokenizer that holds each of them whole is what lets a model learn in
# minutes who is who: with 640 tokens, "hedgehog" in six pieces, none did (docs/log.md).
_STORY_VOCABULARY, _TEXT_VOCABULARY = 1024, 2048
_MOST_GZIPPED = 1 << 20  # tokens


@dataclass(frozen=True)
class Look:
    """A look at what the model writes, at a step of training.

    Attributes:
        texts: what it wrote, each from its own beginning.
        check: how well the stories hold together; None for a text of the user's.
    """

    texts: tuple[str, ...]
    check: stories.Check | None


@dataclass(frozen=True)
class QuickstartReport:
    """The results of the first run; bits per byte compare the model with other compressors of the same text.

    Attributes:
        best_bits_per_byte: what the grammar itself needs for the new stories; None for a text of the user's.
        gzip_bits_per_byte: what `gzip -9` needs for the same text.
        num_known: how many of the texts told at the end stand in the training text word for word.
    """

    outcome: Outcome
    run_dir: Path
    before: Look
    after: Look
    evaluation: Evaluation | None
    best_bits_per_byte: float | None
    gzip_bits_per_byte: float
    num_known: int

    @property
    def is_undertrained(self) -> bool:
        """Return whether the machine managed fewer steps than good stories need."""
        return self.outcome.step < ENOUGH_STEPS


def quickstart(
    config: QuickstartConfig, observer: Observer, on_look: Callable[[Look], None] = lambda _: None
) -> QuickstartReport:
    """Prepare, train, and look; `on_look` is told what the model writes before, while and after it trains.

    Raises:
        ConfigError, DataError, TrainingHalted, MachineError.
    """
    if config.threads is None:
        config = config.model_copy(update={"threads": fastest_threads()})
        observer.on_stage(
            f"Training on {config.threads} thread{'s' if config.threads != 1 else ''}, the fastest just now"
        )
    told = list(stories.stories(NUM_STORIES, config.seed)) if config.text is None else []
    corpus = _prepare(config, [story.text for story in told], observer)
    looks: list[Look] = []

    def look(model: Llama, tokenizer: Tokenizer) -> Mapping[str, float]:
        looks.append(_look(model, tokenizer, _LIVE, config.seed, is_story=config.text is None))
        on_look(looks[-1])
        check = looks[-1].check
        return {} if check is None else {"keeps_characters": check.keeps_characters}

    trained = train(run_config(config, corpus), overwrite=True, observer=dataclasses.replace(observer, on_look=look))
    model, tokenizer = open_model(trained.run_dir)
    after = _look(model, tokenizer, NUM_TOLD, config.seed + 1, is_story=config.text is None)
    known = {story.text for story in told}
    new = list(stories.stories(NUM_NEW_STORIES, NEW_SEED)) if told else []
    texts = [story.text for story in new] or [_held_out_text(corpus, tokenizer)]
    evaluation = measure(model, tokenizer, texts) if new else trained.after
    return QuickstartReport(
        outcome=trained.outcome,
        run_dir=trained.run_dir,
        before=looks[0],
        after=after,
        evaluation=evaluation,
        best_bits_per_byte=sum(story.bits for story in new) / _num_bytes(texts) if new else None,
        gzip_bits_per_byte=8 * len(gzip.compress("\n".join(texts).encode(), 9)) / _num_bytes(texts),
        num_known=sum(text in known for text in after.texts),
    )


def run_config(config: QuickstartConfig, corpus: Path) -> RunConfig:
    """Return the quickstart's training run: an ordinary config that `--resume` continues."""
    vocab_size = Tokenizer.load(corpus).vocab_size
    is_story = config.text is None
    return RunConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        model=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            num_layers=2 if is_story else 4,
            num_heads=6,
            intermediate_size=256 if is_story else 512,
            max_seq_len=512,
            tie_word_embeddings=True,
        ),
        data=DataConfig(corpus=(corpus,), batch_size=8, seq_len=256, max_eval_batches=8),
        train=TrainConfig(max_time_s=60 * config.minutes, eval_every=200, threads=config.threads, seed=config.seed),
        optim=OptimConfig(optimizer="muon", lr=0.015, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20),
        checkpoint=CheckpointConfig(save_every=0, keep_best=False),
    )


def measure(model: Llama, tokenizer: Tokenizer, texts: Sequence[str]) -> Evaluation:
    """Return what the model spends on whole texts, each from its beginning to its end token."""
    examples = [_example(tokenizer, text, number) for number, text in enumerate(texts)]
    length = max(example.num_inputs for example in examples)
    found = evaluate(model, held_out_batches(examples, batch_size=8, seq_len=max(length, 512)))
    bits = found.loss * found.num_targets / math.log(2)
    return dataclasses.replace(found, bits_per_byte=bits / _num_bytes(texts), num_bytes=_num_bytes(texts))


def _example(tokenizer: Tokenizer, text: str, number: int) -> Example:
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return Example(f"story {number}", np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_))


def _num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _prepare(config: QuickstartConfig, texts: Sequence[str], observer: Observer) -> Path:
    """Write the corpus, unless the very same one is there."""
    if config.text is not None:
        folder = config.corpora_dir / f"{config.name}-text"
        observer.on_stage(f"Reading {config.text}")
        prepare([config.text], folder, PrepareConfig(vocab_size=_TEXT_VOCABULARY), progress=observer.on_prepare)
        return folder
    source, folder = config.corpora_dir / "stories.jsonl", config.corpora_dir / "stories"
    size = _num_bytes(texts)
    observer.on_stage(f"Telling {len(texts):,} stories from a grammar, {size / 1e6:.1f} MB: {source}")
    source.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(source, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([source], folder, PrepareConfig(vocab_size=_STORY_VOCABULARY), progress=observer.on_prepare)
    return folder


def _look(model: Llama, tokenizer: Tokenizer, count: int, seed: int, *, is_story: bool) -> Look:
    config = GenerateConfig(max_new_tokens=_TOKENS_PER_STORY, temperature=_TEMPERATURE, seed=seed)
    texts = tuple(one.text for one in complete(model, tokenizer, [""] * count, config))
    return Look(texts, stories.check(texts) if is_story else None)


def _held_out_text(corpus: Path, tokenizer: Tokenizer) -> str:
    stream = Corpus.open(corpus).stream("val")
    return tokenizer.decode(stream.read(0, min(len(stream), _MOST_GZIPPED)).tolist())
