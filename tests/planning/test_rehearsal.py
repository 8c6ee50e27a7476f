"""A step without bytes allocates what the step in earnest allocates."""

import os
from itertools import chain
from pathlib import Path

import pytest
import torch

from entrenar.config_file import load_config, load_finetune_config
from entrenar.interop import load_model, save_model
from entrenar.interop.assemble import give_storage
from entrenar.model import Llama
from entrenar.peft import from_base
from entrenar.planning import Ledger, plan_run, take_step
from entrenar.planning.run_plan import batches_of, full_rows, scene_of
from entrenar.planning.skeleton import give_shapes, skeleton
from entrenar.train import build_optimizer

SMALL = {
    "preset": "tiny", "model.num_layers": "2", "model.hidden_size": "64", "model.vocab_size": "512",
    "model.intermediate_size": "96", "model.num_heads": "4", "model.num_kv_heads": "2", "compute_dtype": "float32",
    "data.batch_size": "2", "data.seq_len": "32",
}  # fmt: skip
PRETRAINING = [
    {},
    {"train.precision": "bfloat16"},
    {"train.precision": "bfloat16", "compute_dtype": "bfloat16", "data.mask_documents": "false"},
    {"train.checkpointing": "selective"},
    {"train.checkpointing": "full", "train.precision": "bfloat16"},
    {"optim.optimizer": "muon"},
    {"model.tie_word_embeddings": "false", "train.grad_accum_steps": "2", "train.precision": "bfloat16"},
]
FINETUNING = [
    {"method": "full"},
    {"method": "lora", "train.precision": "bfloat16"},
    {"method": "lora", "lora.lora_dropout": "0.1", "lora.use_dora": "true"},
    {"method": "lora", "lora.lora_init": "pissa", "sft.batching": "padded"},
    {"method": "qlora", "train.precision": "bfloat16"},
]


class Gone:
    """A ledger, and from which storage on its step begins."""

    def __init__(self, ledger, first):
        self.ledger, self.lives, self.timeline = ledger, ledger.lives[first:], timeline(ledger.lives[first:])
        self.flops, self.moved_bytes = ledger.flops, ledger.moved_bytes


def timeline(lives):
    """Return each birth (size, +1) and death (size, -1) in order."""
    events = [(life.born, life.size_bytes, 1) for life in lives]
    events += [(life.died, life.size_bytes, -1) for life in lives if life.died is not None]
    return [(size, sign) for _, size, sign in sorted(events)]


def both_ways(config, folder=None, micro_batches=1):
    """Go through the same two steps in earnest and without bytes."""
    return [go(config, folder, micro_batches, has_bytes=has_bytes) for has_bytes in (True, False)]


def go(config, folder, micro_batches, *, has_bytes):
    ledger = Ledger(has_bytes=has_bytes)
    model, mapped = _model_in_earnest(config, folder) if has_bytes else _model_without_bytes(config, folder, ledger)
    batches = batches_of(config)
    rows, length = batches.batch_size, min(batches.seq_len, model.config.context_length)
    batch = full_rows(rows, length, model.config.vocab_size, has_documents=batches.packs_documents)
    scene = scene_of(config, model, [batch] * micro_batches, mapped)
    with ledger:
        ledger.mark([*model.parameters(), *model.buffers()], "weights")
        first, flops, moved = ledger.count, ledger.flops, ledger.moved_bytes
        optimizer = build_optimizer(model.named_parameters(), scene.optim, scene.precision)
        for _ in range(2):
            take_step(scene, optimizer, ledger)
    gone = Gone(ledger, first)
    gone.flops, gone.moved_bytes = gone.flops - flops, gone.moved_bytes - moved
    return gone


def _model_without_bytes(config, folder, ledger):
    begun = skeleton(config, folder)
    with ledger:
        mapped = give_shapes(config, begun, ledger)
    return begun.model, mapped


