"""The text reading: what is printed, that it means what the tree does, and that it reads back."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from attn_core import masks, operand, row, scores
from attn_core.backends.numpy.arrays import Reading
from attn_core.language import expr
from attn_core.language.duals import differentiate
from attn_core.language.text import parse, text
from attn_core.language.tree import INT_MAX, INT_MIN, Tape, Tree
from attn_core.language.values import mask, score

# A programme is a list of (operation, three numbers that pick its arguments among the values so
# far); whatever the numbers are, it can be written, so shrinking stays simple.

BINARY = ("add", "sub", "mul", "floordiv", "mod", "div", "minimum", "maximum")
COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
OPS = (
    *BINARY,
    *COMPARE,
    *("and", "or", "xor", "not", "rshift", "bits", "abs", "where", "neg"),
    *("exp", "log", "tanh", "to_int", "to_float", "look1", "look2", "look0", "constant"),
)
EXACT = tuple(
    op for op in OPS if op not in ("div", "exp", "log", "tanh", "to_float", "rshift", "look0")
)

integers = st.one_of(st.integers(-9, 9), st.sampled_from([INT_MIN, INT_MAX, 1000, -1000]))
floats = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e22, 1e-5, math.inf, -math.inf, math.nan, 0.1]),
    st.floats(),
)
picks = st.integers(0, 2**16)
indices = ("b", "h", "q", "k", "row")


def programmes(ops, constants, most=40):
    step = st.tuples(st.sampled_from(ops), picks, picks, picks, constants)
    return st.lists(step, min_size=1, max_size=most)


class Array:
    """Stands in for an operand."""


def written(programme, with_s=True) -> Tree:
    """The programme's tree: the sum of the floats it made last, or its last value."""
    tape = Tape()
    values: dict[str, list[int]] = {
        "int": [tape.index(name) for name in indices],
        "float": [tape.index("s")] if with_s else [],
        "bool": [tape.apply("ge", tape.index("q"), tape.index("k"))],
    }
    arrays = {kind: [Array(), Array()] for kind in values}
    last = values["bool"][0]
    for op, x, y, z, constant in programme:
        last = _step(tape, values, arrays, op, (x, y, z), constant)
        values[tape.kind(last)].append(last)
    return tape.finish(last)[0]


def _step(tape, values, arrays, op, at, constant):
    # Recent values are preferred, so that trees grow deep.
    def pick(kind, n):
        return values[kind][-1 - (n % min(len(values[kind]), 6))]

    numbers = "float" if at[2] % 3 == 0 and values["float"] else "int"
    x, y = pick(numbers, at[0]), pick("int" if at[2] % 2 else numbers, at[1])
    if op == "constant":
        return tape.const(constant)
    if op in BINARY or op in COMPARE:
        if op in ("eq", "ne", "lt", "add") and at[2] % 5 == 0:
            return tape.apply(op, pick("bool", at[0]), pick("bool", at[1]))
        return tape.apply(op, x, y)
    if op in ("and", "or", "xor"):
        return tape.apply(op, pick("bool", at[0]), pick("bool", at[1]))
    if op == "not":
        return tape.apply("not", pick("bool", at[0]))
    if op == "bits":
        return tape.apply("and", pick("int", at[0]), pick("int", at[1]))
    if op == "rshift":
        return tape.apply("rshift", pick("int", at[0]), pick("int", at[1]))
    if op == "neg":
        zero = tape.const(0.0) if tape.kind(x) == "float" else tape.const(0)
        return tape.apply("sub", zero, x)
    if op == "where":
        return tape.apply("where", pick("bool", at[2]), x, y)
    if op in ("to_int", "to_float"):
        return tape.cast(x if at[2] % 2 else pick("bool", at[0]), op[3:])
    if op.startswith("look"):
        kinds = [kind for kind in ("int", "bool", "float") if kind != "float" or values["float"]]
        kind = kinds[at[2] % len(kinds)]
        read = [pick("int", n) for n in at[: int(op[-1])]]
        return tape.lookup(arrays[kind][len(read) == 2], kind, read)
    return tape.apply(op, x)


