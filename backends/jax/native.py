"""`jax.nn.dot_product_attention`, where it means what the spec means: XLA's, or cuDNN's on a GPU.

Whatever is masked it answers in its own way (an empty row averages all values), so it is asked for
whole problems only. XLA's form holds all logits: on a CPU `chunked` is several times as fast, and
"auto" goes there first.

It hides by a finite number, -0.7 of the largest float32, where the spec selects. Logits near that
number lose to it or tie with it: a causal row whose logits are all below it averages the keys it
may not see. A row whose logits are all -inf is NaN, causal or not, where the spec says 0. Both take
logits beyond 2e38, so every call bounds its own by Cauchy's

    |s| <= D * max|Q| * max|K| * max(1, |scale|)

and where that is not below 1e38 (a NaN is not) another implementation answers, by `lax.cond`: the
plan does not depend on numbers, what runs does. The two maxima read T * D numbers beside T * T
logits. The other is `reference` on a CPU, which holds all logits as this one does and has every
derivative that this one has, and `chunked` on a GPU: memory is planned for both branches, and
cuDNN's stays linear.

On a GPU, cuDNN takes some widths and some devices. What this module knows is said in its own words;
whatever else JAX would raise while it traces the call is said in JAX's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from attn_core.backends.jax import chunked, reference
from attn_core.backends.jax.arrays import DTYPES
from attn_core.spec import AttentionOutput, Operands, Problem
from attn_core.whole import beside, whole

Array = Any

_NAME = "jax.nn.dot_product_attention"
_DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16")}
"""XLA's form computes float64 in float32, and takes no float16 on a CPU; cuDNN takes 16 bits."""

_SAFE = 1e38
"""Below this bound no logit reaches the number that hides, nor do the sums on the way to it."""


def refusals(p: Problem) -> list[str]:
    reasons = beside(p, _NAME)
    if p.return_lse:
        reasons.append(f"`return_lse` must be left out for {_NAME}. Got True.")
    if 0 not in (p.batch, p.q_len, p.k_len) and whole(p) is None:
        reasons.append(
            "the mask must allow everything, or be causal() with Tq = Tk, and no lengths. "
            "Got another mask, or lengths."
        )
    known = _DTYPES.get(p.device, ())
    if p.dtype not in known:
        names = ", ".join(known) or "no dtype"
        reasons.append(f"{_NAME} means what we mean in {names} on {p.device}. Got {p.dtype}.")
    return reasons + _cudnn(p, bool(reasons)) if p.device == "gpu" else reasons


def attend(p: Problem, x: Operands) -> AttentionOutput:
    q, k = (jax.lax.stop_gradient(a) for a in (x.query, x.key))
    safe = _bound(p, q, k) < _SAFE

    def native(x: Operands) -> AttentionOutput:
        # Under vmap both branches run, and of a branch not taken no NaN may flow back.
        q, k = (jnp.where(safe, a, jnp.zeros_like(a)) for a in (x.query, x.key))
        return AttentionOutput(_call(p, q, k, x.value))

    # Only its arguments are kept for a backward pass: what the branch not taken keeps is zeros.
    return jax.lax.cond(safe, native, jax.checkpoint(lambda x: _other(p).attend(p, x)), x)


def _bound(p: Problem, q: Array, k: Array) -> Array:
    """Of every sum and every logit: float32, +inf or NaN where it is out of range."""
    largest = [jnp.abs(a).max().astype(jnp.float32) for a in (q, k)]
    return largest[0] * p.width * max(1.0, abs(p.scale)) * largest[1]


def _other(p: Problem) -> Any:
    return chunked if p.device == "gpu" else reference


def _call(p: Problem, q: Array, k: Array, v: Array) -> Array:
    q, k, v = (a if p.layout == "BTHD" else a.swapaxes(1, 2) for a in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=p.scale,
        is_causal=whole(p) == "causal",
        implementation="cudnn" if p.device == "gpu" else "xla",
    )
    return out if p.layout == "BTHD" else out.swapaxes(1, 2)


# --- What cuDNN takes. ----------------------------------------------------------------------------


def _cudnn(p: Problem, refused: bool) -> list[str]:
    """Refusals on a GPU; JAX is asked last, and only about what nothing else refuses."""
    reasons = chunked.refusals(p)
    capability = _capability()
    if capability < (8, 0):
        found = ".".join(str(n) for n in capability) or "a device without CUDA"
        reasons.append(f"cuDNN's kernel needs compute capability 8.0 or more. Got {found}.")
    widest = 256 if capability >= (9, 0) else 128
    if p.width % 8 or p.width > widest:
        reasons.append(
            f"D must be a multiple of 8 and at most {widest} for cuDNN's kernel. Got {p.width}."
        )
    if not 2.0**-126 <= p.scale <= 2.0**126:
        # The kernel takes a float32, and may look for the largest logit before it scales.
        reasons.append(
            f"`scale` must be a positive normal float32 for cuDNN's kernel. Got {p.scale}."
        )
    if not refused and not reasons:
        sizes = (p.batch, p.q_len, p.k_len, p.heads, p.kv_heads, p.width)
        message = _raised(p.dtype, sizes, whole(p) == "causal")
        if message:
            reasons.append(f"JAX must take the call with cuDNN. Got its refusal: {message}")
    return reasons


@lru_cache(maxsize=1)
def _capability() -> tuple[int, ...]:
    """Of the first GPU, (major, minor); () where it is none of CUDA's, or none is there."""
    try:
        device = jax.local_devices(backend="gpu")[0]
        return tuple(int(n) for n in device.compute_capability.split("."))
    except (RuntimeError, AttributeError, ValueError):
        # ROCm's devices have names such as gfx90a for it.
        return ()


@lru_cache(maxsize=256)
def _raised(dtype: str, sizes: tuple[Any, ...], causal: bool) -> str | None:
    """What JAX raises for forward and backward pass, or None; nothing is computed or compiled.

    Its checks run while it traces: whether there is a cuDNN, which one, and what that one takes.
    """
    batch, q_len, k_len, heads, kv_heads, width = sizes
    q = jax.ShapeDtypeStruct((batch, q_len, heads, width), DTYPES[dtype])
    k = jax.ShapeDtypeStruct((batch, k_len, kv_heads, width), DTYPES[dtype])

    def both(q: Array, k: Array, v: Array) -> Array:
        out, back = jax.vjp(
            lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal, implementation="cudnn"),
            *(q, k, v),
        )
        return back(out)

    try:
        jax.eval_shape(both, q, k, k)
    except Exception as error:  # whatever it is, the call would raise it
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
