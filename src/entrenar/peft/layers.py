"""The two modules that stand in a frozen module's place and hold its adapters.

`LoraLinear` adds to a projection W the product of two thin matrices, y = x Wᵀ + s (x Aᵀ) Bᵀ (Hu et al. 2021,
arXiv:2106.09685). `SavedModule` trains a copy of a whole weight. Both leave the base weight alone, so any number of
adapters can be held over one base and switched, and removing them restores the original, bit for bit.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3) gives each output row a trained magnitude m:
y = m / ‖W + s B A‖ · (x Wᵀ + s (x Aᵀ) Bᵀ), the norm by rows and taken as a constant in the backward. So dm is
Σ dy · y / m, which autograd takes from the product; there is nothing to derive. The norm is found without W + s B A:
‖w + s bA‖² = ‖w‖² + 2s b·(A w) + s² b (A Aᵀ) bᵀ for each row w of W and b of B. Dropout spares x Wᵀ here as in
plain LoRA.

PiSSA (Meng et al. 2024, arXiv:2404.02948) begins A and B at the largest singular directions of W and trains against the
residual W - s B₀ A₀. The residual is never formed: -s B₀ A₀ rides along as a frozen part of the adapter, so W stays
what it was.

LoftQ (Li et al. 2023, arXiv:2310.08659) begins A and B at the largest singular directions of W - Q, what quantizing W
to Q took away, so that training begins nearer to the plain model. Q stays what it is, and the adapter is a plain one.
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.ops.row_blocks import row_blocks
from entrenar.peft.config import LoraInit
from entrenar.peft.quantized import BaseWeight, QuantizedLinear, weight_of, widened

# Rows of a weight whose norms are taken at a time: a quantized one must not be widened as a whole.
_NORM_ROWS = 1024
_SPARE_DIRECTIONS, _PASSES = 16, 8


class LowRank(nn.Module):
    """One adapter of one projection.

    Attributes:
        lora_A, lora_B: the trained matrices, float32 over a base of lower precision.
        lora_magnitude_vector: DoRA's magnitudes, or None.
        start_a, start_b: where PiSSA began, or None.
        scale: what B A is multiplied by.
        dropout: chance of an input to be dropped in training.
    """

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, weight: BaseWeight, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        stored = weight.dtype if isinstance(weight, Tensor) else torch.float32
        dtype = torch.promote_types(stored, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=dtype, device=weight.device))
        self.lora_magnitude_vector: nn.Parameter | None = None
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        self.scale = scale
        self.dropout = dropout

    def draw(
        self,
        weight: BaseWeight,
        init: LoraInit,
        generator: torch.Generator,
        original: Callable[[], Float[Tensor, "O I"]] | None = None,
    ) -> None:
        """Give A and B their first values; the output stays the base's, or with loftq goes towards `original`'s.

        Raises:
            ConfigError: loftq is asked for and there is no original.
        """
        if weight.device.type == "meta":  # no values, but the matrices that PiSSA keeps
            if init == "pissa":
                self.start_from(self.lora_A.detach(), self.lora_B.detach())
            return
        rank, width = self.lora_A.shape
        draw = torch.empty(rank, width, dtype=torch.float32, device=generator.device)
        with torch.no_grad():
            if init == "loftq":
                if original is None or isinstance(weight, Tensor):
                    raise ConfigError(
                        "lora_init = loftq begins at what quantizing takes away, and needs a base that is quantized "
                        "for this run: give a plain model folder, with method = qlora"
                    )
                lora_a, lora_b = leading_factors(lost_to_quantizing(original(), weight), rank)
                self.lora_A.copy_(lora_a / self.scale**0.5)
                self.lora_B.copy_(lora_b / self.scale**0.5)
            elif init == "pissa":
                self.start_from(*principal_factors(widened(weight, self.lora_A.dtype), rank, self.scale))
            elif init == "gaussian":
                self.lora_A.copy_(draw.normal_(0.0, 1 / rank, generator=generator))
            else:
                self.lora_A.copy_(draw.uniform_(-(width**-0.5), width**-0.5, generator=generator))

    def start_from(self, lora_a: Float[Tensor, "R I"], lora_b: Float[Tensor, "O R"]) -> None:
        """Begin at B A and subtract it for good, so that the sum begins at zero."""
        with torch.no_grad():
            self.lora_A.copy_(lora_a)
            self.lora_B.copy_(lora_b)
        self.start_a, self.start_b = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def add_magnitude(self, weight: BaseWeight) -> None:
        """Train the rows' magnitudes too, from those the weight has."""
        self.lora_magnitude_vector = nn.Parameter(self.row_norms(weight))

    def matrices(self) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
        """Return A and B of the update s B A; after PiSSA they are [A; A₀] and [B, -B₀]."""
        return self.with_start(self.lora_A, self.lora_B)

    def with_start(
        self, lora_a: Float[Tensor, "R I"], lora_b: Float[Tensor, "O R"]
    ) -> tuple[Float[Tensor, "S I"], Float[Tensor, "O S"]]:
        """Return the matrices of the update where A and B are these."""
        if self.start_a is None or self.start_b is None:
            return lora_a, lora_b
        return torch.cat((lora_a, self.start_a)), torch.cat((lora_b, -self.start_b), dim=1)

    def _wide_matrices(self) -> tuple[Tensor, Tensor]:
        # A run in bfloat16 turns trained parameters into bfloat16.
        lora_a, lora_b = self.matrices()
        wide = torch.promote_types(lora_a.dtype, torch.float32)
        return lora_a.to(wide), lora_b.to(wide)

    def row_norms(self, weight: BaseWeight) -> Float[Tensor, " O"]:
        """Return ‖W + s B A‖ by rows; no gradient flows through it."""
        with torch.no_grad():
            lora_a, lora_b = self._wide_matrices()
            parts = [slice(start, start + _NORM_ROWS) for start in range(0, weight.shape[0], _NORM_ROWS)]
            return torch.cat([self._row_norms(widened(weight, lora_a.dtype, p), lora_a, lora_b[p]) for p in parts])

    def _row_norms(self, wide: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        cross = (wide @ lora_a.mT * lora_b).sum(1)
        square = (lora_b @ (lora_a @ lora_a.mT) * lora_b).sum(1)
        return ((wide * wide).sum(1) + 2 * self.scale * cross + self.scale**2 * square).clamp_min(0).sqrt()

    def merged(self, weight: BaseWeight, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """Return the one weight that does what the base and the adapter do, added in float32 and rounded once."""
        with torch.no_grad():
            lora_a, lora_b = self._wide_matrices()
            total = torch.addmm(widened(weight, lora_a.dtype), lora_b, lora_a, alpha=self.scale)
            if self.lora_magnitude_vector is not None:
                total *= (self.lora_magnitude_vector / self.row_norms(weight))[:, None]
            return total.to(dtype)


def lost_to_quantizing(original: Float[Tensor, "O I"], weight: BaseWeight) -> Float[Tensor, "O I"]:
    """Return W - Q in float32, without allocating a second matrix of that size."""
    lost = original.to(torch.float32, copy=True)
    for rows in row_blocks(lost):
        lost[rows] -= widened(weight, torch.float32, rows)
    return lost


def principal_factors(
    weight: Float[Tensor, "O I"], rank: int, scale: float
) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Return A and B so that scale · B A is the weight's best approximation of that rank."""
    left, sizes, right = torch.linalg.svd(
        weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    roots = (sizes[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def leading_factors(weight: Float[Tensor, "O I"], rank: int) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Return A and B so that B A is nearly the weight's best approximation of that rank, by subspace iteration.

    What quantizing takes away has no steep spectrum: eight passes find 0.99 of what the decomposition does, in a
    twentieth of its time (docs/log.md). Small weights are decomposed.
    """
    wanted = rank + _SPARE_DIRECTIONS
    if 4 * wanted > min(weight.shape):
        return principal_factors(weight, rank, 1.0)
    basis = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(0)).to(weight)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(weight.mT @ (weight @ basis))[0]  # (I, R + spare)
    left, sizes, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    roots = sizes[:rank].sqrt()
    return roots[:, None] * (right[:rank] @ basis.mT), left[:, :rank] * roots


class LoraLinear(nn.Module):
    """A frozen projection with its low-rank adapters.

    Attributes:
        base_layer: the projection whose place this one takes, plain or in four bits.
        adapters: the adapters held, by name.
        active: the adapter in use; None for the base alone.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self._original: BaseWeight | None = None
        self.train(base_layer.training)

    @property
    def weight(self) -> BaseWeight:
        """The base's weight in its stored form, or the merged one while merged."""
        return cast(BaseWeight, weight_of(self.base_layer))

    @property
    def is_merged(self) -> bool:
        """Return whether the active adapter is added to the base's weight."""
        return self._original is not None

    def adapter(self, name: str) -> LowRank:
        """Return an adapter that is held."""
        return cast(LowRank, self.adapters[name])

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight and by the active adapter's update."""
        if self.active is None or self.is_merged:
            return cast(Tensor, self.base_layer(x))
        adapter = self.adapter(self.active)
        weight, (lora_a, lora_b) = self.weight, adapter.matrices()
        dropout = adapter.dropout if self.training else 0.0
        wide = getattr(self.base_layer, "compute_dtype", None)
        if isinstance(weight, Tensor):
            y = ops.lora_linear(x, weight, lora_a, lora_b, scale=adapter.scale, dropout=dropout, compute_dtype=wide)
        else:
            y = ops.quantized_linear(
                x, weight, lora_a, lora_b, scale=adapter.scale, dropout=dropout, compute_dtype=wide
            )
        if adapter.lora_magnitude_vector is None:
            return y
        return (y * (adapter.lora_magnitude_vector / adapter.row_norms(weight))).to(y.dtype)

    def merge(self) -> None:
        """Put the merged weight in the base's place, once; the original is kept aside."""
        if self.active is None or self.is_merged:
            return
        original = self.weight
        dtype = original.dtype if isinstance(original, Tensor) else cast(QuantizedLinear, self.base_layer).dtype
        self._original = original.detach() if isinstance(original, Tensor) else original
        set_weight(self.base_layer, self.adapter(self.active).merged(self._original, dtype))

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._original is not None:
            set_weight(self.base_layer, self._original)
            self._original = None


class SavedModule(nn.Module):
    """A frozen module of one weight, with trained copies of that weight.

    Attributes:
        base_layer: the module whose place this one takes.
        adapters: the trained weights, by the name of their adapter.
        active: the weight in use; None for the base's own.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        own = [name for name, _ in base_layer.named_parameters()]
        if own != ["weight"]:
            raise ConfigError(f"modules_to_save takes modules that are one weight, got one with {own}")
        self.base_layer = base_layer
        self.adapters = nn.ParameterDict()
        self.active: str | None = None
        self._original: Tensor | None = None
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight in use; a head that is tied to an embedding reads it here."""
        if self.active is None or self.is_merged:
            return cast(Tensor, self.base_layer.weight)
        return cast(Tensor, self.adapters[self.active])

    @property
    def is_merged(self) -> bool:
        """Return whether the active copy is in the base's place."""
        return self._original is not None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Do what the module does, with the weight in use."""
        return cast(Tensor, functional_call(self.base_layer, {"weight": self.weight}, inputs))

    def merge(self) -> None:
        """Put the active copy in the base's place; the original is kept aside."""
        if self.active is None or self.is_merged:
            return
        merged = self.weight.detach().clone()
        self._original = cast(Tensor, self.base_layer.weight).detach()
        set_weight(self.base_layer, merged)

    def unmerge(self) -> None:
        """Put the original weight back."""
        if self._original is not None:
            set_weight(self.base_layer, self._original)
            self._original = None


def set_weight(module: nn.Module, weight: BaseWeight) -> None:
    """Give a module another, frozen, weight."""
    if isinstance(module, QuantizedLinear):
        module.hold(weight)
    else:
        module.weight = nn.Parameter(cast(Tensor, weight), requires_grad=False)
