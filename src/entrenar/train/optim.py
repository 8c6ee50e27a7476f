"""AdamW, with Muon for matrices if wanted, over parameters that may be bfloat16 with float32 masters.

torch's own kernel does AdamW's arithmetic (`torch._fused_adamw_`). Muon's is here: torch's always multiplies in
bfloat16, which on a processor without units for it is slower than float32. This module owns the state,
because `torch.optim.Optimizer.load_state_dict` casts moments to the parameter's type and so cannot resume bit for bit
in bfloat16.

With `adamw8bit` the moments of large parameters are eight-bit codes (`eight_bit.py`), decoded, updated and encoded
again piece by piece in the cache; gradients, weights and masters are unchanged.

All AdamW state and scratch is allocated in the constructor. A step that allocates can run out of memory half-way,
with some weights moved and some not, which no retry can repair; this one cannot.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. Muon: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/, with the update's size matched to AdamW's (Liu et al. 2025,
arXiv:2502.16982), so that one learning rate and one weight decay serve both.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from entrenar.errors import CheckpointError, ConfigError
from entrenar.train.eight_bit import BLOCK, EightBitCoder, empty_codes
from entrenar.train.pieces import fill, is_in_pieces, own_part
from entrenar.train.precision import GradientSums, cast_parameters, join_master, split_master
from entrenar.train.settings import OptimConfig
from entrenar.train.world import Pieces

# 1.5 MiB of scratch stays in a core's second-level cache together with the state it updates. A GPU wants few launches.
_CPU_CHUNK = 1 << 17
_GPU_CHUNK = 1 << 25
# Smaller parameters keep float32 moments: norms are few numbers that move a lot, and a block needs neighbors.
_LEAST_EIGHT_BIT = 16 * BLOCK
_LAYER = re.compile(r".*?\blayers\.\d+")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class _Trained:
    """One parameter with its state.

    `remainder` is set for bfloat16 only, `squares` for AdamW only, the scales where mean and squares are codes.
    """

    name: str
    parameter: nn.Parameter
    weight_decay: float
    mean: Tensor
    squares: Tensor | None
    remainder: Tensor | None
    lr_factor: float = 1.0
    mean_scales: Tensor | None = None
    squares_scales: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        parts = {
            "mean": self.mean, "squares": self.squares, "remainder": self.remainder,
            "mean_scales": self.mean_scales, "squares_scales": self.squares_scales,
        }  # fmt: skip
        return {f"{self.name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


@dataclass(frozen=True)
class _Scratch:
    """Cache-sized working memory of one device and gradient precision."""

    gradient: Tensor
    bits: Tensor
    integers: Tensor
    means: EightBitCoder | None = None
    squares: EightBitCoder | None = None


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U Vᵀ of matrix = U S Vᵀ, by five quintic Newton-Schulz steps in `dtype` (Jordan et al. 2024).

    Singular values that are not tiny beside the matrix's norm come out near one, none above about 1.2; zero stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.mT if is_tall else x
    x.div_(x.norm().clamp(min=1e-7))  # no singular value exceeds the Frobenius norm
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@functools.cache
def _layer_of(name: str) -> str:
    """Return the layer of the model that a parameter belongs to, or its own name."""
    found = _LAYER.match(name)
    return found[0] if found else name


class Optimizer:
    """Updates the weights; owns moments, masters and the step count.

    `gradients` knows where the gradients are.
    """

    def __init__(self, trained: list[_Trained], config: OptimConfig) -> None:
        self.config = config
        self.gradients = GradientSums(each.parameter for each in trained)
        self._trained = trained
        self._step = torch.zeros((), dtype=torch.float32)
        self._layer_of_part: list[str] = []
        # Without a run that settled it, the dtype of torch's own Muon.
        self._muon_dtype = torch.float32 if config.muon_dtype == "float32" else torch.bfloat16
        is_coded = any(each.mean_scales is not None for each in trained)
        self._scratch = {
            key: _new_scratch(*key, is_coded=is_coded) for key in {_scratch_key(each.parameter) for each in trained}
        }

    def gradient_norm(self) -> Tensor:
        """Return the float32 norm over the gradients of all parameters, unscaled."""
        return self.gradient_norms()[0]

    def gradient_norms(self) -> tuple[Tensor, Tensor]:
        """Return the float32 norm over the gradients of all parameters, and those of their parts, unscaled."""
        # In parts: torch makes a float32 copy of a gradient in fewer bits, and its sum over millions loses digits.
        self._layer_of_part, norms = [], []
        for each in self._trained:
            if (gradient := self.gradients.of(each.parameter)) is not None:
                for part in _pieces(own_part(gradient).reshape(-1), _chunk_size(gradient.device)):
                    norms.append(torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)))
                    self._layer_of_part.append(_layer_of(each.name))
        if not norms:
            return torch.zeros(()), torch.zeros(0)
        parts = torch.stack(norms)
        return torch.linalg.vector_norm(parts), parts

    def layer_norms(self, parts: Sequence[float]) -> dict[str, float]:
        """Return the norm of each layer, or parameter outside of all layers, from those of `gradient_norms`' parts."""
        squares: dict[str, float] = {}
        for layer, norm in zip(self._layer_of_part, parts, strict=True):
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        return {layer: math.sqrt(square) for layer, square in squares.items()}

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Move every parameter that has a gradient, multiplied by `gradient_scale`, then forget the gradients."""
        self._step += 1
        for each in self._trained:
            gradient = self.gradients.of(each.parameter)
            if gradient is None:
                continue
            if each.squares is None:
                self._step_muon(each, gradient, lr * each.lr_factor, gradient_scale)
            else:
                self._step_adamw(each, each.squares, gradient, lr * each.lr_factor, gradient_scale)
            each.parameter.grad = None

    def _step_adamw(
        self, each: _Trained, all_squares: Tensor, gradient: Tensor, lr: float, gradient_scale: float
    ) -> None:
        scratch = self._scratch[_scratch_key(each.parameter)]
        step = self._step.to(gradient.device)
        chunk = scratch.gradient.numel()
        weights = each.parameter.detach()
        remainders = weights if each.remainder is None else each.remainder
        flat = (own_part(t).reshape(-1) for t in (weights, gradient, each.mean, all_squares, remainders))
        for number, pieces in enumerate(zip(*(_pieces(t, chunk) for t in flat), strict=True)):
            weight, piece, mean, squares, remainder = pieces
            size = weight.numel()
            scaled = scratch.gradient[:size].copy_(piece).mul_(gradient_scale)
            bits = scratch.bits[:size]
            master = weight if each.remainder is None else join_master(weight, remainder, bits, scratch.integers[:size])
            with _decoded(each, scratch, mean, squares, number * chunk) as (wide_mean, wide_squares):
                torch._fused_adamw_(
                    [master], [scaled], [wide_mean], [wide_squares], [], [step], lr=lr, weight_decay=each.weight_decay,
                    beta1=self.config.beta1, beta2=self.config.beta2, eps=self.config.eps, amsgrad=False,
                    maximize=False,
                )  # fmt: skip
            if each.remainder is not None:
                split_master(bits, weight, remainder)

    def _step_muon(self, each: _Trained, gradient: Tensor, lr: float, gradient_scale: float) -> None:
        master = each.parameter.data
        bits = torch.empty(0)
        if each.remainder is not None:
            bits, integers = (torch.empty_like(master, dtype=torch.int32) for _ in range(2))
            master = join_master(master, each.remainder, bits, integers)
        scaled, momentum = gradient.to(master.dtype) * gradient_scale, self.config.muon_momentum
        each.mean.lerp_(scaled, 1 - momentum)
        update = orthogonalized(scaled.lerp(each.mean, momentum), self._muon_dtype)
        size = 0.2 * max(master.shape) ** 0.5  # as large as AdamW's update (Liu et al. 2025, eq. 4)
        master.mul_(1 - lr * each.weight_decay).add_(update, alpha=-lr * size)
        if each.remainder is not None:
            split_master(bits, each.parameter.data, each.remainder)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live state by name; a master is its remainder plus the model's own weight."""
        state = {"step": self._step}
        for each in self._trained:
            state |= each.state()
        return state

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Copy `saved` into the state byte for byte.

        Raises: CheckpointError for names, shapes or types other than this optimizer's.
        """
        own = self.state_dict()
        if own.keys() != saved.keys():
            raise CheckpointError(
                "the optimizer state belongs to another model or optimizer: "
                f"missing {sorted(own.keys() - saved.keys())[:3]}, unknown {sorted(saved.keys() - own.keys())[:3]}"
            )
        for name, tensor in own.items():
            other = saved[name]
            if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
                raise CheckpointError(
                    f"optimizer state {name} must be {tensor.dtype} {tuple(tensor.shape)}, "
                    f"the checkpoint holds {other.dtype} {tuple(other.shape)}"
                )
            fill(tensor, other)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    precision: Literal["float32", "bfloat16"] = "float32",
    lr_factors: Mapping[str, float] | None = None,
    pieces: Pieces | None = None,
) -> Optimizer:
    """Prepare the trainable parameters; `bfloat16` first turns all float32 parameters into bfloat16 in place.

    A tied parameter is trained once, under its first name. Matrices get weight decay; norms and other vectors do not.
    `lr_factors` multiply the learning rate of the parameters they name. Those in `pieces` have their type already.

    Raises: ConfigError when nothing is trainable or a parameter's type cannot be trained.
    """
    names: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)
    if pieces is not None:
        whole = pieces.remainders
        remainders = {p: _in_pieces(whole[name], p) for p, name in names.items() if name in whole}
    else:
        remainders = cast_parameters(names) if precision == "bfloat16" else {}
    trained = [
        replace(_prepare(name, p, config, remainders.get(p)), lr_factor=(lr_factors or {}).get(name, 1.0))
        for p, name in names.items()
        if p.requires_grad
    ]
    if not trained:
        raise ConfigError(
            "no parameter requires a gradient, so there is nothing to train; unfreeze some or add an adapter"
        )
    return Optimizer(trained, config)


def _in_pieces(remainder: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's rows of a whole remainder, as a tensor in pieces."""
    cut = torch.zeros_like(parameter, dtype=remainder.dtype, requires_grad=False)
    fill(cut, remainder)
    return cut


