"""torch.func and autograd over the torch backend: vmap, jvp, grad, Hessians, against the judge.

Forward mode and second derivatives are the reference's alone.

Nothing here repeats conformance, which asks for outputs and first gradients alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import attn_core
from attn_core import Dropout, Mask, Score, attention, masks, reference, scores

# torch 2.13 itself scripts its forward-mode decompositions when they are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 8, 6
N = 3  # examples to map over
RNG = np.random.default_rng(7)


def draw(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.as_tensor(RNG.standard_normal(shape), dtype=dtype)


def ints(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.as_tensor(RNG.integers(low, high, shape))


Q, K, V = draw(N, B, HQ, TQ, D), draw(N, B, HK, TK, D), draw(N, B, HK, TK, DV)
q, k, v = Q[0], K[0], V[0]


# --- vmap: every way in, against a loop. ----------------------------------------------------------

MAPPED = {
    "queries": (
        lambda q: attention(
            q, k, v, mask=masks.causal(), query_offset="end", score=scores.softcap(2.0)
        ),
        (0,),
        (Q,),
    ),
    "keys, along another axis": (
        lambda k: attention(
            q, k, v, mask=masks.window(2, 1), query_offset=1, dropout=Dropout(0.3, 5)
        ),
        (1,),
        (K.transpose(0, 1),),
    ),
    "everything": (
        lambda q, k, v: attention(q, k, v, mask=masks.causal(), query_offset=-2),
        (0, 0, 0),
        (Q, K, V),
    ),
    "values, the rest broadcast": (lambda v, k: attention(q, k, v), (0, None), (V, k)),
    "lengths, out of range too": (
        lambda n, m: attention(
            q, k, v, kv_lengths=n, q_lengths=m, mask=masks.causal(), query_offset="end"
        ),
        (0, 0),
        (torch.tensor([[1, 7], [0, 3], [9, 4]]), torch.tensor([[1, 5], [0, 3], [9, -4]])),
    ),
    "one length for the batch": (
        lambda n: attention(q, k, v, kv_lengths=n, sinks=torch.arange(4.0)),
        (0,),
        (torch.tensor([3, 0, 7]),),
    ),
    "offsets": (
        lambda n: attention(q, k, v, mask=masks.causal(), query_offset=n),
        (0,),
        (torch.tensor([[-2, 4], [0, 1], [2**31 - 1, 5]]),),
    ),
    "ids": (
        lambda n: attention(q, k, v, mask=masks.segments(n), query_offset=1),
        (0,),
        (ints(0, 3, N, B, TK),),
    ),
    "a boolean mask": (lambda n: attention(q, k, v, mask=n), (0,), (ints(0, 2, N, TQ, TK) == 1,)),
    "slopes": (
        lambda n: attention(q, k, v, score=scores.alibi(n), query_offset=1),
        (0,),
        (draw(N, HQ),),
    ),
    "a bucketed table": (
        lambda n: attention(q, k, v, score=scores.relative_bias(n), query_offset=1),
        (0,),
        (draw(N, 8, HQ),),
    ),
    "a captured scalar": (
        lambda n: attention(q, k, v, score=scores.softcap(n)),
        (0,),
        (draw(N).abs() + 1,),
    ),
    "bias and sinks": (
        lambda n, s: attention(q, k, v, bias=n, sinks=s),
        (0, 1),
        (draw(N, TQ, TK), draw(HQ, N)),
    ),
    "seeds": (
        lambda n: attention(q, k, v, dropout=Dropout(0.3, n)),
        (0,),
        (torch.tensor([-1, 5, 2**40 + 7]),),
    ),
    "seed pairs": (
        lambda n: attention(q, k, v, dropout=Dropout(0.3, n)),
        (0,),
        (torch.tensor([[1, 2], [3, 4], [2**32 - 1, 5]], dtype=torch.uint32),),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_a_loop(name: str) -> None:
    f, in_dims, given = MAPPED[name]
    got = vmap(f, in_dims=in_dims)(*given)
    each = [
        f(*[x if d is None else x.select(d, i) for x, d in zip(given, in_dims, strict=True)])
        for i in range(N)
    ]
    torch.testing.assert_close(got, torch.stack(each), rtol=0, atol=2e-6)
    assert not torch.equal(got[0], got[1]), "the mapped argument makes no difference"


def test_vmap_over_a_mask_and_a_dropout_as_arguments() -> None:
    rows, keys, seeds = ints(0, 3, B, TQ), ints(0, 3, N, B, TK), torch.tensor([1, 2, 3])
    tree = masks.segments(rows, keys[0]).tree
    drop = Dropout(0.3, seeds[0])
    drop = torch.utils._pytree.tree_map(lambda _: seeds, drop)

    def f(mask: Mask, dropout: Dropout, q: Any) -> Any:
        return attention(q, k, v, mask=mask, dropout=dropout)

    mapped = Mask(tree, (rows, keys))
    got = vmap(f, in_dims=(Mask(tree, (None, 0)), 0, None))(mapped, drop, q)
    for i in range(N):
        want = f(masks.segments(rows, keys[i]), Dropout(0.3, i + 1), q)
        torch.testing.assert_close(got[i], want, rtol=0, atol=2e-6)
    assert not torch.equal(got[0], got[1])


def test_vmap_beside_a_mask_of_host_arrays() -> None:
    mask = masks.segments(np.array([0, 0, 1, 1, 2, 2, 2])) & masks.segments([0, 1, 1, 1, 2, 2, 2])

    def f(mask: Mask, dropout: Dropout, q: Any) -> Any:
        return attention(q, k, v, mask=mask, query_offset=1, dropout=dropout)

    got = vmap(f, in_dims=(None, None, 0))(mask, Dropout(0.3, 2**40 + 7), Q)
    for i in range(N):
        want = f(mask, Dropout(0.3, 2**40 + 7), Q[i])
        torch.testing.assert_close(got[i], want, rtol=0, atol=2e-6)


def test_per_sample_gradients() -> None:
    def loss(q: Any, k: Any, v: Any, slopes: Any, n: Any) -> Any:
        score = scores.alibi(slopes).then(scores.softcap(2.0))
        options = {"mask": masks.causal(), "query_offset": -1, "kv_lengths": n}
        return attention(q, k, v, score=score, **options).square().sum()

    slopes, n = draw(HQ), torch.tensor([[7, 2], [3, 0], [5, 7]])
    per_sample = grad(loss, argnums=(0, 1, 2, 3))
    got = vmap(per_sample, in_dims=(0, 0, 0, None, 0))(Q, K, V, slopes, n)
    for i in range(N):
        for one, want in zip(got, per_sample(Q[i], K[i], V[i], slopes, n[i]), strict=True):
            torch.testing.assert_close(one[i], want, rtol=1e-5, atol=2e-6)
            assert want.abs().max() > 1e-3


def test_vmap_twice() -> None:
    f = lambda q, k: attention(q, k, v, mask=masks.causal(), query_offset="end")  # noqa: E731
    got = vmap(lambda q: vmap(lambda k: f(q, k))(K))(Q)
    for i in range(N):
        for j in range(N):
            torch.testing.assert_close(got[i, j], f(Q[i], K[j]), rtol=0, atol=2e-6)


# --- Derivatives in float64, with everything on at once. ------------------------------------------

SMALL = {"B": 1, "HQ": 2, "HK": 1, "TQ": 4, "TK": 4, "D": 2, "DV": 2}
NAMES = ("query", "key", "value", "bias", "sinks", "slopes")


def leaves(B: int, HQ: int, HK: int, TQ: int, TK: int, D: int, DV: int) -> list[torch.Tensor]:
    shapes = [(B, HQ, TQ, D), (B, HK, TK, D), (B, HK, TK, DV), (1, HQ, TQ, TK), (HQ,), (HQ,)]
    return [draw(*shape, dtype=torch.float64) for shape in shapes]


def everything(q: Any, k: Any, v: Any, bias: Any, sinks: Any, slopes: Any) -> Any:
    """Row 0 sees nothing (offset -1), row 1 nothing but its sink (bias), row 3 is padding."""
    bias = torch.where(torch.arange(4)[:, None] == 1, -torch.inf, bias)
    got = attention(
        *(q, k, v),
        bias=bias,
        sinks=sinks,
        score=scores.alibi(slopes).then(scores.softcap(2.0)),
        mask=masks.causal(),
        query_offset=-1,
        q_lengths=3,
        kv_lengths=[3] * q.shape[0],
        dropout=Dropout(0.3, 12),
        return_lse=True,
        return_weights=True,
        impl="reference",
    )
    return got.out, torch.where(torch.isfinite(got.lse), got.lse, 0.0), got.weights


def judged(q: Any, k: Any, v: Any, bias: Any, sinks: Any, slopes: Any) -> list[np.ndarray]:
    """The same, by the judge."""
    bias = bias.copy()
    bias[:, :, 1] = -np.inf
    rows, keys = np.mgrid[: q.shape[2], : k.shape[2]]
    got = reference.attention(
        *(q, k, v),
        bias=bias,
        sinks=sinks,
        score=lambda s, b, h, q, k, a: 2 * np.tanh((s - a[h] * abs(q - k)) / 2),
        operands=(slopes,),
        mask=rows - 1 >= keys,
        query_offset=-1,
        q_lengths=[3] * q.shape[0],
        kv_lengths=[3] * q.shape[0],
        dropout=(0.3, 12),
    )
    return [got.out, np.where(np.isfinite(got.lse), got.lse, 0.0), got.weights]


def test_jvp_is_the_judges_difference_quotient() -> None:
    at = leaves(2, 4, 2, 4, 5, 3, 2)
    at[3] = draw(1, 4, 4, 5, dtype=torch.float64)
    step = 1e-6
    for moved in (*range(6), None):
        along = [
            torch.as_tensor(RNG.standard_normal(x.shape)) * (moved in (None, i))
            for i, x in enumerate(at)
        ]
        values, tangents = jvp(everything, tuple(at), tuple(along))
        up = judged(*[(x + step * d).numpy() for x, d in zip(at, along, strict=True)])
        down = judged(*[(x - step * d).numpy() for x, d in zip(at, along, strict=True)])
        here = judged(*[x.numpy() for x in at])
        for value, tangent, a, b, c in zip(values, tangents, up, down, here, strict=True):
            np.testing.assert_allclose(value.numpy(), c, rtol=0, atol=1e-12)
            np.testing.assert_allclose(tangent.numpy(), (a - b) / (2 * step), rtol=0, atol=2e-8)
        assert max(t.abs().max() for t in tangents) > 1e-3, NAMES[moved or 0]


def test_gradcheck() -> None:
    at = [x.requires_grad_() for x in leaves(**SMALL)]
    assert torch.autograd.gradcheck(everything, at, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(
        everything, at, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True
    )


def test_gradgradcheck() -> None:
    at = [x.requires_grad_() for x in leaves(**SMALL)]
    assert torch.autograd.gradgradcheck(everything, at, check_fwd_over_rev=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(everything, at, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_gradgradcheck_with_a_divided_and_logged_score(layout: str) -> None:
    """The operations that conformance has no second derivative of."""
    slopes, at = draw(2, dtype=torch.float64).abs() + 1, leaves(**SMALL)[:3]
    if layout == "BTHD":
        at = [x.transpose(1, 2) for x in at]

    def f(q: Any, k: Any, v: Any, slopes: Any) -> Any:
        table = attn_core.operand(slopes)

        def fn(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return attn_core.log(attn_core.exp(s / table[h]) + table[h]) * abs(s - 0.1 * q)

        options = {"mask": masks.causal(), "query_offset": -1, "layout": layout}
        return attention(q, k, v, score=attn_core.score(fn), **options, impl="reference")

    given = [x.requires_grad_() for x in (*at, slopes)]
    assert torch.autograd.gradcheck(f, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


def test_hessian_is_the_difference_of_the_judges_gradients() -> None:
    q, k, v, bias, sinks, _ = leaves(**SMALL)
    upstream = draw(*q.shape[:3], v.shape[3], dtype=torch.float64)

    def f(q: Any, sinks: Any) -> Any:
        options = {"mask": masks.causal(), "query_offset": -1, "dropout": Dropout(0.3, 12)}
        found = attention(q, k, v, bias=bias, sinks=sinks, **options, impl="reference")
        return (found * upstream).sum()

    def judge(q: np.ndarray, sinks: np.ndarray) -> np.ndarray:
        rows, keys = np.mgrid[:4, :4]
        found = reference.gradients(
            *(q, k.numpy(), v.numpy()),
            bias=bias.numpy(),
            sinks=sinks,
            mask=rows - 1 >= keys,
            query_offset=-1,
            dropout=(0.3, 12),
            d_out=upstream.numpy(),
        )
        return np.concatenate([found["query"].ravel(), found["sinks"].ravel()])

    point, size = np.concatenate([q.numpy().ravel(), sinks.numpy()]), q.numel()
    columns = []
    for i in range(point.size):
        ends = []
        for sign in (1, -1):
            moved = point.copy()
            moved[i] += sign * 1e-5
            ends.append(judge(moved[:size].reshape(q.shape), moved[size:]))
        columns.append((ends[0] - ends[1]) / 2e-5)
    want = np.stack(columns, -1)
    assert abs(want).max() > 1e-2

    def flat(x: torch.Tensor) -> Any:
        return f(x[:size].reshape(q.shape), x[size:])

    at = torch.as_tensor(point)
    for found in (hessian(flat)(at), jacrev(jacrev(flat))(at), jacfwd(jacfwd(flat))(at)):
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-8)


def test_no_poison_in_any_order() -> None:
    """NaN and Inf where nobody looks: jvp and Hessian are those of the clean arrays, to the bit."""
    clean = leaves(**SMALL)[:3]
    spoilt = [x.clone() for x in clean]
    spoilt[0][:, :, 0] = torch.nan  # query 0 stands before every key
    spoilt[1][:, :, 3] = torch.inf  # key 3 lies after every query
    spoilt[2][:, :, 3] = -torch.inf

    def f(q: Any, k: Any, v: Any) -> Any:
        options = {"score": scores.softcap(2.0), "mask": masks.causal(), "query_offset": -1}
        return attention(q, k, v, **options, impl="reference").square().sum()

    along = tuple(torch.ones_like(x) for x in clean)
    for kind in (lambda *x: jvp(f, x, along)[1], hessian(f, argnums=(0, 1, 2))):
        flat = [torch.utils._pytree.tree_leaves(kind(*x)) for x in (clean, spoilt)]
        for want, got in zip(*flat, strict=True):
            assert torch.isfinite(got).all()
            assert torch.equal(got, want)
    assert hessian(f)(*spoilt).abs().max() > 1e-3


def test_a_score_is_differentiated_as_a_pytree() -> None:
    slopes = draw(HQ)

    def loss(score: Score) -> Any:
        return attention(q, k, v, score=score, query_offset=1).square().sum()

    found = grad(loss)(scores.alibi(slopes))
    assert isinstance(found, Score)
    want = grad(lambda slopes: loss(scores.alibi(slopes)))(slopes)
    torch.testing.assert_close(found.arrays[0], want)
    assert want.abs().min() > 1e-3
    assert torch.equal(vjp(loss, scores.alibi(slopes))[1](torch.tensor(1.0))[0].arrays[0], want)


def test_checkpoint_recomputes_the_same_dropout() -> None:
    def f(q: Any) -> Any:
        return attention(q, k, v, dropout=Dropout(0.5, 3))

    found = []
    for call in (f, lambda q: checkpoint(f, q, use_reentrant=False)):
        leaf = q.clone().requires_grad_()
        call(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 1e-3
