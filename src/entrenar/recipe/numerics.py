"""Compare all ways of computing a gradient, on the user's own config and the first rows of their data.

Each way is compared with the plain one (the whole batch at once, nothing recomputed) twice. In float64, where nothing
but the order of sums may differ, a difference above 1e-9 of a parameter's gradient is a fault. In the run's own
precision a difference counts as rounding up to four times the plain way's own error against float64; equal bits are
reported as such.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, linear

from entrenar.config import RunConfig
from entrenar.data import Batch, Corpus, Loader, LoaderState
from entrenar.errors import MachineError
from entrenar.interop import load_model, save_model
from entrenar.model import Llama
from entrenar.ops import Documents, linear_cross_entropy
from entrenar.ops.attention import reference_attention
from entrenar.ops.rms_norm import reference_rms_norm
from entrenar.ops.rope import reference_rope
from entrenar.ops.swiglu import reference_swiglu
from entrenar.planning import settle_compute_dtype
from entrenar.recipe.pretrain import open_corpora
from entrenar.recipe.start import Observer, choose_device
from entrenar.recipe.two_processes import SIZE, Gradients, TwoProcesses
from entrenar.train import prepare_process

MOST_IN_FLOAT64 = 1e-9
MOST_ROUNDINGS = 4.0
_MOST_ROWS = 4

Pair = tuple[Gradients, Gradients]  # the plain way, the other way


@dataclass(frozen=True)
class Finding:
    """The distance of one way from the plain one; None if it was not measured."""

    way: str
    float64: float | None = None
    own: float | None = None
    same_bits: bool = False
    is_same: bool | None = None
    worst: str = ""
    note: str = ""


@dataclass(frozen=True)
class Numerics:
    """The comparison of all ways on one config."""

    rows: int
    seq_len: int
    parameters: int
    precision: str
    compute_dtype: str
    rounding: float  # distance of the plain way, in the run's own precision, from float64
    findings: tuple[Finding, ...]


class _Data:
    """The first batches of the user's corpora, read by one rank and by two."""

    def __init__(self, config: RunConfig, corpora: Sequence[Corpus], rows: int) -> None:
        self._config, self._corpora, self._rows = config, corpora, rows
        (self.first, self.after_first), (self.second, _) = islice(self.loader(), 2)

    def loader(self, rank: int = 0, world_size: int = 1, start: LoaderState | None = None) -> Loader:
        """Return the run's loader, with another number of rows."""
        data = self._config.data
        return Loader(
            *self._corpora, batch_size=self._rows, seq_len=data.seq_len, seed=self._config.train.seed,
            weights=data.weights, rank=rank, world_size=world_size, mask_documents=data.mask_documents, start=start,
        )  # fmt: skip


