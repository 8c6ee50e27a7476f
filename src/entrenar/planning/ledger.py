"""Follow every tensor storage from birth to death, in a real step or in one without bytes.

A dispatch mode sees each operation below autograd. A storage is born when an operation returns it and dies when torch
releases it, as a weak reference tells, so checkpointing, hooks and the tape need no special case. With meta tensors
the same step runs without bytes: large tensors are meta, token ids are real because their values decide shapes, and
where the two meet, only the shape of the real one counts. The idea comes from FakeTensorMode and
`torch.distributed._tools.mem_tracker`; neither is used, because importing them takes longer than the whole plan.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar.planning.heap import Heap
from entrenar.planning.meta_shapes import TensorShape, rule_of, writes
from entrenar.planning.product_warmup import ProductWarmup

Use = Literal["weights", "gradients", "optimizer", "activations", "temporaries", "batch"]
_CAPACITY = 1 << 16
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@dataclass(slots=True, eq=False)
class Life:
    """A storage: its size, its use, and its birth and death, counted in events."""

    size_bytes: int
    use: Use
    born: int
    died: int | None = None
    watch: Any = None


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Records the lives of all storages that appear while it is on.

    With `has_bytes` every operation runs for real and is only followed. Without, tensors of real numbers are made on
    the meta device, whatever device is asked for, and take their place on `heap` if there is one.

    Attributes:
        count: how many storages were seen.
        flops: floating-point operations of the matrix products so far, as they were carried out.
        moved_bytes: bytes that all other operations read and wrote.
    """

    def __init__(self, heap: Heap | None = None, *, has_bytes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lives: list[Life | None] = [None] * _CAPACITY
        self.count = 0
        self.flops = 0
        self.moved_bytes = 0
        self._heap = heap
        self._warmup = ProductWarmup() if heap is not None else None
        self._has_bytes = has_bytes
        self._events = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler to leave this mode alone: 75 MB and 2 s."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, for real if all its tensors are real, and note what it returns."""
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        if not self._has_bytes and (any(t.is_meta for t in tensors) if tensors else _makes_numbers(func, kwargs)):
            result = self._without_bytes(func, args, kwargs, is_mixed=not all(t.is_meta for t in tensors))
            if self._warmup is not None:
                self._warmup.run(func._schema.name, tensors)
        else:
            result = func(*args, **kwargs)
        returned = list(_tensors((result,)))
        for tensor in returned:
            self._see(tensor)
        self._count(func, tensors, returned)
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase; what the forward leaves alive is an activation, kept for the backward."""
        first = self.count
        yield
        if name == "forward":
            self.mark_alive("activations", since=first)

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Treat tensors made meanwhile as mapped from a file: they take no room on the heap."""
        heap, self._heap = self._heap, None
        try:
            yield
        finally:
            self._heap = heap

    def mark(self, tensors: Iterable[Tensor], use: Use) -> None:
        """Set the use of tensors."""
        for tensor in tensors:
            self._see(tensor).use = use

    def mark_alive(self, use: Use, *, since: int) -> None:
        """Set the use of all storages born since the `since`-th that are still alive and have none yet."""
        for life in self.lives[since:]:
            if life.died is None and life.use == "temporaries":
                life.use = use

    @property
    def lives(self) -> list[Life]:
        """Every storage that was seen, in order of birth."""
        return cast(list[Life], self._lives[: self.count])

    @property
    def own_bytes(self) -> int:
        """The memory of the record itself."""
        each = sys.getsizeof(self._lives[0]) + 3 * sys.getsizeof(self.count)
        return sys.getsizeof(self._lives) + each * self.count

    def peak(self) -> Counter[Use]:
        """Return the bytes by use at the moment of the peak."""
        events = [(life.born, life, 1) for life in self.lives]
        events += [(life.died, life, -1) for life in self.lives if life.died is not None]
        now: Counter[Use] = Counter()
        total, most, composition = 0, -1, Counter[Use]()
        for _, life, sign in sorted(events, key=lambda event: event[0]):
            total += sign * life.size_bytes
            if sign < 0 and total + life.size_bytes > most:
                most, composition = total + life.size_bytes, now.copy()
            now[life.use] += sign * life.size_bytes
        return composition if total <= most else now

    def _without_bytes(self, func: Any, args: Any, kwargs: dict[str, Any], *, is_mixed: bool) -> Any:
        rule = rule_of(func)
        if rule is not None:
            found = rule(*args, **kwargs)
            if isinstance(found, TensorShape):
                return self._make(found)
            is_several = isinstance(found, tuple) and isinstance(found[0], TensorShape)
            return tuple(self._make(one) for one in found) if is_several else found
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": None}
        if is_mixed:
            args, kwargs = _shapes_only(args), {name: _shapes_only(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _make(self, shape: TensorShape) -> Tensor:
        # The block before the small objects that describe it, as a kernel asks for them: otherwise these would lie
        # where a freed block of that size was, and the next one would not fit there.
        address = self._heap.take(shape.size_bytes) if self._heap is not None else None
        tensor = shape.make()
        self._see(tensor, address)
        return tensor

    def _see(self, tensor: Tensor, address: int | None = None) -> Life:
        # Notes are small and come from no heap (Python serves up to 512 bytes from arenas of its own), because a table
        # that grows in the middle of a step would fill the very holes that we look for.
        storage: Any = tensor.untyped_storage()
        known: Life | None = getattr(storage, "entrenar_life", None)
        if known is not None and known.died is None:
            return known
        life = Life(storage.nbytes(), "temporaries", self._events)
        self._events += 1
        heap = self._heap if tensor.is_meta else None
        if heap is not None and address is None:
            address = heap.take(life.size_bytes)

        def died(_: Any) -> None:
            life.died, life.watch = self._events, None
            self._events += 1
            if heap is not None:
                heap.give_back(address or 0, life.size_bytes)

        life.watch = weakref.ref(storage, died)
        storage.entrenar_life = life
        if self.count < _CAPACITY:
            self._lives[self.count] = life
        else:
            self._lives.append(life)
        self.count += 1
        return life

    def _count(self, func: Any, tensors: list[Tensor], returned: list[Tensor]) -> None:
        flops = _flops(func._schema.name, tensors)
        self.flops += flops
        if flops == 0 and (not func.is_view or writes(func)):
            self.moved_bytes += sum(t.nbytes for t in tensors) + sum(t.nbytes for t in returned)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _makes_numbers(func: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation makes a tensor of real numbers from nothing; integers decide shapes, and are made.

    Only factories whose numbers are unset or all equal count: `arange` holds positions. Integers that belong to a
    tensor without bytes, such as codes, are asked for on its device.
    """
    if func._schema.name not in ("aten::empty", "aten::zeros", "aten::ones", "aten::full"):
        return False
    dtype, device = kwargs.get("dtype") or torch.get_default_dtype(), kwargs.get("device")
    return bool(dtype.is_floating_point) or (device is not None and torch.device(device).type == "meta")


def _shapes_only(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (
            value
            if value.is_meta
            else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        )
    return type(value)(_shapes_only(item) for item in value) if isinstance(value, list | tuple) else value


def _flops(name: str, tensors: list[Tensor]) -> int:
    """Return the cost of a matrix product or of attention; attention's backward has 5 products, its forward 2."""
    if name in ("aten::mm", "aten::bmm"):
        return 2 * tensors[0].numel() * tensors[1].shape[-1]
    if name in ("aten::addmm", "aten::addmm_"):
        return 2 * tensors[1].numel() * tensors[2].shape[-1]
    if name in (_FLASH, f"{_FLASH}_backward"):
        q = tensors[0]
        return (4 if name == _FLASH else 10) * q.numel() * (q.shape[2] + 1) // 2
    return 0
