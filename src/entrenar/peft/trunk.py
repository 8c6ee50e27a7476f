"""Compute the frozen lower layers once: their outputs are kept on disk, and later epochs start above them.

When nothing below layer c is trained, the state that enters layer c depends on the document's tokens alone, in every
epoch, for every adapter above, learning rate and seed. The first pass writes it down; every later pass, also of other
runs over the same base, reads it and computes layers c … L-1 only. Backward never went below c anyway.

The state is kept for each document and not for each batch: documents that are packed into one row do not see each
other and count positions from their own start, so a document's states are the same wherever it is packed.

What is read is rounded (`trunk_rows`), and so is what the first pass hands on, so that every epoch trains the same
function. The first batches that come from disk are computed the long way too; if the two differ by more than rounding
explains, the cache is left alone from there on, and that is said.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entrenar.errors import ConfigError
from entrenar.ops import DocumentSpans
from entrenar.peft.fingerprint import fingerprint
from entrenar.peft.lora import plain_state, wrappers
from entrenar.peft.targets import layer_number
from entrenar.peft.trunk_config import TrunkConfig
from entrenar.peft.trunk_rows import RowFormat
from entrenar.peft.trunk_store import TrunkStore

# Relative difference of two computations of one state in another packing, so in another order of the same sums.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
_NO_EFFECT_ON_STATES = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "num_layers"}


@runtime_checkable
class CutModel(Protocol):
    """The interface of a model that can be cut at a layer."""

    config: Any
    compute_dtype: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        ...

    def hidden_below(self, input_ids: Tensor, layer: int, *, documents: DocumentSpans | None = None) -> Tensor:
        """Return the state that enters block `layer`."""

    def loss_from(self, x: Tensor, layer: int, targets: Tensor, *, documents: DocumentSpans | None = None) -> Tensor:
        """Go on from there to the summed loss."""

    def loss(self, input_ids: Tensor, targets: Tensor, *, documents: DocumentSpans | None = None) -> Tensor:
        """Return the summed loss of the whole model."""


class TrunkCache:
    """A model's loss, with the layers below `cut` (the highest possible if not given) computed once for each document.

    Attributes:
        cut: the first layer that is computed in every epoch.
        is_active: whether the cache is used; false once it was found to differ.
        documents_read, documents_computed: how many documents came from disk and how many from the layers.

    Raises:
        ConfigError: something below the cut is trained or random, or the budget is too small.
    """

    def __init__(
        self,
        model: CutModel,
        config: TrunkConfig,
        *,
        tokenizer_hash: str,
        cut: int | None = None,
        expected_tokens: int | None = None,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        module = cast(nn.Module, model)
        self.cut = highest_cut(module) if cut is None else cut
        check_cut(module, self.cut)
        below = {name: tensor for name, tensor in plain_state(module).items() if _is_below(name, self.cut)}
        self._dtype = next(iter(below.values())).dtype
        self._format = RowFormat(config.trunk_rows, model.config.hidden_size)
        budget_bytes = int(config.trunk_budget_gb * 1e9)
        _check_budget(expected_tokens, self._format, budget_bytes)
        key = {
            "base weights": fingerprint(below),
            "layers": str(self.cut),
            "tokenizer": tokenizer_hash,
            "architecture": model.config.model_dump_json(exclude=_NO_EFFECT_ON_STATES),
            "dtype": f"{self._dtype} multiplied in {model.compute_dtype or self._dtype}",
            "row format": f"{self._format.kind} {self._format.width}",
        }
        self.store = TrunkStore(config.trunk_dir, key, self._format.size_bytes, budget_bytes, on_event)
        self.is_active = True
        self.documents_read = 0
        self.documents_computed = 0
        self._model = model
        self._checks_left = config.trunk_checks
        self._on_event = on_event

    def loss(
        self, input_ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], *, documents: DocumentSpans | None = None
    ) -> Float[Tensor, ""]:
        """Return what the model's own `loss` returns, up to the rounding of the rows.

        The batch may stay on the host, where its documents are looked up; the states go to the model's device.
        """
        if not self.is_active:
            return self._model.loss(input_ids.to(self._model.device), targets, documents=documents)
        x = self.states(input_ids, targets, documents)
        return self._model.loss_from(x, self.cut, targets, documents=documents)

    def states(
        self, input_ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], documents: DocumentSpans | None
    ) -> Float[Tensor, "B T D"]:
        """Return the state of each token as it enters the cut; of documents without a target, ones.

        Nobody sees those documents (padding, most of them), but a norm must not divide by their zero.
        """
        x = torch.ones(*input_ids.shape, self._format.width, dtype=self._dtype, device=self._model.device)
        spans = list(_trained_documents(input_ids, targets, documents))
        missing: dict[int, list[tuple[str, int, int]]] = {}
        was_read = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        for document, row, start, end in spans:
            rows = self.store.read(document, end - start)
            if rows is None:
                missing.setdefault(row, []).append((document, start, end))
            else:
                x[row, start:end] = self._format.decode(rows, self._dtype).to(x.device)
                was_read[row, start:end] = True
        self.documents_read += len(spans) - sum(len(documents) for documents in missing.values())
        if missing:
            self._compute(x, missing, input_ids, documents)
        if self._checks_left > 0 and was_read.any():
            self._checks_left -= 1
            x = self._checked(x, was_read, input_ids, documents)
        return x

    def _compute(
        self,
        x: Tensor,
        missing: dict[int, list[tuple[str, int, int]]],
        input_ids: Tensor,
        documents: DocumentSpans | None,
    ) -> None:
        """Put the missing documents' states into x and on disk, running only the rows that hold one."""
        rows = sorted(missing)
        packed = None if documents is None else tuple(documents[row] for row in rows)
        with torch.no_grad():
            states = self._model.hidden_below(input_ids[rows].to(x.device), self.cut, documents=packed)
        for row, row_states in zip(rows, states, strict=True):
            for document, start, end in missing[row]:
                encoded = self._format.encode(row_states[start:end])
                self.store.write(document, encoded)
                x[row, start:end] = self._format.decode(encoded, self._dtype).to(x.device)
                self.documents_computed += 1

    def _checked(self, x: Tensor, was_read: Tensor, input_ids: Tensor, documents: DocumentSpans | None) -> Tensor:
        """Return x if the tokens that were read are what the layers give, else what the layers give."""
        with torch.no_grad():
            computed = self._model.hidden_below(input_ids.to(x.device), self.cut, documents=documents)
        was_read = was_read.to(x.device)
        expected, got = computed[was_read].float(), x[was_read].float()
        difference = float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        allowed = self._format.largest_error + _ROUNDING[self._dtype]
        if difference <= allowed:
            return x
        self.is_active = False
        self._on_event(
            f"trunk cache {self.store.folder}: states read from it differ from computed ones by {difference:.2g} of "
            f"their size, rounding explains {allowed:.2g}; the run continues without the cache; delete the folder"
        )
        return computed

    def close(self) -> None:
        """Let go of the cache folder."""
        self.store.close()


