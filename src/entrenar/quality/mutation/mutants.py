"""Mutants of a Python file: each is one small slip that a test should notice.

A mutant replaces one piece of the syntax tree inside a function. The usual slips (another comparison, a constant
off by one, a statement left out) join those that wreck a gradient without breaking a shape: a factor or a term left
out, a transpose dropped, operands of a product exchanged, sum for mean, a returned gradient set to zero, a bound of a
slice forgotten. Annotations, decorators, defaults, messages of errors, assertions and logging are left alone: a slip
there is another tool's to find.

Mutants are found again by what they say (file, function, line of source, change), never by a line number.
"""

import ast
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType

# Goes into the key of each cached verdict: raise it when an operator changes.
OPERATORS_VERSION = 1

_SIGN = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd}  # fmt: skip
_COMPARE = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
            ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
            ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)}  # fmt: skip
_TWINS = [("sum", "mean"), ("amax", "amin"), ("max", "min"), ("sqrt", "rsqrt"), ("exp", "expm1"), ("ones", "zeros"),
          ("ones_like", "zeros_like"), ("tril", "triu"), ("cos", "sin"), ("floor", "ceil"), ("argmax", "argmin"),
          ("any", "all"), ("maximum", "minimum")]  # fmt: skip
_SWAP = dict(_TWINS) | {right: left for left, right in _TWINS}
_DROPPED_METHODS = {"transpose", "t", "detach", "abs", "neg", "flip", "roll", "clamp", "clamp_", "cumsum"}
_DROPPED_FUNCTIONS = {"sorted", "reversed", "abs"}
_DROPPED_KEYWORDS = {"keepdim", "dim", "alpha", "beta", "is_causal", "reverse", "key", "initial"}
_ORDERED = {"matmul", "mm", "bmm", "sub", "div", "zip"}
_LOGGERS = {"log", "_log", "logger", "logging", "warnings"}


@dataclass(frozen=True)
class Mutant:
    """One slip: where it is and what it changes.

    The lines of its statement say which tests reach it; `occurrence` tells equal slips of one line apart.
    """

    path: str
    function: str
    line: int
    first_line: int
    last_line: int
    operator: str
    code: str
    before: str
    after: str
    occurrence: int

    @property
    def name(self) -> str:
        """The key that finds this mutant again after lines above it moved."""
        return f"{self.function} | {self.code} | {self.before} -> {self.after} | {self.occurrence}"


@dataclass(frozen=True)
class Slot:
    """A place in the tree that holds a node: a field of its parent, or an item of a list there."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        """Put a node here."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


@dataclass(frozen=True)
class Site:
    """A mutant and how to plant it: `function` is the outermost function; its code is exchanged."""

    mutant: Mutant
    outer_function: str
    outer_line: int
    slot: Slot
    original: ast.AST
    replacement: ast.AST


class MutableFile:
    """The tree of one file, with the mutants it has room for."""

    def __init__(self, source: str, path: str) -> None:
        self.path = path
        self.lines = source.splitlines()
        self.tree = ast.parse(source, path)
        self.sites = list(_without_twins(self._find()))
        self.functions: dict[str, str] = {
            name: ast.dump(node) for name, node in _functions(self.tree) if isinstance(node, ast.AST)
        }

    def code_with(self, site: Site) -> CodeType:
        """Return the code object of the site's outermost function with the mutant planted."""
        with _planted(site), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a slip may look odd: 2.0[:, None]
            module = compile(self.tree, self.path, "exec")
        return find_code(module, site.outer_function, site.outer_line)

    def _find(self) -> Iterator[Site]:
        for name, function in _functions(self.tree):
            seen: dict[tuple[str, str, str], int] = {}
            for slot, node, statement, inner in _nodes(function, name):
                for operator, after in _changes(node):
                    ast.copy_location(after, node)
                    ast.fix_missing_locations(after)
                    code = self.lines[statement.lineno - 1].strip()
                    words = (code, _text(node), _text(after))
                    seen[words] = seen.get(words, 0) + 1
                    mutant = Mutant(
                        self.path,
                        inner,
                        node.lineno,
                        statement.lineno,
                        _last_line(statement),
                        operator,
                        *words,
                        seen[words],
                    )
                    yield Site(mutant, name, _first_line(function), slot, node, after)


