"""Calls whose arrays are spread over four devices; a program, since JAX counts devices once.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/jax_meshes.py explicit

makes those of one kind, and prints a line of JSON for each: its name, and what went wrong.

Each call is made by `reference` on one device, and then under shard_map or jit on a mesh; the
answers and all gradients must agree. Tiles are small, so that every loop has several turns.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attn_core
from attn_core import Dropout, attention, masks, scores
from attn_core.backends.jax import chunked_parts, scaled_dot_product_attention
from attn_core.registry import UnsupportedError

B, HQ, HK, TQ, TK, D, DV = 4, 8, 4, 40, 52, 8, 4
WHOLE, ROWS, HEADS, ALONE = P("b", "h"), P("b"), P("h"), P()
IDS = np.sort(np.random.default_rng(0).integers(0, 4, (B, TK)), 1).astype(np.int32)


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


QUERY, KEY, VALUE = normal(1, B, HQ, TQ, D), normal(2, B, HK, TK, D), normal(3, B, HK, TK, DV)
BASE = {"query": (QUERY, WHOLE), "key": (KEY, WHOLE), "value": (VALUE, WHOLE)}


def call(query: Any, key: Any, value: Any, **given: Any) -> Any:
    """`attention` of arrays alone: what is made of them is made here."""
    options: dict[str, Any] = {"query_offset": "end", "mask": masks.causal()}
    if "ids" in given:
        options["mask"] &= masks.segments(given.pop("ids"))
    if "slopes" in given:
        options["score"] = scores.alibi(given.pop("slopes")).then(scores.softcap(8.0))
    if "seed" in given:
        options["dropout"] = Dropout(0.3, given.pop("seed"))
    return attention(query, key, value, **{**options, **given})


EVERYTHING = {"return_lse": True, "return_weights": True}
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Arrays with how each is cut, and what is static.
    "window": (BASE, {"mask": masks.causal() & masks.window(left=6)}),
    "documents, one head of keys": (
        {
            **BASE,
            "key": (KEY[:, :1], ROWS),
            "value": (VALUE[:, :1], ROWS),
            "ids": (jnp.asarray(IDS), ROWS),
        },
        {"return_lse": True},
    ),
    "score and bias": (
        {
            **BASE,
            "slopes": (jnp.linspace(0.1, 0.9, HQ), HEADS),
            "bias": (normal(4, TQ, TK), ALONE),
            "query_offset": (jnp.asarray([0, 30, -7, 12]), ROWS),
        },
        {},
    ),
    "lengths, tokens before heads": (
        {
            **{n: (x.swapaxes(1, 2), P("b", None, "h")) for n, (x, _) in BASE.items()},
            "sinks": (normal(5, HQ), HEADS),
            "kv_lengths": (jnp.asarray([52, 3, 20, 0]), ROWS),
            "q_lengths": (jnp.asarray([40, 17, 0, 5]), ROWS),
        },
        {"layout": "BTHD", **EVERYTHING},
    ),
    "nothing hidden": ({**BASE, "value": (KEY, WHOLE)}, {"mask": None}),
    # Each device draws as the whole does, and looks up what it holds.
    "dropout, tables of batches and heads": (
        {
            **BASE,
            "ids": (jnp.asarray(IDS), ROWS),
            "slopes": (jnp.linspace(0.1, 0.9, HQ), HEADS),
            "bias": (normal(4, B, HQ, 1, TK), WHOLE),
            "seed": (jnp.uint32(7), ALONE),
        },
        {},
    ),
    "heads by number": (BASE, {"mask": attn_core.mask(lambda b, h, q, k: (h < 3) | (q >= k))}),
}
NUMBERED = ("dropout, tables of batches and heads", "heads by number")
"""Under shard_map a part has numbers, and so a dropout, of its own."""
CUT = ("window", "dropout, tables of batches and heads")


def mesh(kind: AxisType) -> Any:
    return jax.make_mesh((2, 2), ("b", "h"), axis_types=(kind, kind))


def with_gradients(function: Callable[..., Any], arrays: dict[str, Any]) -> Callable[..., Any]:
    """All that `function` gives and, of the sum of its squares, the gradient of each float."""
    floats = [n for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)]

    def both(arrays: dict[str, Any]) -> Any:
        def loss(some: dict[str, Any]) -> Any:
            found = jax.tree.leaves(function(**{**arrays, **some}))
            return sum((jnp.where(jnp.isfinite(x), x, 0.0) ** 2).sum() for x in found)

        return function(**arrays), jax.grad(loss)({n: arrays[n] for n in floats})

    return both


def agree(found: Any, wanted: Any) -> None:
    """Sums in another order: of some fifty products of normal numbers."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-4, atol=2e-4)


@cache
def alone(name: str) -> Any:
    """The answer and the gradients on one device, of the formula itself."""
    told, static = CALLS[name]
    arrays = {n: x for n, (x, _) in told.items()}
    return with_gradients(partial(call, impl="reference", **static), arrays)(arrays)


