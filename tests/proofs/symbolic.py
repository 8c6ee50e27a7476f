"""A stand-in for torch whose numbers are SymPy expressions, so that the product's own source computes formulas.

A copy of an operation's module is given this stand-in as its `torch`, and its real `forward` and `backward` run on
arrays of symbols. exp, log, rsqrt and the logistic function return fresh symbols whose argument and derivative are
recorded, so every claim becomes an identity of rational functions, which expansion decides exactly. Sizes are fixed
and small; within them a claim holds for all real inputs. What is computed in floating point is bounded elsewhere.

A scale or eps is a symbol: proved for every value. `amax` is an arbitrary symbol: proved for every shift of the
softmax. Memory that nobody has written holds symbols of its own, which no true result contains.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import sympy as sp

SCALE, EPS = sp.Symbol("scale"), sp.Symbol("eps")  # of attention and adapters; of norms
NEGATIVE_INFINITY = sp.Symbol("negative_infinity")
DERIVATIVES: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda symbol, _: symbol,
    "log": lambda _, argument: 1 / argument,
    "rsqrt": lambda symbol, _: -(symbol**3) / 2,
    "sigmoid": lambda symbol, _: symbol * (1 - symbol),
}


@dataclass
class Symbols:
    """The symbols that stand for a function of others, and those of softmax shifts and unwritten memory."""

    meaning: dict[sp.Symbol, tuple[str, Any]] = field(default_factory=dict)
    known: dict[tuple[str, Any], sp.Symbol] = field(default_factory=dict)
    shifts: list[sp.Symbol] = field(default_factory=list)
    count: int = 0

    def fresh(self, name: str) -> sp.Symbol:
        self.count += 1
        return sp.Symbol(f"{name}_{self.count}")

    def function(self, kind: str, argument: Any) -> sp.Symbol:
        """Return the symbol of kind(argument), the same one for the same argument."""
        key = kind, sp.expand(argument)
        if key not in self.known:
            self.known[key] = self.fresh(kind)
            self.meaning[self.known[key]] = key
        return self.known[key]

    def shift(self) -> sp.Symbol:
        self.shifts.append(self.fresh("shift"))
        return self.shifts[-1]

    def exp(self, argument: Any) -> Any:
        """Return exp, with logarithms and shifts among the summands turned into factors."""
        if argument.has(NEGATIVE_INFINITY):
            return sp.Integer(0)
        factor, rest = sp.Integer(1), sp.Integer(0)
        for term in sp.Add.make_args(sp.expand(argument)):
            coefficient, symbol = term.as_coeff_Mul()
            kind, inner = self.meaning.get(symbol, ("", None))
            if kind == "log":
                factor *= inner**coefficient
            elif symbol in self.shifts:
                factor *= self.function("exp", symbol) ** coefficient
            else:
                rest += term
        return factor if rest == 0 else factor * self.function("exp", rest)

    def log(self, argument: Any) -> Any:
        """Return log, with the exponentials of shifts taken out of the argument."""
        result = sp.Integer(0)
        for shift in self.shifts:
            factor = self.function("exp", shift)
            without = sp.cancel(argument * factor) if argument.has(factor) else argument
            if argument.has(factor) and not without.has(factor):
                argument, result = without, result - shift
        return result + self.function("log", argument)

    def derivative(self, symbol: sp.Symbol, variable: sp.Symbol) -> Any:
        """Return the derivative of a symbol by an input."""
        if symbol not in self.meaning:
            return sp.Integer(symbol == variable)
        kind, argument = self.meaning[symbol]
        inner = sum((sp.diff(argument, s) * self.derivative(s, variable) for s in argument.free_symbols), sp.Integer(0))
        return DERIVATIVES[kind](symbol, argument) * inner

    def gradient(self, loss: Any, variables: Sequence[sp.Symbol]) -> list[Any]:
        """Return the derivatives of a loss by each input, through all that stands for something."""
        partials = {symbol: sp.diff(loss, symbol) for symbol in loss.free_symbols}
        return [sum((p * self.derivative(s, x) for s, p in partials.items()), sp.Integer(0)) for x in variables]

    def value(self, expression: Any, numbers: dict[sp.Symbol, Any]) -> Any:
        """Evaluate an expression with a number for each input: another for each, the same in every run.

        Equal numbers, or an order that hashing decides, meet zeros by chance; hundredths of primes do not.
        """
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol in numbers:  # perhaps since a moment ago, by the argument of another
                continue
            kind, argument = self.meaning.get(symbol, ("", None))
            if kind == "":
                sign = 1 if symbol == EPS else (-1) ** len(numbers)
                numbers[symbol] = sign * sp.Rational(sp.prime(len(numbers) + 8), 100)
            else:
                inner = self.value(argument, numbers)
                functions = {
                    "exp": sp.exp,
                    "log": sp.log,
                    "rsqrt": lambda x: x**-0.5,
                    "sigmoid": lambda x: 1 / (1 + sp.exp(-x)),
                }
                numbers[symbol] = sp.N(functions[kind](inner), 30)
        return sp.N(expression.subs(numbers), 20)


def is_zero(expression: Any) -> bool:
    """Decide whether a rational function is zero everywhere."""
    return expression == 0 or sp.expand(sp.fraction(sp.together(expression))[0]) == 0


class Sym:
    """An array of expressions with the part of torch.Tensor's interface that the operations use."""

    device = SimpleNamespace(type="cpu")
    dtype = "exact"

    def __init__(self, array: Any, symbols: Symbols) -> None:
        self.array, self.symbols = np.asarray(array, dtype=object), symbols

    def of(self, array: Any) -> "Sym":
        """Wrap an array of the same symbols."""
        return Sym(array, self.symbols)

    def each(self, function: Callable[[Any], Any]) -> "Sym":
        """Apply a function to each expression."""
        return self.of(np.frompyfunc(function, 1, 1)(self.array)) if self.array.size else self

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.array.ndim

    @property
    def mT(self) -> "Sym":  # noqa: N802 - torch's name
        """The last two dimensions swapped."""
        return self.of(np.swapaxes(self.array, -1, -2))

    def __len__(self) -> int:
        return len(self.array)

    def __add__(self, other: Any) -> "Sym":
        return self.of(self.array + plain(other))

    def __radd__(self, other: Any) -> "Sym":
        return self.of(plain(other) + self.array)

    def __sub__(self, other: Any) -> "Sym":
        return self.of(self.array - plain(other))

    def __rsub__(self, other: Any) -> "Sym":
        return self.of(plain(other) - self.array)

    def __mul__(self, other: Any) -> "Sym":
        return self.of(self.array * plain(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Sym":
        return self.of(self.array / plain(other))

    def __neg__(self) -> "Sym":
        return self.of(-self.array)

    def __matmul__(self, other: "Sym") -> "Sym":
        return self.of(np.matmul(self.array, other.array))

    def __invert__(self) -> "Sym":
        return self.of(np.logical_not(self.array.astype(bool)))

    def __and__(self, other: "Sym") -> "Sym":
        return self.of(self.array.astype(bool) & other.array.astype(bool))

    def __getitem__(self, key: Any) -> "Sym":
        return self.of(self.array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = plain(value)

    def __iadd__(self, other: Any) -> "Sym":
        self.array[...] = self.array + plain(other)
        return self

    def __isub__(self, other: Any) -> "Sym":
        self.array[...] = self.array - plain(other)
        return self

    def to(self, *_: Any, **__: Any) -> "Sym":
        """Return itself: all is exact, and on one device."""
        return self

    def numel(self) -> int:
        """Count the expressions."""
        return self.array.size

    def stride(self, _: int) -> int:
        """Return 1: layout has no meaning here."""
        return 1

    def sum(self, dim: int | None = None, *, keepdim: bool = False) -> "Sym":
        """Add along a dimension."""
        return self.of(self.array.sum(axis=dim, keepdims=keepdim))

    def mean(self, dim: int, *, keepdim: bool = False) -> "Sym":
        """Average along a dimension."""
        return self.sum(dim, keepdim=keepdim) / sp.Integer(self.shape[dim])

    def amax(self, dim: int, *, keepdim: bool = False) -> "Sym":
        """Return a new symbol in place of each maximum: a proof must not rest on which it is."""
        return self.sum(dim, keepdim=keepdim).each(lambda _: self.symbols.shift())

    def masked_fill(self, mask: "Sym", value: float) -> "Sym":
        """Put minus infinity where the mask is set."""
        assert value == -math.inf
        return self.of(np.where(mask.array.astype(bool), NEGATIVE_INFINITY, self.array))

    def reshape(self, *shape: Any) -> "Sym":
        """Arrange in other sizes."""
        return self.of(self.array.reshape(*shape))

    view = reshape

    def flatten(self) -> "Sym":
        """Arrange in one row."""
        return self.of(self.array.reshape(-1))

    def expand(self, *shape: Any) -> "Sym":
        """Repeat along dimensions of size one."""
        wanted = sizes_of(shape)
        own = (1,) * (len(wanted) - self.ndim) + self.shape
        sizes = tuple(have if want == -1 else want for have, want in zip(own, wanted, strict=True))
        return self.of(np.broadcast_to(self.array, sizes))

    def transpose(self, first: int, second: int) -> "Sym":
        """Swap two dimensions."""
        return self.of(np.swapaxes(self.array, first, second))

    def unsqueeze(self, dim: int) -> "Sym":
        """Insert a dimension of size one."""
        return self.of(np.expand_dims(self.array, dim))

    def squeeze(self, dim: int) -> "Sym":
        """Remove a dimension of size one."""
        return self.of(np.squeeze(self.array, dim))

    def tril(self, diagonal: int) -> "Sym":
        """Keep what lies on and below a diagonal."""
        return self.of(np.tril(self.array.astype(bool), diagonal))

    def new_empty(self, *shape: Any, **_: Any) -> "Sym":
        """Return memory that nobody wrote yet."""
        return unwritten(self.symbols, sizes_of(shape))

    def new_zeros(self, *shape: Any, **_: Any) -> "Sym":
        """Return zeros."""
        return self.of(np.full(sizes_of(shape), sp.Integer(0), dtype=object))

    def new_full(self, shape: Any, value: int, **_: Any) -> "Sym":
        """Return an array of one number."""
        return self.of(np.full(shape, sp.Integer(value), dtype=object))

    def copy_(self, other: "Sym") -> "Sym":
        """Overwrite with another's expressions."""
        self.array[...] = other.array
        return self

    def mul_(self, other: Any) -> "Sym":
        """Multiply in place."""
        return self.copy_(self * other)

    def add_(self, other: Any) -> "Sym":
        """Add in place."""
        return self.copy_(self + other)

    def addmm_(self, a: "Sym", b: "Sym", *, alpha: Any = 1) -> "Sym":
        """Add a scaled matrix product in place."""
        return self.copy_(self + (a @ b) * alpha)

    def addcmul_(self, a: "Sym", b: "Sym") -> "Sym":
        """Add a product of elements in place."""
        return self.copy_(self + a * b)

    def exp_(self) -> "Sym":
        """Exponentiate in place."""
        return self.copy_(self.each(self.symbols.exp))

    def gather(self, dim: int, places: "Sym") -> "Sym":
        """Take the expressions at places along a dimension."""
        return self.of(np.take_along_axis(self.array, places.array.astype(int), dim))

    def scatter_add_(self, dim: int, places: "Sym", values: "Sym") -> "Sym":
        """Add values at places of the last dimension."""
        assert dim == -1
        for row, columns in enumerate(places.array.astype(int)):
            for column, place in enumerate(columns):
                self.array[row, place] += values.array[row, column]
        return self


def sizes_of(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the sizes that were given one by one or as a tuple."""
    return shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape


def plain(value: Any) -> Any:
    """Return what numpy computes with: arrays of expressions, and exact numbers."""
    if isinstance(value, Sym):
        return value.array
    return sp.nsimplify(value) if isinstance(value, float) else value


def unwritten(symbols: Symbols, shape: Any) -> Sym:
    """Return memory that holds nothing that belongs into a result."""
    memory = np.empty(shape, dtype=object)
    memory.fill(symbols.fresh("unwritten"))
    return Sym(memory, symbols)


def torch_of(symbols: Symbols) -> SimpleNamespace:
    """Return what an operation's module is given as `torch`."""

    def log_softmax(x: Sym, dim: int, out: Sym) -> Sym:
        shift = x.amax(dim, keepdim=True)
        total = (x - shift).each(symbols.exp).sum(dim, keepdim=True)
        return out.copy_(x - (total.each(symbols.log) + shift))

    return SimpleNamespace(
        exp=lambda x: x.each(symbols.exp),
        log=lambda x: x.each(symbols.log),
        rsqrt=lambda x: x.each(lambda e: symbols.function("rsqrt", e)),
        sigmoid=lambda x: x.each(lambda e: symbols.function("sigmoid", e)),
        log_softmax=log_softmax,
        cat=lambda parts, dim: Sym(np.concatenate([part.array for part in parts], axis=dim), symbols),
        mm=lambda a, b, out: out.copy_(a @ b),
        empty_like=lambda x, **_: unwritten(symbols, x.shape),
        zeros_like=lambda x, **_: x.new_zeros(x.shape),
        ones=lambda *shape, **_: Sym(np.full(shape, fill_value=True), symbols),
        promote_types=lambda *_: "exact",
        is_grad_enabled=lambda: False,
        float32="exact", bool="bool", contiguous_format=None,
    )  # fmt: skip


def variables(symbols: Symbols, name: str, *shape: int) -> Sym:
    """Return an array of inputs."""
    array = np.empty(shape, dtype=object)
    for place in np.ndindex(*shape):
        array[place] = sp.Symbol("_".join((name, *map(str, place))))
    return Sym(array, symbols)


def constants(symbols: Symbols, values: Any) -> Sym:
    """Return an array of integers."""
    array = np.asarray(values)
    return Sym(np.frompyfunc(sp.Integer, 1, 1)(array) if array.size else array, symbols)
