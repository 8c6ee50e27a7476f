"""Fuzz what describes a model, a run or its data: each document is read, or refused by an error of ours.

    python fuzz/fuzz_targets/documents.py -runs=1000000 -max_len=1024

The inputs are edits of documents that are right: a value of another type, size or sign, a key that is missing or twice
there, a file that is gone. So they get past the syntax, and past the hash that a manifest has of itself. The first byte
chooses the reader: checkpoint, adapter, corpus, config file, chat template, GGUF metadata, weight index, replay bundle,
records. `--planted` lets one reader trust a type, which must be found.
"""

import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import torch

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.config_file import load_config, load_finetune_config
    from entrenar.data import Corpus, PrepareConfig, prepare
    from entrenar.data.sft import chat_worker
    from entrenar.errors import EntrenarError
    from entrenar.interop import gguf_metadata, hf, hf_files, hf_peft
    from entrenar.model import Llama, LlamaConfig
    from entrenar.peft import LoraConfig, from_base
    from entrenar.runs import RunFolder
    from entrenar.train import checkpoint, manifest
    from entrenar.train.replay import Bundle

torch.set_num_threads(1)
PLANTED = "--planted" in sys.argv
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108
CONFIG = LlamaConfig(vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_seq_len=16)
STRANGE = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, math.inf, -math.inf, math.nan, "", "a",
    "/etc/passwd", "../x", "\ud800", "1", "true", [], {}, [None], [[]], {"": 0}, [1, 2, 3], ["a"] * 3, {"a": {"a": {}}},
)  # fmt: skip


def edited(provider: atheris.FuzzedDataProvider, document: Any) -> Any:
    """Return a copy of a document with some of its values replaced, removed or moved."""
    document = json.loads(json.dumps(document))
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        holder, key = document, None
        for _ in range(provider.ConsumeIntInRange(0, 4)):
            below = holder if key is None else holder[key]
            keys = (
                list(below) if isinstance(below, dict) else list(range(len(below))) if isinstance(below, list) else []
            )
            if not keys:
                break
            holder, key = below, keys[provider.ConsumeIntInRange(0, len(keys) - 1)]
        value = copy.deepcopy(STRANGE[provider.ConsumeIntInRange(0, len(STRANGE) - 1)])
        if key is None:
            document = value if provider.ConsumeBool() else document
        elif provider.ConsumeIntInRange(0, 3) == 0 and isinstance(holder, dict):
            del holder[key]
        elif provider.ConsumeIntInRange(0, 3) == 0 and isinstance(holder, dict):
            holder[provider.ConsumeUnicodeNoSurrogates(4)] = value
        else:
            holder[key] = value
    return document


def write(path: Path, document: Any) -> None:
    """Write a document as JSON; what JSON has no word for is written as Python's json does."""
    path.write_text(json.dumps(document), encoding="utf-8")


# ---- documents that are right ----


def some_model() -> Llama:
    """Return a tiny model."""
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


MODEL = some_model()
LORA = some_model()
from_base(LORA, LoraConfig(rank=2), torch.Generator().manual_seed(0))
STATE = {
    "counters": {"step": 3, "targets": 9, "micro_batches": 3, "elapsed_s": 1.0, "best_held_out_loss": 2.0,
                 "evaluations_since_best": 0, "lr_factor": 1.0},
    "loader": {"epoch": 0, "row": 3}, "rng": {"torch": "00"}, "monitor": {}, "rows": None, "held_out": {"loss": 2.0},
    "config": {"model": {"vocab_size": 300}}, "git_revision": None, "code": {},
}  # fmt: skip


def save_checkpoint(folder: Path) -> None:
    """Write a checkpoint as a run does."""
    weights = dict(MODEL.named_parameters())
    snapshot = checkpoint.Snapshot(3, weights, {"a": torch.zeros(2)}, STATE, held_out_loss=2.0)
    checkpoint.write(
        folder, snapshot, lambda place, tensors: hf.save_model(place, CONFIG, tensors), staged=lambda: None,
        before_commit=lambda: None,
    )  # fmt: skip


ADAPTER, CORPUS, MODEL_FOLDER, RUN = (FOLDER / name for name in ("adapter", "corpus", "hf", "run"))
CHECKPOINT = FOLDER / "step-00000003"
save_checkpoint(CHECKPOINT)
for made in (ADAPTER, MODEL_FOLDER, RUN):
    made.mkdir()