def answers(name: str, impl: str, where: str) -> None:
    told, static = CALLS[name]
    arrays = {n: x for n, (x, _) in told.items()}
    specs = {n: spec for n, (_, spec) in told.items()}
    function, wanted = partial(call, impl=impl, **static), alone(name)
    if where == "shard_map":
        out = P("b", None, "h") if static.get("layout") else WHOLE
        if "return_lse" in static:
            out = type(wanted[0])(out, WHOLE, WHOLE if "return_weights" in static else None)
        cut = jax.shard_map(
            lambda arrays: function(**arrays),
            mesh=mesh(AxisType.Auto),
            in_specs=(specs,),
            out_specs=out,
        )
        both = with_gradients(lambda **arrays: cut(arrays), arrays)
        agree(jax.jit(both)(arrays), wanted)
        return
    on = mesh(AxisType.Explicit if where == "explicit" else AxisType.Auto)
    held = {n: jax.device_put(x, NamedSharding(on, specs[n])) for n, x in arrays.items()}
    program = jax.jit(with_gradients(function, arrays)).lower(held).compile()
    found = program(held)
    agree(found, wanted)
    if name in CUT:
        assert "all-gather" not in program.as_text(), "each device computes its own part"
    if name == "window":
        agree(function(**held), wanted[0])  # without jit
    if where == "explicit":
        for n, gradient in found[1].items():
            assert gradient.sharding.is_equivalent_to(held[n].sharding, gradient.ndim), n


def seeds_of_their_own() -> None:
    """Under shard_map every device drops as its own part would, alone with its seed."""

    def part(q: Any, k: Any, v: Any) -> Any:
        seed = 2 * jax.lax.axis_index("b") + jax.lax.axis_index("h")
        return call(q, k, v, seed=seed)

    cut = jax.shard_map(part, mesh=mesh(AxisType.Auto), in_specs=WHOLE, out_specs=WHOLE)
    found = jax.jit(cut)(QUERY, KEY, VALUE)
    last = [x[2:, x.shape[1] // 2 :] for x in (QUERY, KEY, VALUE)]
    agree(found[2:, 4:], call(*last, seed=jnp.uint32(3)))


def a_ring() -> None:
    """Keys that go round, a part of the sequence on each device, merged by lse."""
    on = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,))
    alike = [x[..., :TQ, :] for x in (QUERY, KEY, VALUE)]

    def ring(q: Any, k: Any, v: Any) -> Any:
        here, rows = jax.lax.axis_index("t"), q.shape[2]

        def turn(carry: Any, step: Any) -> Any:
            k, v, out, lse = carry
            offset = (here - (here - step) % 4) * rows
            part = attention(
                q, k, v, mask=masks.causal(), query_offset=offset, return_lse=True, impl="chunked"
            )
            total = jnp.logaddexp(lse, part.lse)
            old, new = (jnp.exp(x - jnp.maximum(total, -1e9))[..., None] for x in (lse, part.lse))
            k, v = (jax.lax.ppermute(x, "t", [(i, (i + 1) % 4) for i in range(4)]) for x in (k, v))
            return (k, v, out * old + part.out * new, total), None

        shape = (*q.shape[:3], v.shape[3])
        first = jnp.zeros(shape), jnp.full(shape[:3], -jnp.inf)
        first = jax.lax.pcast(first, "t", to="varying")
        return jax.lax.scan(turn, (k, v, *first), jnp.arange(4))[0][2]

    cut = jax.shard_map(ring, mesh=on, in_specs=P(None, None, "t"), out_specs=P(None, None, "t"))
    whole = partial(attention, mask=masks.causal())
    arrays = dict(zip(("query", "key", "value"), alike, strict=True))
    both = with_gradients(lambda query, key, value: cut(query, key, value), arrays)
    agree(jax.jit(both)(arrays), with_gradients(whole, arrays)(arrays))


def a_model(kind: AxisType) -> None:
    """Batches on several devices, weights on each."""
    config = {"kind": "decoder", "width": 16, "depth": 1, "heads": 4, "vocabulary": 50}
    model = attn_core.build(config, backend="jax")
    model.eval()
    definition, state = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 50, (4, 21)))

    def both(state: Any, tokens: Any) -> Any:
        def loss(state: Any) -> Any:
            return (nnx.merge(definition, state)(tokens) ** 2).mean()

        return jax.value_and_grad(loss)(state), nnx.merge(definition, state).generate(tokens, 3)

    on = mesh(kind)
    held = jax.device_put(state, NamedSharding(on, ALONE))
    found = jax.jit(both)(held, jax.device_put(tokens, NamedSharding(on, ROWS)))
    agree(found, both(state, tokens))


def the_documents_function() -> None:
    on = mesh(AxisType.Explicit)
    for x in (QUERY, QUERY[:, :, None], QUERY[:, 0]):
        held = jax.device_put(x, NamedSharding(on, ROWS))
        found = scaled_dot_product_attention(held, held, held)
        agree(found, scaled_dot_product_attention(x, x, x))
        assert found.sharding.is_equivalent_to(held.sharding, x.ndim)
    held = jax.device_put(QUERY, NamedSharding(on, WHOLE))
    for shape, lies in (((TQ,), ALONE), ((B, 1, 1, TQ), ROWS), ((HQ, 1, TQ), P("h"))):
        mask = normal(6, *shape) > -0.5
        there = jax.device_put(mask, NamedSharding(on, lies))
        found = scaled_dot_product_attention(held, held, held, there)
        agree(found, scaled_dot_product_attention(QUERY, QUERY, QUERY, mask))
        assert found.sharding.is_equivalent_to(held.sharding, 4)


