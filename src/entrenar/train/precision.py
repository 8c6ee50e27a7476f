"""Train in bfloat16 without losing small updates and without storing anything twice.

A bfloat16 weight near 1 cannot take a step below 0.004, so the optimizer needs a float32 *master* of each weight.
Keeping both costs 2 + 4 bytes. But a bfloat16 is the upper half of a float32: the master is the weight plus sixteen
more bits, and only those sixteen bits, the *remainder*, must be kept in addition. With `m` the master's bits as
a 32-bit integer:

    weight    = (m + 0x8000) >> 16        round to nearest, halves away from zero        (1)
    remainder = m - (weight << 16)        in [-0x8000, 0x7fff]: an int16, the low half   (2)
    m         = (weight << 16) + remainder                                               (3)

Equation 3 returns every bit, so 4 bytes hold weight and master where 6 were needed, and a checkpoint holds them as
the model's own bfloat16 file plus the remainders. (A second bfloat16 as Kahan compensation, Zamirai et al. 2020,
arXiv:2010.06192, takes as much memory and is not exact.) The work is done in pieces that stay in the cache.

Gradients of several backward passes are summed in float32 (`GradientSums`): a bfloat16 sum of 64 of them would
keep 2 digits.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from entrenar.train.pieces import own_part

_HALF_WEIGHT_STEP = 0x8000


def join_master(weight: Tensor, remainder: Tensor, master_bits: Tensor, scratch: Tensor) -> Tensor:
    """Write the master's bits into int32 `master_bits` (eq. 3) and return them as float32; `scratch` is int32."""
    master_bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16)
    scratch.copy_(remainder)
    return master_bits.add_(scratch).view(torch.float32)


def split_master(master_bits: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write bfloat16 `weight` (eq. 1) and int16 `remainder` (eq. 2) in place; `master_bits` (int32) is consumed."""
    remainder.copy_(master_bits)  # the conversion keeps the low 16 bits, which as a signed number are eq. 2
    master_bits.add_(_HALF_WEIGHT_STEP).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(master_bits)


def cast_parameters(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Turn float32 parameters into bfloat16 in place and return the trained ones' remainders.

    Frozen parameters are rounded permanently. Buffers, such as rotary angles, keep their precision.
    """
    remainders: dict[nn.Parameter, Tensor] = {}
    for parameter in parameters:
        if parameter.dtype == torch.float32:
            master = parameter.data.contiguous()
            remainder = torch.empty_like(master, dtype=torch.int16)
            weight = torch.empty_like(master, dtype=torch.bfloat16)
            split_master(master.clone().view(torch.int32), weight, remainder)
            parameter.data = weight
            if parameter.requires_grad:
                remainders[parameter] = remainder
    return remainders


class GradientSums:
    """The gradients of a step: in `parameter.grad`, or in float32 sums when low-precision ones must be added up.

    The sums are filled as soon as a parameter's gradient is complete, and the low-precision gradient is freed at once.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._low = [p for p in self._parameters if p.dtype in (torch.bfloat16, torch.float16)]
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._is_summing = False
        for parameter in self._low:
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def begin(self, backward_passes: int) -> None:
        """Forget every gradient and get ready for `backward_passes` of them."""
        self._is_summing = backward_passes > 1
        for parameter in self._parameters:
            parameter.grad = None
        if not self._is_summing:
            self._sums.clear()
            return
        for parameter in self._low:
            if parameter in self._sums:
                own_part(self._sums[parameter]).zero_()
            else:
                self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)

    def _take(self, parameter: Tensor) -> None:
        if self._is_summing and parameter.grad is not None:
            own_part(self._sums[parameter]).add_(own_part(parameter.grad))  # type: ignore[index]  # the hook is given the nn.Parameter
            parameter.grad = None

    def all(self) -> Iterator[Tensor]:
        """Yield the gradient of each parameter that took part, in the order of the parameters."""
        for parameter in self._parameters:
            if (gradient := self.of(parameter)) is not None:
                yield gradient

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of the sum of the losses since `begin`; None for a parameter that took no part."""
        return self._sums.get(parameter, parameter.grad)