hf_peft.save_adapter(ADAPTER, LORA, LoraConfig(rank=2), base=hf_peft.identify_base(MODEL))
(FOLDER / "text.txt").write_text("one two three four\n" * 400)
prepare([FOLDER / "text.txt"], CORPUS, PrepareConfig(vocab_size=270, threads=1))
hf.save_model(MODEL_FOLDER, CONFIG, dict(MODEL.named_parameters()), max_shard_bytes=4000)
Bundle(3, "a", None, {"row": 1}, None, ("00",), {"loss": 1.0}, {}, {"torch": "2"}, None).write(
    FOLDER / "bundle" / "b.json"
)
RIGHT = {
    "manifest": json.loads((CHECKPOINT / "manifest.json").read_text()),
    "state": json.loads((CHECKPOINT / "state.json").read_text()),
    "adapter": json.loads((ADAPTER / "adapter_config.json").read_text()),
    "corpus": json.loads((CORPUS / "manifest.json").read_text()),
    "index": json.loads((MODEL_FOLDER / "model.safetensors.index.json").read_text()),
    "hf": json.loads((MODEL_FOLDER / "config.json").read_text()),
    "gguf": {"general.architecture": "llama", **gguf_metadata.architecture_metadata(CONFIG),
             "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
             "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1],
             "tokenizer.ggml.bos_token_id": 0},
    "config": {"name": "a", "preset": "tiny", "data": {"corpus": ["c"], "batch_size": 2, "weights": [1.0]},
               "model": {"num_layers": 1}, "train": {"max_steps": 3, "threads": 1}, "optim": {"lr": 1e-3},
               "checkpoint": {"save_every": 2}},
    "tuning": {"model": "m", "method": "lora", "sft": {"data": ["r.jsonl"], "seq_len": 8}, "lora": {"rank": 2},
               "train": {"max_steps": 3}},
    "step": {"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "targets": 3, "targets_per_s": 1.0, "elapsed_s": 1.0,
             "eta_s": None, "epoch": 0.1, "held_out": {"loss": 1.0}, "phases_s": {"data": 0.1}},
    "event": {"step": 1, "kind": "a", "message": "b"},
    "bundle": json.loads((FOLDER / "bundle" / "b.json").read_text()),
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes", "tool_calls": []}],
}  # fmt: skip
PIECES = (
    "{% for m in messages %}", "{{ m.content }}", "{{ m['role'] }}", "{% endfor %}", "{% if tools %}", "{% endif %}",
    "{% generation %}", "{% endgeneration %}", "{{ bos_token }}", "{% set a = messages[0] %}", "{{ a|tojson }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ messages.__class__ }}", "{% break %}",
    "{{ m.x.y }}", "{% macro f(x) %}{{ x }}{% endmacro %}", "{{ f(1) }}", "{{ a.append(1) }}", "{{ 1 // 0 }}",
    "{{ [1]|first }}",
)  # fmt: skip


# ---- readers ----


def read_checkpoint(provider: atheris.FuzzedDataProvider) -> None:
    """A manifest that agrees with its own hash, over files that may not agree with it."""
    document = edited(provider, RIGHT["manifest"])
    if isinstance(document, dict):
        document.pop("manifest_sha256", None)
        document["manifest_sha256"] = manifest._hash(document)
    write(CHECKPOINT / "manifest.json", document)
    checkpoint.load(CHECKPOINT)


def read_state(provider: atheris.FuzzedDataProvider) -> None:
    """A state of any content, with a manifest that vouches for it."""
    write(CHECKPOINT / "state.json", edited(provider, RIGHT["state"]))
    (CHECKPOINT / "manifest.json").unlink(missing_ok=True)
    manifest.write_manifest(CHECKPOINT, {key: RIGHT["manifest"][key] for key in RIGHT["manifest"]
                                         if key not in ("files", "manifest_sha256", "version")})  # fmt: skip
    checkpoint.load(CHECKPOINT)


def read_adapter(provider: atheris.FuzzedDataProvider) -> None:
    """An adapter's config over the weights of a right one."""
    write(ADAPTER / "adapter_config.json", edited(provider, RIGHT["adapter"]))
    hf_peft.read_base(ADAPTER)
    hf_peft.load_adapter(ADAPTER, some_model())


