"""Arrays that lie on several devices: what one device gives, forward and backward.

`jit` cuts a call up by itself. In a `shard_map`, types say over which axes of the mesh an array
varies, and loops have to keep them: T is so large that there are loops over tiles.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAD = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import attn_core
from attn_core import masks, scores

T = 700
assert len(jax.devices()) == 4
devices = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 2, T, 8))
ids = jnp.arange(T) // jnp.array([[100], [170]])
lengths = jnp.array([T, 300])
sinks, slopes, bias = jnp.array([0.5, -0.5]), jnp.array([0.1, 0.2]), jnp.ones((T, T)).at[3].set(0.5)


def close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def both(call):
    def loss(*arrays):
        return sum((x**2).sum() for x in jax.tree.leaves(call(*arrays)))

    floats = lambda arrays: tuple(i for i, x in enumerate(arrays) if x.dtype == jnp.float32)
    return lambda *arrays: (call(*arrays), jax.grad(loss, floats(arrays))(*arrays))
"""

BY_JIT = """
query, key, value, ids = query[:, :, :64], key[:, :, :64], value[:, :, :64], ids[:, :64]


def attend(query, key, value, ids):  # dropout too is that of one device
    mask = masks.causal() & masks.segments(ids)
    dropout = attn_core.Dropout(0.3, 7)
    return attn_core.attention(query, key, value, mask=mask, dropout=dropout)


call = jax.jit(both(attend))
want = call(query, key, value, ids)
for spec in (P("x"), P(None, "x"), P(None, None, "x")):
    cut = [jax.device_put(x, NamedSharding(devices, spec)) for x in (query, key, value)]
    close(call(*cut, ids), want)
"""

BY_SHARD_MAP = """
def attention(*arrays, **options):
    return attn_core.attention(*arrays, **options)


calls = {
    "lengths": (
        lambda q, k, v, n: attention(
            q, k, v, kv_lengths=n, mask=masks.causal(), query_offset="end", return_lse=True
        )[:2],
        (lengths,),
        P("x"),
    ),
    "window, in short lines": (
        lambda q, k, v: attention(q, k, v, mask=masks.causal() & masks.window(left=50)),
        (),
        P(),
    ),
    "sinks, slopes and bias, the same on each device": (
        lambda q, k, v, sinks, slopes, bias: attention(
            q, k, v, sinks=sinks, score=scores.alibi(slopes), bias=bias, return_weights=True
        )[::2],
        (sinks, slopes, bias),
        P(),
    ),
}
for name, (call, more, spec) in calls.items():
    arrays = (query, key, value, *more)
    # Over one of two axes: nothing varies over the other.
    where = (P("x"),) * 3 + (spec,) * len(more)
    parts = jax.shard_map(call, mesh=devices, in_specs=where, out_specs=P("x"))
    want = jax.jit(both(call))(*arrays)
    close(jax.jit(both(parts))(*arrays), want)
"""


@pytest.mark.parametrize("program", [BY_JIT, BY_SHARD_MAP], ids=["jit", "shard_map"])
def test_sharded_arrays_give_what_one_device_gives(program: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