def _prepare(name: str, parameter: nn.Parameter, config: OptimConfig, remainder: Tensor | None) -> _Trained:
    if parameter.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ConfigError(
            f"parameter {name} must be bfloat16, float32 or float64 to be trained, it is {parameter.dtype}"
        )
    if not is_in_pieces(parameter):
        parameter.data = parameter.data.contiguous()
    state_type = torch.promote_types(parameter.dtype, torch.float32)
    is_matrix = parameter.ndim == 2 and not any(part in name for part in config.muon_excluded)
    is_muon = config.optimizer == "muon" and is_matrix
    if parameter.dtype == torch.bfloat16 and remainder is None:
        remainder = torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False)
    weight_decay = config.weight_decay if parameter.ndim >= 2 else 0.0
    if config.optimizer == "adamw8bit" and parameter.numel() >= _LEAST_EIGHT_BIT:
        if state_type != torch.float32:
            raise ConfigError(f"optimizer adamw8bit trains bfloat16 and float32, parameter {name} is {parameter.dtype}")
        mean, mean_scales = empty_codes(parameter, is_signed=True)
        squares, squares_scales = empty_codes(parameter, is_signed=False)
        return _Trained(
            name, parameter, weight_decay, mean, squares, remainder,
            mean_scales=mean_scales, squares_scales=squares_scales,
        )  # fmt: skip
    return _Trained(
        name=name,
        parameter=parameter,
        weight_decay=weight_decay,
        mean=torch.zeros_like(parameter, dtype=state_type, requires_grad=False),
        squares=None if is_muon else torch.zeros_like(parameter, dtype=state_type, requires_grad=False),
        remainder=remainder,
    )