def find_code(module: CodeType, qualified_name: str, first_line: int) -> CodeType:
    """Return the code of a function inside a compiled module."""
    for constant in module.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == (qualified_name, first_line):
                return constant
            if qualified_name.startswith(f"{constant.co_qualname}."):
                return find_code(constant, qualified_name, first_line)
    raise LookupError(f"no code of {qualified_name} at line {first_line}")


@contextmanager
def _planted(site: Site) -> Iterator[None]:
    site.slot.put(site.replacement)
    try:
        yield
    finally:
        site.slot.put(site.original)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each outermost function and method with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _functions(node, prefix)


def _nodes(function: ast.FunctionDef, name: str) -> Iterator[tuple[Slot, ast.expr | ast.stmt, ast.stmt, str]]:
    """Yield what may be mutated in a function: its slot, the node, its statement, the innermost function's name."""

    def walk(
        parent: ast.AST, statement: ast.stmt, inner: str
    ) -> Iterator[tuple[Slot, ast.expr | ast.stmt, ast.stmt, str]]:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(parent, ast.Call):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or _is_left_alone(node):
                    continue
                within = node if isinstance(node, ast.stmt) else statement
                if isinstance(node, (ast.expr, ast.stmt)):
                    yield Slot(parent, field, index), node, within, inner
                deeper = f"{inner}.{node.name}" if isinstance(node, ast.FunctionDef) else inner
                yield from walk(node, within, deeper)

    return walk(function, function, name)