@settings(max_examples=400, deadline=None)
@given(programmes(OPS, st.one_of(integers, floats, st.booleans())))
@example([("constant", 0, 0, 0, -0.0), ("neg", 0, 0, 0, 0)])
@example([("constant", 0, 0, 1, -5), ("neg", 0, 0, 1, 0), ("neg", 0, 0, 1, 0)])
@example([("constant", 0, 0, 0, math.nan), ("sub", 0, 0, 0, 0)])
@example([("constant", 0, 0, 1, INT_MIN), ("neg", 0, 0, 1, 0)])
def test_what_is_printed_reads_back(programme):
    tree = written(programme)
    printed = text(tree)
    assert parse(printed) == tree
    ast.parse(printed)
    assert "\n" not in printed


@settings(max_examples=60, deadline=None)
@given(programmes(OPS, st.one_of(integers, floats, st.booleans()), most=12))
def test_derivatives_read_back_too(programme):
    tree = written(programme)
    if tree.steps[tree.results[0]].kind == "float":
        derivative = differentiate(tree).tree
        assert parse(text(derivative)) == derivative


# Python itself says what the text means: every literal is made an int32, and Python does the rest.


class _Literals(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Call(ast.Name("const", ast.Load()), [node], [])


class _Lookup:
    def __init__(self, array):
        self.array = array

    def __getitem__(self, at):
        at = at if isinstance(at, tuple) else (at,)
        sizes = self.array.shape
        return self.array[tuple(np.clip(i, 0, n - 1) for i, n in zip(at, sizes, strict=True))]


def python_value(printed, env):
    env = {
        **env,
        "__builtins__": {},
        "const": lambda x: np.bool_(x) if isinstance(x, bool) else np.int32(x),
        "int": lambda x: np.asarray(x).astype(np.int32),
        "abs": np.abs,
        "minimum": np.minimum,
        "maximum": np.maximum,
        "where": np.where,
    }
    *bindings, last = ast.fix_missing_locations(_Literals().visit(ast.parse(printed))).body
    for binding in bindings:
        exec(compile(ast.Module([binding], []), "binding", "exec"), env)
    return eval(compile(ast.Expression(last.value), "text", "eval"), env)


@settings(max_examples=300, deadline=None)
@given(programmes(EXACT, st.one_of(st.integers(-9, 9), st.booleans()), most=25))
def test_the_text_is_python_for_what_the_tree_computes(programme):
    tree = written(programme, with_s=False)
    rng = np.random.default_rng(0)
    index = dict(
        zip(
            indices,
            np.meshgrid(
                *[
                    np.arange(n, dtype=np.int32) - m
                    for n, m in ((2, 0), (2, 0), (5, 2), (4, 0), (3, 0))
                ]
            ),
            strict=True,
        )
    )
    arrays: dict[int, Any] = {}
    for step in tree.steps:
        if step.op == "lookup":
            made = rng.integers(-4, 5, (3, 4)[: len(step.args)]).astype(np.int32)
            arrays[int(step.value)] = made > 0 if step.kind == "bool" else made
    env: dict[str, Any] = {**index}
    for number, array in arrays.items():
        env[f"{'bool' if array.dtype == bool else 'int'}{number}"] = _Lookup(array)
    with np.errstate(all="ignore"):
        (found,) = Reading("float64").read(tree, index, [arrays[i] for i in range(len(arrays))])
        wanted = python_value(text(tree), env)
    assert np.array_equal(found, wanted)


# Golden ----------------------------------------------------------------------------------------

IDS, IDS2 = np.arange(4), np.zeros((2, 4), int)
VOCABULARY = {
    "q >= k": masks.causal(),
    "q - k <= 255": masks.window(left=255),
    "(q - k <= 3) & (k - q <= 0)": masks.window(3, 0),
    "(q >= k) & (q - k <= 255)": masks.causal() & masks.window(left=255),
    "(q >= k) | (k < 7)": masks.causal() | masks.prefix(7),
    "k < int0[b]": masks.prefix(IDS),
    "(k < int0[b]) & (row < int1[b])": masks.lengths(IDS, IDS.copy()),
    "int0[q] == int0[k]": masks.segments(IDS),
    "int0[b, q] == int0[b, k]": masks.segments(IDS2),
    "int0[row] == int1[b, k]": masks.segments(IDS, IDS2),
    "(q - k) % 4 == 0": masks.dilated(4),
    "((q - k) % 4 == 0) & (q - k <= 8)": masks.dilated(4, left=2),
    "(q >= 0) & (q < 3) | (k < 3)": masks.global_tokens(3),
    "bool0[q] | bool0[k]": masks.global_tokens(IDS > 2),
    "q // 16 == k // 16": masks.chunks(16),
    "bool0[row, k]": masks.dense(np.ones((4, 4), bool)),
    "bool0[b, h, row, k]": masks.dense(np.ones((1, 1, 4, 4), bool)),
    "bool0[q // 2, k // 3]": masks.blocks(np.ones((2, 2), bool), (2, 3)),
    "~(q >= k)": ~masks.causal(),
    "(q >= k) ^ (k < 2)": masks.causal() ^ masks.prefix(2),
    "s - float0[h] * float(abs(q - k))": scores.alibi([0.5, 0.25]),
    "float0[()] * tanh(s / float0[()])": scores.softcap(np.array(3.0)),
}
VOCABULARY["20.0 * tanh(s / 20.0)"] = scores.softcap(20.0)


@pytest.mark.parametrize("printed", VOCABULARY)
def test_golden_texts_of_the_vocabulary(printed):
    made = VOCABULARY[printed]
    assert text(made.tree) == printed
    assert parse(printed) == made.tree


def test_golden_text_of_a_derivative():
    derivative = differentiate(scores.alibi([0.5, 0.25]).tree)
    assert text(derivative.tree) == (
        "s - float0[h] * float(abs(q - k)), 1.0, (0.0 - 1.0) * float(abs(q - k)), h"
    )


@pytest.mark.parametrize(
    ("fn", "printed"),
    [
        (lambda q, k: q - (k - 1), "float(q - (k - 1))"),
        (lambda q, k: (q - k) - 1, "float(q - k - 1)"),
        (lambda q, k: -(q % 3), "float(-(q % 3))"),
        (lambda q, k: -q % 3, "float(-q % 3)"),
        (lambda q, k: q * -3, "float(q * (-3))"),
        (lambda q, k: operator.neg(-q), "float(-(-q))"),
        (lambda q, k: (q >> 2) + 1, "float((q >> 2) + 1)"),
        (lambda q, k: q >> (k + 1), "float(q >> k + 1)"),
        (lambda q, k: (q > k) + 1, "float(int(q > k) + 1)"),
        (lambda q, k: q + math.inf, "float(q) + float('inf')"),
        (lambda q, k: q + -math.inf, "float(q) + float('-inf')"),
        (lambda q, k: q * math.nan, "float(q) * float('nan')"),
        (lambda q, k: q * -0.0, "float(q) * (-0.0)"),
        (lambda q, k: q * 1e22, "float(q) * 1e+22"),
        (
            lambda q, k: expr.where((q > k) == (q > 1), 1, row),
            "float(where((q > k) == (q > 1), 1, row))",
        ),
    ],
)
def test_golden_texts_of_expressions(fn, printed):
    made = score(lambda s, b, h, q, k: fn(q, k))
    assert text(made.tree) == printed
    assert parse(printed) == made.tree


def test_what_is_long_and_shared_is_named():
    table = operand(np.arange(9))

    def fn(b, h, q, k):
        long = table[q // 12345 + 12345] * 12345 + table[k // 54321 + 54321] * 54321
        return (long > 1) & (long < 99) | (long == 7)

    made = mask(fn)
    printed = text(made.tree)
    assert printed.startswith("x0 = int0[q // 12345 + 12345] * 12345 + ")
    assert printed.endswith("(x0 > 1) & (x0 < 99) | (x0 == 7)")
    assert parse(printed) == made.tree


def test_the_text_of_shared_results_stays_short():
    table = operand(np.arange(4.0))

    def fn(s, b, h, q, k):
        at = q
        for _ in range(60):
            at = at + at
            s = s + table[at]
        return s

    derivative = differentiate(score(fn).tree).tree
    printed = text(derivative)
    assert len(printed) < 20_000
    assert parse(printed) == derivative


def test_deep_trees_read_back():
    def fn(b, h, q, k):
        x = q >= k
        for i in range(6_000):
            x = x & (q - k != i)
        return x

    tree = mask(fn).tree
    assert parse(text(tree)) == tree


# Garbage ---------------------------------------------------------------------------------------

GARBAGE = [
    "",
    " ",
    "q >=",
    "q >= k;",
    "q >= k\nk",
    "q  >= k",
    " q >= k",
    "(q >= k)",
    "+q",
    "not q",
    "q and k",
    "q if k else b",
    "0 < q < k",
    "q ** 2",
    "q << 2",
    "q @ k",
    "unknown",
    "x0",
    "x0 = q; k",
    "x0 = x1 = q; x0",
    "x0: int = q; x0",
    "q += 1; q",
    "q = 3; q",
    "import os",
    "__import__('os').system('true')",
    "().__class__",
    "q.real",
    "abs.__globals__",
    "open('/tmp/attn_core_was_here', 'w')",
    "exec('1')",
    "eval('1')",
    "print(q)",
    "(lambda: 1)()",
    "[q, k]",
    "{q}",
    "{q: k}",
    "[x for x in (1, 2)]",
    "(x0 := q)",
    "f'{q}'",
    "'text'",
    "b'bytes'",
    "None",
    "...",
    "3j",
    "-'text'",
    "-None",
    "-True",
    "~q",
    "~1.5",
    "s & 3",
    "s >> 1",
    "abs(q, k)",
    "abs()",
    "abs(*q)",
    "abs(q, key=k)",
    "minimum(q)",
    "where(q, k)",
    "where(q, k, b)",
    "float()",
    "float('text')",
    "float('1.5')",
    "float('infinity')",
    "int('3')",
    "int(q)",
    "bool(q)",
    "str(q)",
    "int(q, k)",
    "int0",
    "int[q]",
    "int0[q:k]",
    "int0[q][k]",
    "int0[...]",
    "int0[*q]",
    "foo0[q]",
    "intx[q]",
    "int-1[q]",
    "int1[q]",
    "int0x[q]",
    "q[0]",
    "4294967296 + q",
    "yield q",
    "await q",
    "lambda: q",
    "def f(): pass",
    "q; k",
    "(" * 300 + "q" + ")" * 300,
    "-" * 5000 + "q",
    "q" + " + q" * 50_000,
    "q\0",
    "q # comment",
    "\udc80",
]


@pytest.mark.parametrize("source", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused_and_not_run(source, tmp_path, monkeypatch):
    import builtins
    import os

    for module, name in ((builtins, "open"), (builtins, "print"), (os, "system")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("executed"))
    with pytest.raises(ValueError, match="`source` must"):
        parse(source)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="qkbhs0123. ()[]+-*/%&|~<>=!,;xintfloabwehrmu'", max_size=30))
def test_random_text_is_refused_or_is_exactly_what_is_printed(source):
    try:
        tree = parse(source)
    except ValueError:
        return
    assert text(tree) == source
