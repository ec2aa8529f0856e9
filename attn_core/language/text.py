"""The text reading: a tree as Python a person can read, and back.

`text(tree)` prints infix with as few parentheses as Python needs; operands are named by kind and
number (`int0[b, q]`, `float1[h]`). `parse(text(tree)) == tree`, so the text is also how a tree
travels where only strings can (opaque operators, golden files). Steps used more than once are
bound by `name = ...;` only where printing them in place would grow the text.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from attn_core.language.tree import INDICES, Step, Tape, Tree

# Operators as Python spells them, with how tightly they bind there.
_INFIX = {
    "lt": ("<", 1),
    "le": ("<=", 1),
    "gt": (">", 1),
    "ge": (">=", 1),
    "eq": ("==", 1),
    "ne": ("!=", 1),
    "or": ("|", 2),
    "xor": ("^", 3),
    "and": ("&", 4),
    "rshift": (">>", 5),
    "add": ("+", 6),
    "sub": ("-", 6),
    "mul": ("*", 7),
    "div": ("/", 7),
    "floordiv": ("//", 7),
    "mod": ("%", 7),
}
_UNARY, _ATOM = 8, 9
_NUMERAL = (*"0123456789", "(-", "float('")  # `0 - 5` is a subtraction, `-5` a constant
_CALLS = {"abs": 1, "minimum": 2, "maximum": 2, "where": 3, "exp": 1, "log": 1, "tanh": 1}
_LONG, _DEEP = 60, 30  # a shared text longer, or a nesting deeper, than this gets a name


@lru_cache(maxsize=1024)
def text(tree: Tree) -> str:
    """The tree as Python; several results are separated by commas."""
    uses = [0] * len(tree.steps)
    for step in tree.steps:
        for a in step.args:
            uses[a] += 1
    bindings: list[str] = []
    printed: list[tuple[str, int, int]] = []  # text, binding strength, depth
    for at, step in enumerate(tree.steps):
        body, strength = _print(step, [printed[a] for a in step.args])
        depth = 1 + max((printed[a][2] for a in step.args), default=0)
        shared = uses[at] > 1 and len(body) > _LONG
        if shared or (uses[at] and depth > _DEEP):
            name = f"x{len(bindings)}"
            bindings.append(f"{name} = {body}; ")
            body, strength, depth = name, _ATOM, 1
        printed.append((body, strength, depth))
    return "".join(bindings) + ", ".join(printed[at][0] for at in tree.results)


def _print(step: Step, args: list[tuple[str, int, int]]) -> tuple[str, int]:
    op = step.op
    if op == "index":
        return str(step.value), _ATOM
    if op == "const":
        return _constant(step.kind, str(step.value))
    if op == "lookup":
        return f"{step.kind}{step.value}[{', '.join(a[0] for a in args) or '()'}]", _ATOM
    if op == "cast":
        return f"{step.kind}({args[0][0]})", _ATOM
    if op in _CALLS:
        return f"{op}({', '.join(a[0] for a in args)})", _ATOM
    if op == "not":
        return f"~{_inside(args[0], _UNARY)}", _UNARY
    if op == "sub" and args[0][0] in ("0", "0.0") and not args[1][0].startswith(_NUMERAL):
        return f"-{_inside(args[1], _UNARY + 1)}", _UNARY
    sign, strength = _INFIX[op]
    # Comparisons chain in Python, and everything else groups to the left.
    left = strength + 1 if strength == 1 else strength
    return f"{_inside(args[0], left)} {sign} {_inside(args[1], strength + 1)}", strength


def _inside(arg: tuple[str, int, int], least: int) -> str:
    return arg[0] if arg[1] >= least else f"({arg[0]})"


def _constant(kind: str, value: str) -> tuple[str, int]:
    if kind != "float" or value not in ("inf", "-inf", "nan"):
        # A leading minus is a sign, which binds less tightly than an atom.
        return (f"({value})", _ATOM) if value.startswith("-") else (value, _ATOM)
    return f"float('{value}')", _ATOM


_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.RShift: "rshift",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}


class _Number:
    """Stands in for the operand of that number while text is parsed."""

    def __init__(self, number: int) -> None:
        self.number = number


@lru_cache(maxsize=1024)
def parse(source: str, exact: bool = True) -> Tree:
    """The tree that `text` printed; not `exact`: that a person wrote, in their own spacing.

    Raises:
        ValueError: for anything `text` does not print.
    """
    tape = Tape()
    operands: dict[int, _Number] = {}
    names: dict[str, int] = {}

    def place(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            if node.id in names:
                return names[node.id]
            if node.id in (*INDICES, "s"):
                return tape.index(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            return tape.const(node.value)
        elif isinstance(node, ast.UnaryOp):
            inner = node.operand
            if isinstance(node.op, ast.Invert):
                return tape.apply("not", place(inner))
            if isinstance(node.op, ast.USub):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, (int, float)):
                    return tape.const(-inner.value)
                negated = place(inner)
                return tape.apply("sub", _zero(tape, negated), negated)
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = place(node.left), place(node.right)
            return tape.apply(_BINARY[type(node.op)], left, right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _BINARY:
            left, right = place(node.left), place(node.comparators[0])
            return tape.apply(_BINARY[type(node.ops[0])], left, right)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            kind = node.value.id.rstrip("0123456789")
            if kind not in ("bool", "int", "float"):
                raise ValueError(f"`source` must look up operands such as int0. Got {kind!r}.")
            number = int(node.value.id[len(kind) :])
            index = node.slice
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            at = [place(part) for part in parts]
            return tape.lookup(operands.setdefault(number, _Number(number)), kind, at)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return call(node.func.id, node.args)
        raise ValueError(f"{ast.unparse(node)!r} is no expression of the language.")

    def call(name: str, args: list[ast.expr]) -> int:
        if len(args) == 1 and name in ("int", "float"):
            if isinstance(args[0], ast.Constant) and type(args[0].value) is str:
                return tape.const(float(args[0].value))
            return tape.cast(place(args[0]), name)
        if _CALLS.get(name) == len(args):
            return tape.apply(name, *[place(arg) for arg in args])
        raise ValueError(f"`source` must call only {', '.join(_CALLS)} and casts. Got {name!r}.")

    try:
        body = ast.parse(source).body
        for statement in body[:-1]:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            if not (isinstance(statement, ast.Assign) and isinstance(target, ast.Name)):
                raise ValueError("`source` must be bindings and one expression.")
            names[target.id] = place(statement.value)
        last = body[-1] if body else None
        if not isinstance(last, ast.Expr):
            raise ValueError("`source` must end in an expression.")
        results = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        tree = tape.finish(*[place(result) for result in results])[0]
        # Whatever else Python's grammar lets through (`+q`, unused names) is not ours either.
        if exact and text(tree) != source:
            raise ValueError(f"`source` must be as printed, {text(tree)!r}.")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`source` must be text printed from a tree. Got {source!r}: {error}"
        ) from error
    return tree


def _zero(tape: Tape, at: int) -> int:
    return tape.const(0.0) if tape.kind(at) == "float" else tape.const(0)
