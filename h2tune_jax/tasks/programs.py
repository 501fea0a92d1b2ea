"""Find the value of a program answer without running Python: a small evaluator of arithmetic.

A model's answer may be a program that nobody has read before. So it is parsed, and only what is
listed here has a meaning: numbers, lists, assignments, arithmetic, comparisons, `if`, `for` over a
list or a range, calls of the functions below, and `print`. There are no attributes but those of
`math`, no other imports, no definitions, no `while`, and text can only be printed. The number of
steps and the sizes of numbers and lists are bounded.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

MAX_SOURCE = 20_000  # characters
MAX_STEPS = 50_000  # evaluated statements and expressions, and elements that calls read or make
MAX_DEPTH = 60  # of nested expressions and statements
MAX_ITEMS = 5_000  # of a list
MAX_BITS = 2_048  # of a whole number
MAX_CHOICE = 300  # n of factorial, comb, perm

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class ProgramError(ValueError):
    """The program has no value here: not allowed, not valid, too costly, or it fails."""


def evaluate_program(source: str) -> int | float:
    """Return what a program computes.

    That is the last number that it prints; if it prints none, its variable `answer`; if it has
    none, the value of its last line, where that is an expression.

    Raises:
      ProgramError: with the reason.
    """
    if len(source) > MAX_SOURCE:
        raise ProgramError(f"longer than {MAX_SOURCE} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about the program is not ours to give
            tree = ast.parse(source.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"not a program: {error}") from None
    machine = _Machine()
    try:
        machine.run(tree.body)
    except (ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        if isinstance(error, ProgramError):
            raise
        raise ProgramError(f"{type(error).__name__}: {error}") from None
    for value in (machine.printed, machine.variables.get("answer"), machine.last):
        if _is_number(value):
            if isinstance(value, float) and not math.isfinite(value):
                raise ProgramError("the value is not finite")
            return value
    raise ProgramError("it prints no number")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(value: Any) -> Any:
    """Let pass what a program may hold: bounded whole numbers, floats, truths and lists."""
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ProgramError(f"a whole number beyond {MAX_BITS} bits")
        return value
    if isinstance(value, list):
        if len(value) > MAX_ITEMS:
            raise ProgramError(f"a list of more than {MAX_ITEMS}")
        return value
    raise ProgramError(f"a value of type {type(value).__name__}")


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ProgramError(f"a number is needed, not a {type(value).__name__}")
    return value


def _power(base: Any, exponent: Any) -> Any:
    base, exponent = _number(base), _number(exponent)
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    # Bounded before it is computed: the result has about this many bits.
    if whole and int(base).bit_length() * exponent > 2 * MAX_BITS:
        raise ProgramError(f"a power beyond {MAX_BITS} bits")
    return base**exponent


def _round(value: Any, digits: Any = None) -> Any:
    # A whole number rounded to a negative count of digits costs 10 ** -digits.
    if digits is not None and (not isinstance(digits, int) or abs(digits) > MAX_CHOICE):
        raise ProgramError("a rounding to something else than a few digits")
    return round(_number(value), digits)


def _small(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*values: Any) -> Any:
        if any(not isinstance(v, int) or abs(v) > MAX_CHOICE for v in values):
            raise ProgramError(f"{fn.__name__} of something else than whole numbers to 300")
        return fn(*values)

    return call


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: fn(*map(_number, values))


def _over(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function take one list of numbers, or several numbers."""

    def call(*values: Any) -> Any:
        items = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        return fn([_number(item) for item in items])

    return call


def _range(*bounds: int) -> list[int]:
    span = range(*bounds)
    if len(span) > MAX_ITEMS:
        raise ProgramError(f"a range of more than {MAX_ITEMS}")
    return list(span)


_PLAIN_MATH = (
    *("sqrt", "exp", "log", "log2", "log10", "hypot", "floor", "ceil", "trunc", "fabs"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "degrees", "radians", "gcd", "lcm"),
)
_MATH: dict[str, Any] = {name: _plain(getattr(math, name)) for name in _PLAIN_MATH}
_MATH |= {name: _small(getattr(math, name)) for name in ("factorial", "comb", "perm")}
_MATH |= {"pow": _power, "pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": _plain(abs),
    "round": _round,
    "int": _plain(int),
    "float": _plain(float),
    "pow": _power,
    "min": _over(min),
    "max": _over(max),
    "sum": _over(sum),
    "sorted": _over(sorted),
    "len": _over(len),
    "range": _range,
}