def highest_cut(model: nn.Module) -> int:
    """Return the lowest layer that is trained or has an adapter in use: everything below it is frozen.

    Raises:
        ConfigError: that is layer 0, or the embedding is trained, so there is no frozen trunk.
    """
    numbers = [layer_number(f"{name}.") for name, _ in model.named_modules()]
    count = 1 + max((number for number in numbers if number is not None), default=-1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained += [name for name, module in wrappers(model) if module.active is not None]
    for name in trained:
        if _is_embedding(name):
            raise ConfigError(f"a trunk cache needs a frozen embedding, but {name} is trained; train without the cache")
    cut = min((number for name in trained if (number := layer_number(f"{name}.")) is not None), default=count)
    if cut == 0:
        raise ConfigError(
            "a trunk cache needs frozen layers below the adapters, but layer 0 is trained; "
            f"put adapters on the top layers only, as in layers = top:2 of {count}"
        )
    return cut


def check_cut(model: nn.Module, cut: int) -> None:
    """Refuse a cut above something that makes the states below it change.

    Raises:
        ConfigError: a trained parameter, an adapter in use, or dropout lies below the cut.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _is_below(name, cut):
            raise ConfigError(f"a trunk cache allows nothing trained below layer {cut}, but {name} is")
    for name, module in model.named_modules():
        if not _is_below(f"{name}.", cut):
            continue
        if getattr(module, "active", None) is not None:
            raise ConfigError(f"a trunk cache allows no adapter in use below layer {cut}, but {name} has one")
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ConfigError(f"a trunk cache allows no dropout below layer {cut}, but {name} has {module.p}")


def _is_embedding(name: str) -> bool:
    return "embed_tokens" in name.split(".")


def _is_below(name: str, cut: int) -> bool:
    number = layer_number(name)
    return _is_embedding(name) if number is None else number < cut


def _check_budget(expected_tokens: int | None, row_format: RowFormat, budget_bytes: int) -> None:
    if expected_tokens is None:
        return
    needed = expected_tokens * row_format.size_bytes
    if needed > budget_bytes:
        smaller = RowFormat("int8", row_format.width).size_bytes * expected_tokens
        raise ConfigError(
            f"trunk_budget_gb must hold {expected_tokens:,} tokens of {row_format.size_bytes:,} bytes, "
            f"{needed / 1e9:.3g} GB, got {budget_bytes / 1e9:.3g}; raise it"
            + (f", or set trunk_rows = int8 ({smaller / 1e9:.3g} GB)" if smaller <= budget_bytes else "")
        )


def _trained_documents(
    input_ids: Tensor, targets: Tensor, documents: DocumentSpans | None
) -> Iterator[tuple[str, int, int, int]]:
    """Yield hash, row, start and end of each document that has a target."""
    rows = input_ids.cpu().contiguous().long().numpy()
    is_trained = (targets != -100).cpu()
    for row, ids in enumerate(rows):
        for start, end in documents[row] if documents is not None else ((0, len(ids)),):
            if is_trained[row, start:end].any():
                yield hashlib.blake2b(ids[start:end].tobytes(), digest_size=16).hexdigest(), row, start, end