def read_corpus(provider: atheris.FuzzedDataProvider) -> None:
    """The manifest of a corpus."""
    write(CORPUS / "manifest.json", edited(provider, RIGHT["corpus"]))
    opened = Corpus.open(CORPUS, verify=provider.ConsumeBool())
    stream = opened.stream("train")
    stream.read(0, min(len(stream), 8))


def read_config(provider: atheris.FuzzedDataProvider) -> None:
    """A config file, as JSON or as TOML cut anywhere, of pre-training or fine-tuning."""
    is_tuning = provider.ConsumeBool()
    load: Callable[[Path], object] = load_finetune_config if is_tuning else load_config
    if provider.ConsumeBool():
        path = FOLDER / "run.json"
        write(path, edited(provider, RIGHT["tuning" if is_tuning else "config"]))
    else:
        path = FOLDER / "run.toml"
        text = '[train]\nmax_steps = 3\n[optim]\nlr = 1e-3\n[data]\ncorpus = ["c"]\n'
        place = provider.ConsumeIntInRange(0, len(text))
        path.write_bytes((text[:place] + provider.ConsumeUnicodeNoSurrogates(12) + text[place:]).encode())
    load(path)


def read_template(provider: atheris.FuzzedDataProvider) -> None:
    """A template of pieces of templates; the worker's own limits on time and memory are tested elsewhere."""
    count = provider.ConsumeIntInRange(0, 8)
    source = "".join(PIECES[provider.ConsumeIntInRange(0, len(PIECES) - 1)] for _ in range(count))
    source += provider.ConsumeUnicodeNoSurrogates(8)
    try:
        template = chat_worker.environment("2026-01-01").from_string(source)
    except chat_worker._PROBLEMS:
        return
    said = chat_worker.answer(
        template, {"messages": edited(provider, RIGHT["messages"]), "tools": None, "bos_token": "<s>"}
    )
    assert ("error" in said) != ("text" in said), said
    json.dumps(said)


def read_gguf(provider: atheris.FuzzedDataProvider) -> None:
    """Metadata of a GGUF file, after the bytes are read."""
    metadata = edited(provider, RIGHT["gguf"])
    if isinstance(metadata, dict):
        gguf_metadata.read_architecture(Path("model.gguf"), metadata, 300, is_tied=True, factors=None)
        gguf_metadata.read_vocabulary(Path("model.gguf"), metadata)


def read_index(provider: atheris.FuzzedDataProvider) -> None:
    """The index of shards, and the config beside it."""
    write(MODEL_FOLDER / "model.safetensors.index.json", edited(provider, RIGHT["index"]))
    write(MODEL_FOLDER / "config.json", edited(provider, RIGHT["hf"]) if provider.ConsumeBool() else RIGHT["hf"])
    hf_files.read_entries(MODEL_FOLDER)
    hf.read_config(MODEL_FOLDER)


def read_bundle(provider: atheris.FuzzedDataProvider) -> None:
    """The bundle of a step that an alarm stopped."""
    write(FOLDER / "bundle.json", edited(provider, RIGHT["bundle"]))
    found = Bundle.read(FOLDER / "bundle.json")
    if PLANTED:
        sorted(found.monitor)


def read_records(provider: atheris.FuzzedDataProvider) -> None:
    """Lines of metrics and events, which may be cut."""
    run = RunFolder(RUN)
    for path, name in ((run.metrics, "step"), (run.events, "event")):
        line = json.dumps(edited(provider, RIGHT[name])) + "\n"
        path.write_bytes((json.dumps(RIGHT[name]) + "\n" + line[: provider.ConsumeIntInRange(0, len(line))]).encode())
    list(run.read_steps())
    list(run.read_events())


READERS = (
    read_checkpoint, read_state, read_adapter, read_corpus, read_config, read_template, read_gguf, read_index,
    read_bundle, read_records,
)  # fmt: skip


def check(data: bytes) -> None:
    """Give an edit to one reader."""
    provider = atheris.FuzzedDataProvider(data)
    reader = read_bundle if PLANTED else READERS[provider.ConsumeIntInRange(0, len(READERS) - 1)]
    try:
        reader(provider)
    except EntrenarError:
        pass


if __name__ == "__main__":
    np.seterr(all="ignore")
    os.chdir(FOLDER)
    atheris.Setup([word for word in sys.argv if word != "--planted"], check)
    atheris.Fuzz()