class _Machine:
    """One run of one program: its variables, what it printed, and how many steps it took."""

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}
        self.modules: set[str] = set()
        self.functions = dict(_FUNCTIONS)
        self.printed: Any = None
        self.last: Any = None
        self.steps = 0
        self.depth = 0

    def run(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.last = None
            self.enter(self.execute, statement)

    def enter(self, visit: Callable[[Any], Any], node: ast.AST) -> Any:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ProgramError(f"more than {MAX_STEPS} steps")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ProgramError(f"nested deeper than {MAX_DEPTH}")
        value = visit(node)
        self.depth -= 1
        return value

    def value(self, node: ast.AST) -> Any:
        return self.enter(self.compute, node)

    def execute(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(ast.Call(ast.Name("print"), arguments, [])):
                self.print(arguments)
            case ast.Expr(value):
                self.last = self.value(value)
            case ast.Assign(targets, value):
                result = self.value(value)
                for target in targets:
                    self.assign(target, result)
            case ast.AnnAssign(target, _, ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(ast.Name(name), operation, value):
                left = self.value(ast.Name(name))
                self.variables[name] = self.combine(operation, left, self.value(value))
            case ast.If(test, body, orelse):
                self.run(body if self.value(test) else orelse)
            case ast.For(target, items, body, []):
                values = self.value(items)
                if not isinstance(values, list):
                    raise ProgramError("a loop over something else than a list or a range")
                for item in list(values):
                    self.assign(target, item)
                    self.run(body)
            case ast.Import(names) if all(name.name == "math" for name in names):
                self.modules |= {name.asname or name.name for name in names}
            case ast.ImportFrom("math", names, 0):
                self.take_from_math(names)
            case ast.Pass():
                pass
            case _:
                raise ProgramError(f"{type(node).__name__} is not allowed")

    def print(self, arguments: Sequence[ast.expr]) -> None:
        for argument in arguments:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                continue
            value = self.value(argument)
            if _is_number(value):
                self.printed = value

    def take_from_math(self, names: Sequence[ast.alias]) -> None:
        for name in names:
            wanted = _MATH if name.name == "*" else {name.asname or name.name: _MATH.get(name.name)}
            for alias, thing in wanted.items():
                if thing is None:
                    raise ProgramError(f"math.{name.name} is not allowed")
                if callable(thing):
                    self.functions[alias] = thing
                else:
                    self.variables[alias] = thing

    def assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(name):
                self.variables[name] = value
            case ast.Tuple(targets) | ast.List(targets):
                if not isinstance(value, list) or len(value) != len(targets):
                    raise ProgramError("an assignment to a different number of names")
                for part, item in zip(targets, value):
                    self.assign(part, item)
            case _:
                raise ProgramError(f"an assignment to {type(target).__name__} is not allowed")

    def combine(self, operation: ast.operator, left: Any, right: Any) -> Any:
        if isinstance(operation, ast.Pow):
            return _bound(_power(left, right))
        if type(operation) not in _BINARY:
            raise ProgramError(f"{type(operation).__name__} is not allowed")
        return _bound(_BINARY[type(operation)](_number(left), _number(right)))

    def compute(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(bool() | int() | float() as value):
                return _bound(value)
            case ast.Name(name):
                if name not in self.variables:
                    raise ProgramError(f"the name {name!r} is not known")
                return self.variables[name]
            case ast.Attribute(ast.Name(module), name) if module in self.modules:
                if not isinstance(_MATH.get(name), float):
                    raise ProgramError(f"math.{name} is not allowed")
                return _MATH[name]
            case ast.List(items) | ast.Tuple(items):
                return _bound([self.value(item) for item in items])
            case ast.Subscript(items, index):
                values, place = self.value(items), self.value(index)
                if not isinstance(values, list) or not isinstance(place, int):
                    raise ProgramError("only a list has elements, at whole numbers")
                return values[place]
            case ast.BinOp(left, operation, right):
                return self.combine(operation, self.value(left), self.value(right))
            case ast.UnaryOp(operation, operand) if type(operation) in _UNARY:
                return _bound(_UNARY[type(operation)](_number(self.value(operand))))
            case ast.BoolOp(operation, operands):
                stop = isinstance(operation, ast.Or)
                result: Any = not stop
                for operand in operands:
                    result = self.value(operand)
                    if bool(result) == stop:
                        break
                return result
            case ast.Compare(left, operations, rights):
                return self.compare(self.value(left), operations, rights)
            case ast.IfExp(test, body, orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.Call(function, arguments, []):
                call = self.find_function(function)
                values = [self.value(argument) for argument in arguments]
                result = _bound(call(*values))
                self.steps += sum(len(v) for v in (*values, result) if isinstance(v, list))
                return result
            case _:
                raise ProgramError(f"{type(node).__name__} is not allowed")

    def compare(
        self, left: Any, operations: Sequence[ast.cmpop], rights: Sequence[ast.expr]
    ) -> bool:
        for operation, node in zip(operations, rights):
            if type(operation) not in _COMPARE:
                raise ProgramError(f"{type(operation).__name__} is not allowed")
            right = self.value(node)
            if not _COMPARE[type(operation)](_number(left), _number(right)):
                return False
            left = right
        return True

    def find_function(self, node: ast.expr) -> Callable[..., Any]:
        match node:
            case ast.Name(name) if name in self.functions:
                return self.functions[name]
            case ast.Attribute(ast.Name(module), name) if module in self.modules:
                if callable(_MATH.get(name)):
                    return _MATH[name]
        raise ProgramError(f"a call of {ast.unparse(node)[:40]!r} is not allowed")