def _scratch_key(parameter: nn.Parameter) -> tuple[torch.device, torch.dtype]:
    return parameter.device, torch.promote_types(parameter.dtype, torch.float32)


def _chunk_size(device: torch.device) -> int:
    return _CPU_CHUNK if device.type in ("cpu", "meta") else _GPU_CHUNK


def _pieces(flat: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cut into pieces; where there is nothing to compute, in the plan of a run, the first stands for all.

    Each takes the same memory and gives it back, and a model of billions has fifty thousand.
    """
    pieces = torch.split(flat, size)
    return pieces[:1] if flat.is_meta else pieces


def _new_scratch(device: torch.device, dtype: torch.dtype, *, is_coded: bool) -> _Scratch:
    size = _chunk_size(device)
    return _Scratch(
        gradient=torch.empty(size, dtype=dtype, device=device),
        bits=torch.empty(size, dtype=torch.int32, device=device),
        integers=torch.empty(size, dtype=torch.int32, device=device),
        means=EightBitCoder.prepare(size, device, is_signed=True) if is_coded else None,
        squares=EightBitCoder.prepare(size, device, is_signed=False) if is_coded else None,
    )


@contextmanager
def _decoded(
    each: _Trained, scratch: _Scratch, mean: Tensor, squares: Tensor, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a piece of the moments, beginning at `start`, in float32, and encode it again afterwards."""
    if each.mean_scales is None or each.squares_scales is None or scratch.means is None or scratch.squares is None:
        yield mean, squares
        return
    blocks = slice(start // BLOCK, -(-(start + mean.numel()) // BLOCK))
    mean_scales, squares_scales = each.mean_scales[blocks], each.squares_scales[blocks]
    yield scratch.means.decode(mean, mean_scales), scratch.squares.decode(squares, squares_scales)
    scratch.means.encode(mean, mean_scales)
    scratch.squares.encode(squares, squares_scales)