def _is_left_alone(node: ast.AST) -> bool:
    """True for what is no arithmetic: errors and their messages, assertions, texts, logging, types."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        root = node.value.func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and root.id in _LOGGERS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("cast", "isinstance")
    return False


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt]]:
    """Yield (operator, replacement) for one node."""
    for kind, change in _OPERATORS:
        if isinstance(node, kind):
            yield from change(node)


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    if type(node.op) in _SIGN and not _is_text(node.left) and not _is_text(node.right):
        yield "other arithmetic", ast.BinOp(node.left, _SIGN[type(node.op)](), node.right)
    if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.MatMult)):
        yield "drop right operand", copy.deepcopy(node.left)
    if isinstance(node.op, (ast.Add, ast.Mult)):
        yield "drop left operand", copy.deepcopy(node.right)
    if isinstance(node.op, ast.Sub):
        yield "drop left operand", ast.UnaryOp(ast.USub(), copy.deepcopy(node.right))
    if isinstance(node.op, ast.MatMult):
        yield "exchange operands", ast.BinOp(node.right, ast.MatMult(), node.left)


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, ast.expr]]:
    if not isinstance(node.operand, ast.Constant):
        yield "drop sign or not", copy.deepcopy(node.operand)


def _compare(node: ast.Compare) -> Iterator[tuple[str, ast.expr]]:
    for index, operation in enumerate(node.ops):
        for other in _COMPARE[type(operation)]:
            operations = [*node.ops[:index], other(), *node.ops[index + 1 :]]
            yield "other comparison", ast.Compare(node.left, operations, node.comparators)


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, ast.expr]]:
    yield "and for or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node.value, bool):
        yield "other truth value", ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield "constant off by one", ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield "constant off by one", ast.Constant(node.value - 1)


def _call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if isinstance(function, ast.Attribute) and name in _DROPPED_METHODS:
        yield "drop call", copy.deepcopy(function.value if not _is_module(function.value) else node.args[0])
    if isinstance(function, ast.Name) and name in _DROPPED_FUNCTIONS and node.args:
        yield "drop call", copy.deepcopy(node.args[0])
    if name in _SWAP:
        twin = copy.deepcopy(function)
        setattr(twin, "attr" if isinstance(twin, ast.Attribute) else "id", _SWAP[name])
        yield "other function", ast.Call(twin, node.args, node.keywords)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in _DROPPED_KEYWORDS:
            keywords = node.keywords[:index] + node.keywords[index + 1 :]
            yield "drop keyword", ast.Call(node.func, node.args, keywords)
    if name in _ORDERED and len(node.args) > 1 and _text(node.args[0]) != _text(node.args[1]):
        yield "exchange operands", ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    if name == "where" and len(node.args) > 2:
        yield "exchange operands", ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)


def _attribute(node: ast.Attribute) -> Iterator[tuple[str, ast.expr]]:
    if node.attr in ("mT", "T"):
        yield "drop transpose", copy.deepcopy(node.value)


def _conditional(node: ast.IfExp) -> Iterator[tuple[str, ast.expr]]:
    yield "always the first", copy.deepcopy(node.body)
    yield "always the second", copy.deepcopy(node.orelse)


def _slice(node: ast.Slice) -> Iterator[tuple[str, ast.expr]]:
    if node.lower is not None:
        yield "drop lower bound", ast.Slice(None, node.upper, node.step)
    if node.upper is not None:
        yield "drop upper bound", ast.Slice(node.lower, None, node.step)


def _comprehension(
    node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp,
) -> Iterator[tuple[str, ast.expr]]:
    if any(generator.ifs for generator in node.generators):
        whole = copy.deepcopy(node)
        for generator in whole.generators:
            generator.ifs = []
        yield "drop filter", whole


def _augmented(node: ast.AugAssign) -> Iterator[tuple[str, ast.stmt]]:
    yield "drop statement", ast.Pass()
    yield "assign for update", ast.Assign([node.target], node.value)
    if type(node.op) in _SIGN:
        yield "other arithmetic", ast.AugAssign(node.target, _SIGN[type(node.op)](), node.value)


def _assign(node: ast.Assign) -> Iterator[tuple[str, ast.stmt]]:
    if all(isinstance(target, (ast.Subscript, ast.Attribute)) for target in node.targets):
        yield "drop statement", ast.Pass()


def _expression(node: ast.Expr) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node.value, ast.Call) and "super()" not in ast.unparse(node):  # what is not built cannot be tested
        yield "drop statement", ast.Pass()


def _if(node: ast.If) -> Iterator[tuple[str, ast.stmt]]:
    yield "never", ast.If(ast.Constant(value=False), node.body, node.orelse)
    yield "always", ast.If(ast.Constant(value=True), node.body, node.orelse)


def _jump(node: ast.Break | ast.Continue) -> Iterator[tuple[str, ast.stmt]]:
    yield "break for continue", ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def _return(node: ast.Return) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node.value, ast.Tuple):
        for index, value in enumerate(node.value.elts):
            if not isinstance(value, (ast.Constant, ast.Starred)):
                zero = ast.BinOp(value, ast.Mult(), ast.Constant(0))
                yield "zero a result", ast.Return(_with(node.value, index, zero))


def _with(values: ast.Tuple, index: int, value: ast.expr) -> ast.Tuple:
    return ast.Tuple([*values.elts[:index], value, *values.elts[index + 1 :]], values.ctx)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "np", "math")


Kinds = type[ast.AST] | tuple[type[ast.AST], ...]
_OPERATORS: list[tuple[Kinds, Callable[..., Iterator[tuple[str, ast.expr | ast.stmt]]]]] = [
    (ast.BinOp, _binary), (ast.UnaryOp, _unary), (ast.Compare, _compare), (ast.BoolOp, _boolean),
    (ast.Constant, _constant), (ast.Call, _call), (ast.Attribute, _attribute), (ast.IfExp, _conditional),
    (ast.Slice, _slice), ((ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp), _comprehension),
    (ast.AugAssign, _augmented), (ast.Assign, _assign), (ast.Expr, _expression), (ast.If, _if),
    ((ast.Break, ast.Continue), _jump), (ast.Return, _return),
]  # fmt: skip


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(node).split())


def _first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def _last_line(statement: ast.stmt) -> int:
    """Return the last line of a statement's own words, without the block under it."""
    body = getattr(statement, "body", None)
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno


def _without_twins(sites: Iterator[Site]) -> Iterator[Site]:
    """Leave out a site that makes the very same change at the very same place as one before."""
    seen = set()
    for site in sites:
        key = (id(site.slot.parent), site.slot.field, site.slot.index, ast.dump(site.replacement))
        if key not in seen:
            seen.add(key)
            yield site