def an_axis_of_each_kind() -> None:
    """shard_map over one axis, the other left Explicit."""
    on = mesh(AxisType.Explicit)
    held = [jax.device_put(x, NamedSharding(on, WHOLE)) for x in (QUERY, KEY, VALUE)]
    with jax.set_mesh(on):
        part = partial(call, impl="chunked")
        cut = jax.shard_map(part, in_specs=ROWS, out_specs=ROWS, axis_names={"b"})
        agree(jax.jit(cut)(*held), call(QUERY, KEY, VALUE))


def cut_otherwise() -> None:
    """Along the sequence, both along one axis, or by one head of keys for many."""
    on = mesh(AxisType.Auto)
    part, whole = (
        with_gradients(partial(call, impl=impl), {"query": QUERY})
        for impl in ("chunked", "reference")
    )
    shared = {"query": QUERY, "key": KEY[:, :1], "value": VALUE[:, :1]}
    for arrays, spec in (
        ({"query": QUERY, "key": KEY, "value": VALUE}, P(None, None, ("b", "h"))),
        ({"query": QUERY, "key": KEY, "value": VALUE}, P(("b", "h"))),
        ({"query": QUERY[:3], "key": KEY[:3], "value": VALUE[:3]}, P(None, "h")),
        (shared, P(None, ("h", "b"))),
    ):
        held = {
            n: jax.device_put(x, NamedSharding(on, spec if x.shape[1] > 1 else ALONE))
            for n, x in arrays.items()
        }
        agree(jax.jit(part)(held), whole(arrays))


def vmap_and_a_program_that_is_kept() -> None:
    on = mesh(AxisType.Auto)
    held = [jax.device_put(x, NamedSharding(on, WHOLE)) for x in (QUERY, KEY, VALUE)]
    compiled = jax.jit(partial(call, impl="chunked"))
    wanted = compiled(QUERY, KEY, VALUE)
    agree(jax.jit(jax.vmap(compiled, (0, None, None)))(held[0][None], *held[1:])[0], wanted)
    kept = jax.export.deserialize(jax.export.export(compiled)(*held).serialize())
    agree(jax.jit(kept.call)(*held), wanted)


def second_derivatives() -> None:
    """Refused in our words on a mesh as elsewhere."""

    def twice(q: Any) -> Any:
        return jax.grad(lambda q: call(q, KEY, VALUE, impl="chunked").sum())(q).sum()

    held = jax.device_put(QUERY, NamedSharding(mesh(AxisType.Auto), WHOLE))
    for refused in (jax.grad(twice), lambda q: jax.jvp(twice, (q,), (q,))):
        with pytest.raises(UnsupportedError, match="derivatives of derivatives"):
            jax.jit(refused)(held)


CHECKS: dict[str, dict[str, Callable[[], None]]] = {
    where: {
        f"{name}, {impl}": partial(answers, name, impl, where)
        for name, impls in {
            "window": ("chunked",),
            "documents, one head of keys": ("chunked", "reference"),
            "score and bias": ("chunked",),
            "lengths, tokens before heads": ("chunked",),
            "nothing hidden": ("chunked", "native"),
            "dropout, tables of batches and heads": ("chunked", "reference"),
            "heads by number": ("chunked",),
        }.items()
        for impl in impls
        if where == "explicit" or name not in NUMBERED
    }
    for where in ("shard_map", "explicit")
}
CHECKS["shard_map"] |= {"seeds of their own": seeds_of_their_own, "a ring": a_ring}
CHECKS["explicit"] |= {
    "a model": partial(a_model, AxisType.Explicit),
    "the documents' function": the_documents_function,
    "an axis of each kind": an_axis_of_each_kind,
}
CHECKS["auto"] = {
    **{
        name: partial(answers, name, "chunked", "auto")
        for name in ("lengths, tokens before heads", *CUT, "heads by number")
    },
    "a model": partial(a_model, AxisType.Auto),
    "cut otherwise": cut_otherwise,
    "vmap and a program that is kept": vmap_and_a_program_that_is_kept,
    "second derivatives": second_derivatives,
}

# XLA's partitioner before Shardy asks in another way; JAX still has it, by a setting.
CHECKS["older"] = {"window": partial(answers, "window", "chunked", "auto")}


def main() -> None:
    chunked_parts._ROWS = chunked_parts._KEYS = 16
    chunked_parts._OPEN, chunked_parts._AT_ONCE = 32, 2**12
    chunked_parts._SPAN_LINE, chunked_parts._SPAN_STEP = 8, 8
    for name, check in CHECKS[sys.argv[1]].items():
        try:
            check()
        except Exception:  # the test that started this names each that fails, and why
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        else:
            print(json.dumps([name, None]), flush=True)


if __name__ == "__main__":
    main()
