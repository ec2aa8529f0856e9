"""The formula in torch's own operations; O(Tq * Tk) memory, every option, every transform.

Selection comes before every product: what may not be seen is replaced by zero before it is
multiplied, so that no 0 * NaN arises forward or backward, and every result is selected once more
where a cotangent could carry poison in. The running maximum is held constant under
differentiation, which leaves first and higher derivatives exact, since the result does not depend
on it.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_core.backends.torch.arrays import DTYPES, Reading, autocasts
from attn_core.backends.torch.philox import keep
from attn_core.language.values import drop_threshold
from attn_core.spec import FAR, AttentionOutput, Operands, Problem

Array = Any


def attend(p: Problem, x: Operands) -> AttentionOutput:
    kind = x.query.device.type
    if not autocasts(kind):
        return _attend(p, x)
    with torch.autocast(kind, enabled=False):
        return _attend(p, x)


def _attend(p: Problem, x: Operands) -> AttentionOutput:
    dtype = DTYPES[p.accumulation]
    q, k, v = [_heads_first(a, p).to(dtype) for a in (x.query, x.key, x.value)]
    full = (q.shape[0], p.heads, q.shape[2], k.shape[2])
    index = indices(p, x, *full)
    allowed = structure(p, x, index).expand(full)
    bias = None if x.bias is None else x.bias.to(dtype)
    if bias is not None:
        allowed = allowed & (bias != -torch.inf)
    if p.score is not None:
        # A score may hide keys too, by -inf, whatever the bias is there; what it hides must not be
        # multiplied either.
        allowed = allowed & (_logits(p, x, q, k, None, index, allowed).detach() != -torch.inf)
    logits = _logits(p, x, q, k, bias, index, allowed)
    allowed = allowed & (logits.detach() != -torch.inf)
    rows, seen = allowed.any(-1), _seen(p, allowed)

    hidden = torch.where(allowed, logits, -torch.inf)
    m = _maximum(p, hidden.detach())
    sinks = None
    if x.sinks is not None:
        sinks = x.sinks.to(dtype)[:, None].expand(full[:3])
        if x.q_lengths is not None:
            sinks = torch.where(_valid(p, x, index), sinks, -torch.inf)
        m = torch.maximum(m, sinks.detach())
    m = torch.where(m == -torch.inf, 0.0, m)
    e = torch.where(allowed, torch.exp(hidden - m[..., None]), 0.0)
    total = e.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - m)
    summed = total != 0
    total = torch.where(summed, total, 1.0)
    weights = torch.where(allowed, e / total[..., None], 0.0)
    lse = torch.where(summed, m + torch.log(total), -torch.inf)
    shares = weights
    if p.rate:
        threshold = drop_threshold(p.rate)
        kept = keep(threshold, x.seed, full[0], p.heads, index["q"][:, 0, :, 0], full[3])
        shares = torch.where(kept, weights * (1 / (1 - p.rate)), 0.0)
    out = _select(_product(p, shares, _select(v, seen)), rows).to(x.query.dtype)
    return AttentionOutput(
        _heads_first(out, p),
        lse if p.return_lse else None,
        weights.to(x.query.dtype) if p.return_weights else None,
    )


def indices(p: Problem, x: Operands, batch: Any, heads: int, q_len: Any, k_len: Any) -> Any:
    """b, h, q, k and row as int32 tensors that broadcast to (B, Hq, Tq, Tk)."""
    ints = {"dtype": torch.int32, "device": x.query.device}
    row = torch.arange(q_len, **ints)[None, None, :, None]
    return {
        "b": torch.arange(batch, **ints)[:, None, None, None],
        "h": torch.arange(heads, **ints)[None, :, None, None],
        "q": row + offset(p, x, q_len, k_len),
        "k": torch.arange(k_len, **ints)[None, None, None, :],
        "row": row,
    }


def offset(p: Any, x: Operands, q_len: Any, k_len: Any) -> Array:
    """query_offset as int32, (B or 1, 1, 1, 1)."""
    if p.offset == "zero":
        return torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=x.query.device)
    if p.offset == "given":
        return x.query_offset.to(torch.int64).clamp(-FAR, FAR).to(torch.int32).reshape(-1, 1, 1, 1)
    keys = k_len if x.kv_lengths is None else lengths(x.kv_lengths, k_len)
    rows = q_len if x.q_lengths is None else lengths(x.q_lengths, q_len)
    if x.kv_lengths is None and x.q_lengths is None:
        return torch.full((1, 1, 1, 1), keys - rows, dtype=torch.int32, device=x.query.device)
    return (keys - rows).reshape(-1, 1, 1, 1)


def lengths(given: Array, most: Any) -> Array:
    """Lengths clamped to [0, most]: traced values cannot raise."""
    return given.to(torch.int64).clamp(0, most).to(torch.int32)


def structure(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """Mask and lengths, before bias and score have a say; broadcasts to (B, Hq, Tq, Tk)."""
    device = x.query.device
    allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if p.mask is not None:
        allowed = allowed & Reading(p.accumulation, x.mask, device).read(p.mask, index, x.mask)[0]
    if x.kv_lengths is not None:
        allowed = allowed & (index["k"] < x.kv_lengths.to(torch.int64).reshape(-1, 1, 1, 1))
    if x.q_lengths is not None:
        allowed = allowed & _valid(p, x, index)[..., None]
    return allowed


def _valid(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """(B or 1, 1, Tq): the row is no padding."""
    return index["row"][..., 0] < x.q_lengths.to(torch.int64).reshape(-1, 1, 1)


def _logits(
    p: Problem, x: Operands, q: Array, k: Array, bias: Array | None, index: Any, allowed: Array
) -> Array:
    """The scaled product with score and bias, from selected operands."""
    q, k = _select(q, allowed.any(-1)), _select(k, _seen(p, allowed))
    z = p.scale * _product(p, q, k.transpose(-1, -2))
    if p.score is not None:
        s = torch.where(allowed, z, 0.0)
        reading = Reading(p.accumulation, x.score, x.query.device, allowed)
        z = reading.read(p.score, {**index, "s": s}, x.score)[0].expand(allowed.shape)
    if bias is not None:
        z = z + torch.where(allowed, bias, 0.0)
    return z


def _maximum(p: Problem, hidden: Array) -> Array:
    if p.k_len is None:  # there may be no key at all
        nothing = hidden.new_full((*hidden.shape[:-1], 1), -torch.inf)
        return torch.cat([hidden, nothing], -1).amax(-1)
    if hidden.shape[-1] == 0:
        return hidden.new_full(hidden.shape[:-1], -torch.inf)
    return hidden.amax(-1)


def _heads_first(x: Array, p: Problem) -> Array:
    """(B, H, T, D) from the layout, or back: the exchange is its own inverse."""
    return x if p.layout == "BHTD" else x.transpose(1, 2)


def _seen(p: Problem, allowed: Array) -> Array:
    """(B, Hk, Tk): some query of the group may see the key."""
    batch, _, rows, keys = allowed.shape
    return allowed.reshape(batch, p.kv_heads, p.group * rows, keys).any(2)


def _select(x: Array, rows: Array) -> Array:
    return torch.where(rows[..., None], x, 0.0)


def _product(p: Problem, a: Array, b: Array) -> Array:
    """(B, Hq, T, X) @ (B, Hk, X, Y), the heads of a group as one tall matrix."""
    batch, _, rows, inner = a.shape
    folded = a.reshape(batch, p.kv_heads, p.group * rows, inner)
    return torch.matmul(folded, b).reshape(batch, p.heads, rows, b.shape[-1])