def compare_ways(config: RunConfig, *, with_compiler: bool = False, observer: Observer | None = None) -> Numerics:
    """Compare every way to the gradient of the first rows of the config's data.

    Raises:
        ConfigError: the machine lacks the device.
        DataError: a corpus is missing or does not fit.
    """
    observer = observer or Observer()
    prepare_process(config.train)
    device = choose_device(config)
    config = settle_compute_dtype(config, device)
    data = _Data(config, open_corpora(config, observer), max(2, min(_MOST_ROWS, config.data.batch_size) // 2 * 2))
    precision = getattr(torch, config.train.precision)
    exact, own = _model(config, torch.float64, None, device), _model(config, precision, config.compute_dtype, device)
    observer.on_stage("The plain way")
    rounding = _distance(_gradients(exact, [data.first]), _gradients(own, [data.first]))[0]
    findings = []
    with TwoProcesses() as processes:
        for name, way in _ways(processes, with_compiler=with_compiler or config.train.compile):
            observer.on_stage(name)
            findings.append(_finding(name, way, exact, own, data, rounding))
    return Numerics(
        len(data.first.input_ids), config.data.seq_len, config.model.parameter_count(), config.train.precision,
        config.compute_dtype, rounding, tuple(findings),
    )  # fmt: skip


def _model(config: RunConfig, dtype: torch.dtype, compute_dtype: str | None, device: torch.device) -> Llama:
    with torch.device("meta"):
        model = Llama(config.model)
    model.to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    model.to(dtype)
    model.set_compute_dtype(None if compute_dtype is None else getattr(torch, compute_dtype))
    return model


Way = Callable[[Llama, _Data], Pair]


def _ways(processes: TwoProcesses, *, with_compiler: bool) -> Iterator[tuple[str, Way | None]]:
    yield (
        "one row at a time",
        lambda model, data: (
            _gradients(model, [data.first]),
            _gradients(model, data.first.split(1)),
        ),
    )
    yield "packed documents each alone", _unpacked
    yield "activations recomputed (full)", lambda model, data: _checkpointed(model, data, "full")
    yield "activations recomputed (selective)", lambda model, data: _checkpointed(model, data, "selective")
    yield (
        "loss in chunks of 7 tokens",
        lambda model, data: (
            _gradients(model, [data.first]),
            _gradients(model, [data.first], _chunked_loss),
        ),
    )
    yield (
        "plain torch, differentiated by autograd",
        lambda model, data: (
            _gradients(model, [data.first]),
            _gradients(model, [data.first], eager_loss),
        ),
    )
    yield "compiled", _compiled if with_compiler else None
    yield "saved, loaded and resumed", _resumed
    yield "two ranks, each a process", lambda model, data: _two_ranks(processes, model, data)


def _finding(name: str, way: Way | None, exact: Llama, own: Llama, data: _Data, rounding: float) -> Finding:
    if way is None:
        return Finding(name, note="not measured: train.compile is off (--compiled measures it)")
    try:
        in_float64, worst = _distance(*way(exact, data))
        plain, other = way(own, data)
    except torch._dynamo.exc.TorchDynamoException as fault:  # the root of the compiler's errors
        return Finding(name, note=f"not measured: {str(fault).strip().splitlines()[0]}")
    except MachineError as fault:
        return Finding(name, note=f"not measured: {fault}")
    in_own, _ = _distance(plain, other)
    is_same = in_float64 <= MOST_IN_FLOAT64 and in_own <= MOST_ROUNDINGS * rounding
    same_bits = plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)
    return Finding(name, in_float64, in_own, same_bits, is_same, "" if is_same else worst)


def _distance(plain: Gradients, other: Gradients) -> tuple[float, str]:
    """Return the largest relative difference of a parameter's gradient, and that parameter.

    A gradient that is nearly zero is measured against a millionth of the largest one.
    """
    floor = 1e-6 * max((float(g.double().norm()) for g in plain.values()), default=0.0)
    worst, where = 0.0, ""
    for name in plain.keys() | other.keys():
        if name not in plain or name not in other:
            return float("inf"), name
        difference = float((plain[name].double() - other[name].double()).norm())
        relative = difference / max(float(plain[name].double().norm()), floor, 1e-300)
        if not relative <= worst:  # also when it is NaN
            worst, where = relative, name
    return worst, where


Loss = Callable[[Llama, Batch], Tensor]


def _loss(model: Llama, batch: Batch) -> Tensor:
    return model.loss(batch.input_ids, batch.targets, documents=batch.documents)


def _gradients(model: Llama, pieces: Sequence[Batch], loss: Loss = _loss) -> Gradients:
    """Move the pieces to the model and return the gradient of the loss summed over them."""
    model.train()
    model.zero_grad(set_to_none=True)
    for piece in pieces:
        loss(model, piece.to(model.model.norm.weight.device)).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def _unpacked(model: Llama, data: _Data) -> Pair:
    """Compare packed rows with each of their documents alone; a row of one document is cut in two."""
    batch = data.first
    rows, length = batch.input_ids.shape
    documents = batch.documents
    if documents is None or all(len(spans) == 1 for spans in documents):
        documents = (((0, length // 2), (length // 2, length)),) * rows
    packed = Batch(batch.input_ids, batch.targets, documents, None)
    alone = [
        Batch(batch.input_ids[row, None, start:end], batch.targets[row, None, start:end], None, None)
        for row, spans in enumerate(documents)
        for start, end in spans
    ]
    return _gradients(model, [packed]), _gradients(model, [piece for piece in alone if piece.num_targets])


def _checkpointed(model: Llama, data: _Data, kind: str) -> Pair:
    plain = _gradients(model, [data.first])
    model.checkpointing = "full" if kind == "full" else "selective"
    try:
        return plain, _gradients(model, [data.first])
    finally:
        model.checkpointing = "none"


def _chunked_loss(model: Llama, batch: Batch) -> Tensor:
    hidden = model.hidden(batch.input_ids, documents=batch.documents).flatten(0, 1)
    weight = model.head_weight
    return linear_cross_entropy(
        hidden, weight, batch.targets.flatten(), chunk_size=7, compute_dtype=model.compute_dtype
    )


def eager_loss(model: Llama, batch: Batch) -> Tensor:
    """Return the loss by plain torch operators with autograd's gradient: nothing here is derived by hand."""
    config, weights, device = model.config, dict(model.named_parameters()), batch.input_ids.device
    documents = None if batch.documents is None else Documents.from_spans(batch.documents, device)
    length, head = batch.input_ids.shape[1], "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    if documents is None:
        cos, sin = (table[None, :length] for table in model.rotary.rows(length, device))
    else:
        cos, sin = model.rotary.of_documents(documents)
    heads = (*batch.input_ids.shape, -1, config.head_width)
    x = embedding(batch.input_ids, weights["model.embed_tokens.weight"])
    for layer in range(config.num_layers):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        normed = reference_rms_norm(x, own["input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (linear(normed, own[f"self_attn.{part}_proj.weight"]).view(*heads).transpose(1, 2) for part in "qkv")
        q, k = reference_rope(q, cos, sin), reference_rope(k, cos, sin)
        mixed = reference_attention(q, k, v, documents=documents).transpose(1, 2).flatten(2)
        x = x + linear(mixed, own["self_attn.o_proj.weight"])
        normed = reference_rms_norm(x, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = linear(normed, own["mlp.gate_proj.weight"]), linear(normed, own["mlp.up_proj.weight"])
        x = x + linear(reference_swiglu(gate, up), own["mlp.down_proj.weight"])
    final = reference_rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    logits = linear(final, weights[f"{head}.weight"]).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, batch.targets.flatten(), ignore_index=-100, reduction="sum")


def _compiled(model: Llama, data: _Data) -> Pair:
    compiled = torch.compile(model.loss)
    return _gradients(model, [data.first]), _gradients(
        model, [data.first], lambda _, batch: compiled(batch.input_ids, batch.targets, documents=batch.documents)
    )


def _resumed(model: Llama, data: _Data) -> Pair:
    """Take the second batch twice: with the model in memory, and with one saved and loaded after the first."""
    (batch, _) = next(iter(data.loader(start=LoaderState.from_dict(data.after_first.to_dict()))))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model.config, dict(model.named_parameters()))
        loaded = load_model(Path(folder))
    for parameter in loaded.parameters():
        # A resumed run copies what it reads. Mapped weights lie as the file has them, and on some processors the last
        # bit of a product depends on the alignment.
        parameter.data = parameter.data.clone()
    loaded.set_compute_dtype(model.compute_dtype)
    return _gradients(model, [data.second]), _gradients(loaded.to(model.model.norm.weight.device), [batch])


def _two_ranks(processes: TwoProcesses, model: Llama, data: _Data) -> Pair:
    """Sum the gradients of two processes, each on its share of the batch."""
    shares = [next(iter(data.loader(rank, SIZE)))[0] for rank in range(SIZE)]
    return _gradients(model, [data.first]), processes.gradients(model, shares)
