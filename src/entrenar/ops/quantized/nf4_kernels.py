"""Which kernel widens NF4 on a GPU: bitsandbytes' where it is installed, gives the same bits and is faster, else ours.

Both are tried on the device, once in a process, on a tile of an odd size. Bits are compared first, so that the choice
shows in a run's time and in nothing else. On a CPU ours is taken without a trial: there a step would gain a twentieth,
and importing bitsandbytes takes more memory than a small model's base (docs/log.md).
"""

import functools
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# From codes, two a byte, the magnitudes of their blocks and a dtype to the numbers.
Widening = Callable[[Tensor, Tensor, torch.dtype], Tensor]

_BLOCK = 64
_PROBE_BYTES, _PROBE_REPEATS = (1 << 19) + 11, 5


def bitsandbytes_widening() -> Widening | None:
    """Return bitsandbytes' kernel; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401, PLC0415  # an extra, slow to import; registers its operators
    except (ImportError, OSError, RuntimeError):
        return None

    def widen(pairs: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (1, 2 * len(pairs))
        wide: Tensor = torch.ops.bitsandbytes.dequantize_4bit(pairs[:, None], magnitudes, _BLOCK, "nf4", shape, dtype)
        return wide.view(-1)

    return widen


@functools.cache
def widening_on(device: torch.device, dtype: torch.dtype, own: Widening) -> Widening:
    """Return the kernel to use: `own` on a CPU, and where a plan stands for one; the better of the two elsewhere."""
    other = None if device.type in ("cpu", "meta") else bitsandbytes_widening()
    return own if other is None else faster_of(own, other, device, dtype)


def faster_of(own: Widening, other: Widening, device: torch.device, dtype: torch.dtype) -> Widening:
    """Try both on the same tile; return `other` if its bits are those of `own` and its least time is shorter."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(256, (_PROBE_BYTES,), dtype=torch.uint8, generator=generator).to(device)
    magnitudes = torch.rand(-(-2 * _PROBE_BYTES // _BLOCK), generator=generator).to(device)
    try:
        if not torch.equal(own(pairs, magnitudes, dtype), other(pairs, magnitudes, dtype)):
            return own
    except RuntimeError:  # no kernel for this device
        return own
    least_s = {own: float("inf"), other: float("inf")}
    for _ in range(_PROBE_REPEATS):
        for widen in (own, other):
            _finish(device)
            started = time.perf_counter()
            widen(pairs, magnitudes, dtype)
            _finish(device)
            least_s[widen] = min(least_s[widen], time.perf_counter() - started)
    return other if least_s[other] < least_s[own] else own


def _finish(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