def _model_in_earnest(config, folder):
    if folder is not None:
        model = load_model(folder, dtype=config.stored_dtype, quantize=config.method == "qlora")
        if config.method != "full":
            from_base(model, config.lora, torch.Generator().manual_seed(0))
        return model, []
    with torch.device("meta"):
        model = Llama(config.model)
    give_storage(model, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    return model, []


@pytest.mark.parametrize("flags", PRETRAINING, ids=lambda flags: "-".join(flags.values()) or "plain")
def test_a_rehearsed_step_allocates_what_the_step_allocates(flags):
    """Every storage is born and dies in the same order and size, and the arithmetic counts the same."""
    config = load_config(None, SMALL | {"train.max_steps": "1"} | flags)
    real, rehearsed = both_ways(config, micro_batches=config.train.grad_accum_steps)
    assert rehearsed.timeline == real.timeline
    assert rehearsed.flops == real.flops > 0
    assert rehearsed.moved_bytes == real.moved_bytes > 0


@pytest.mark.parametrize("flags", FINETUNING, ids=lambda flags: "-".join(flags.values()))
def test_a_rehearsed_fine_tuning_step_allocates_what_the_step_allocates(flags, tmp_path):
    """The same with adapters, and with a base in four bits."""
    config = load_config(None, SMALL | {"train.max_steps": "1"}).model
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path, config, model.to(torch.bfloat16).state_dict())
    sft = {"sft.data": "rows.jsonl", "sft.batch_size": "2", "sft.seq_len": "32", "compute_dtype": "float32"}
    finetuning = load_finetune_config(None, {"model": str(tmp_path), **sft, **flags})
    real, rehearsed = both_ways(finetuning, tmp_path)
    assert rehearsed.timeline == real.timeline
    assert rehearsed.flops == real.flops


@pytest.mark.slow
def test_a_rehearsal_allocates_nothing_of_the_model():
    """A model of 26 GB is rehearsed with its optimizer state, and every weight stays without bytes."""
    seen = plan_run(load_config(None, {"preset": "7b", "data.batch_size": "1", "train.max_steps": "1",
                                                "compute_dtype": "float32", "train.checkpointing": "full",
                                                "data.seq_len": "64"}))  # fmt: skip
    assert seen.step.tensors["weights"] == 4 * seen.parameters
    assert seen.step.tensors["optimizer"] > 8 * seen.parameters
    assert seen.step.kernels_bytes < 500e6
    # Beyond the machine's memory the allocator is not asked: a heap of that size would let this process fork no more.
    assert seen.step.allocator_bytes is None
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        heap = next(line.split()[0].split("-") for line in maps if line.endswith("[heap]\n"))
    assert int(heap[1], 16) - int(heap[0], 16) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_finished_forward_leaves_activations_and_the_backward_gradients():
    """Kinds are what the storages are for."""
    config = load_config(None, SMALL | {"train.max_steps": "1"})
    rehearsed = go(config, None, 1, has_bytes=False)
    gradients = {life.size_bytes for life in rehearsed.lives if life.use == "gradients"}
    assert 4 * 64 * 512 in gradients
    assert any(life.use == "activations" for life in rehearsed.lives)


def planned_weights(folder, **flags):
    sft = {"sft.data": "rows.jsonl", "sft.batch_size": "2", "sft.seq_len": "32", "compute_dtype": "float32"}
    config = load_finetune_config(None, {"model": str(folder), "train.precision": "bfloat16", **sft, **flags})
    return plan_run(config, folder).step.tensors["weights"]


@pytest.fixture
def folder(tmp_path):
    """Write the small model."""
    config = load_config(None, SMALL | {"train.max_steps": "1"}).model
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path, config, model.to(torch.bfloat16).state_dict())
    return tmp_path


def test_a_streamed_base_is_there_a_layer_at_a_time(folder):
    """At the peak there is one of the two layers, or none of them."""
    layer = sum(p.nbytes for p in load_model(folder).model.layers[0].parameters())
    away = planned_weights(folder, method="lora")
    away -= planned_weights(folder, method="lora", **{"train.stream_base": "true"})
    assert away in (layer, 2 * layer)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_embedding_is_planned_as_what_it_is(kind, folder):
    """The plan counts the codes and scales of the model that is loaded."""
    flags = {"quantize.embedding": kind}
    config = load_finetune_config(None, {"model": str(folder), "method": "qlora", "sft.data": "rows.jsonl", **flags})
    model = load_model(folder, dtype=torch.bfloat16, quantize=True, held=config.quantize)
    from_base(model, config.lora, torch.Generator().manual_seed(0))
    build_optimizer(model.named_parameters(), config.optim, "bfloat16")
    expected = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    assert planned_weights(folder, method="qlora", **flags) == expected
