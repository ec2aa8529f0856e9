"""The documents' functions of JAX against their listing and the judge."""

from functools import partial
from typing import Any

import document_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from document_cases import KINDS, MODULE_REACHES, REACHES, given, judged, mask_of, shapes
from jax_cases import DV, TK, TQ, D, backend, close, normal, rng

import attn_core
from attn_core import Dropout, documents, reference


def listing(query, key, value, bias, scale):
    """The documents' listing, written out: softmax(q kᵀ · scale + mask) v."""
    s = np.einsum("...qd,...kd->...qk", query, key) * scale + bias
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("...qk,...kv->...qv", p / p.sum(-1, keepdims=True), value)


LEADS = [(), (3,), (2, 3), (2, 1, 3)]


DOCUMENTS = [("numpy", lead, None) for lead in LEADS]
DOCUMENTS += [(form, (2, 3), scale) for form in ("eager", "jit") for scale in (None, 1.0)]


@pytest.mark.parametrize("kind", ["none", "float", "boolean", "zero is hidden"])
@pytest.mark.parametrize(("form", "lead", "scale"), [*DOCUMENTS, ("numpy", (2, 3), 1.0)])
def test_documents(lead, scale, kind, form):
    query, key = normal(*lead, TQ, D, seed=90), normal(*lead, TK, D, seed=91)
    value = normal(*lead, TK, DV, seed=92)
    visible = rng(93).random((*lead[-1:], TQ, TK)) < 0.7
    visible[..., 0] = True
    bias = normal(TQ, TK, seed=94)
    mask = {"none": None, "float": bias, "boolean": visible, "zero is hidden": visible * 2}[kind]
    added = {"none": 0.0, "float": bias}.get(kind, np.where(visible, 0.0, -np.inf))
    wanted = listing(query, key, value, added, 1 / np.sqrt(D) if scale is None else scale)
    if kind == "zero is hidden":
        mask = mask != 0
    call = partial(backend.scaled_dot_product_attention, scale=scale)
    given = (query, key, value) if mask is None else (query, key, value, mask)
    if form != "numpy":
        given = [jnp.asarray(a) for a in given]
    found = jax.jit(call)(*given) if form == "jit" else call(*given)
    assert type(found) is np.ndarray if form == "numpy" else backend.owns(found)
    close("documents", found, wanted, 5e-6)


def test_documents_dropout_and_errors():
    query, key, value = (normal(3, n, w, seed=95) for n, w in ((TQ, D), (TK, D), (TK, DV)))
    call = backend.scaled_dot_product_attention
    kept = reference.keep(0.4, 5, range(3), [0], np.arange(TQ)[None], np.arange(TK))
    s = np.einsum("bqd,bkd->bqk", query, key) / np.sqrt(D)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    wanted = (p * np.broadcast_to(kept, (3, 1, TQ, TK))[:, 0] / 0.6) @ value
    close("dropout", call(query, key, value, dropout_rate=0.4, seed=5), wanted)
    assert np.array_equal(
        call(query, key, value, mask=np.zeros((TQ, TK), bool)), np.zeros((3, TQ, DV))
    )
    x = jnp.asarray(query)
    with pytest.raises(TypeError, match="`seed` must be given"):
        call(query, key, value, dropout_rate=0.4)
    with pytest.raises(TypeError, match="must not be wider"):
        call(x, jnp.asarray(key), jnp.asarray(value), np.zeros((TQ, TK)))
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        call(query, key, value, np.ones((TQ, TK), int))
    with pytest.raises(ValueError, match="leading dimensions of `q`"):
        call(query, key[:2], value)
    with pytest.raises(TypeError, match="must be an array of JAX, or all of them NumPy"):
        call(query, jnp.asarray(key), value)


# --- Masks of every shape, and none of them written out. ------------------------------------------


def both(q, k, v, mask):
    """out, and the gradient of the sum of its squares for a float mask."""

    def total(mask):
        out = backend.scaled_dot_product_attention(q, k, v, mask)
        return (out**2).sum(), out

    if mask.dtype == bool:
        return (total(mask)[1],)
    slope, out = jax.grad(total, has_aux=True)(mask)
    return out, slope


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_masks_of_every_shape(lead, kind):
    """Of four leading shapes a part, since each is compiled."""
    x = given(lead)
    every = shapes(lead)
    for shape in every[:: max(1, len(every) // 5)]:
        mask = mask_of(shape, kind)
        with attn_core.use(impl="reference"):
            found = jax.jit(both)(*[jnp.asarray(one) for one in (*x, mask)])
        for got, want in zip(found, judged(x, mask), strict=False):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        if kind == "boolean" and lead == (2, 3):
            host = backend.scaled_dot_product_attention(*x, mask)
            np.testing.assert_allclose(host, judged(x, mask)[0], rtol=1e-4, atol=1e-5)


class Reached(Exception):
    """`attention` was called."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
def test_masks_go_on_as_they_are(make, kind, monkeypatch):
    reached = []

    def recording(*given: Any, mask: Any = None, bias: Any = None, **options: Any) -> Any:
        reached.append((mask if bias is None else bias).shape)
        raise Reached

    monkeypatch.setattr(documents, "attention", recording)
    for lead, shape, want in REACHES:
        with pytest.raises(Reached):
            backend.scaled_dot_product_attention(*map(make, (*given(lead), mask_of(shape, kind))))
        assert reached.pop() == want, (lead, shape)
    held = {f"{part}.weight": jnp.eye(4) for part in ("query", "key", "value", "out")}
    for lead, shape, want in MODULE_REACHES:
        x, mask = make(np.zeros((*lead, 5, 4), np.float32)), make(mask_of(shape, kind))
        with pytest.raises(Reached):
            backend.attention_module(x, mask=mask, parameters=held, heads=4)
        assert reached.pop() == want, (lead, shape)


@pytest.mark.parametrize(
    ("shape", "kind"), [((2, 1, 1, 4096), "boolean"), ((1, 8, 1, 4096), "float")]
)
def test_memory_is_linear(shape, kind):
    """As XLA plans it: written out for each row of each head they would be 256 MiB and 1 GiB."""

    def planned(f, *arrays):
        return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    def ours(q, mask):
        return backend.scaled_dot_product_attention(q, q, q, mask)

    def bare(q, mask):
        return attn_core.attention(q, q, q, **{"mask" if kind == "boolean" else "bias": mask})

    def back(f):
        return jax.grad(lambda q, mask: f(q, mask).sum())

    x = jax.ShapeDtypeStruct((2, 8, 4096, 16), jnp.float32)
    mask = jax.ShapeDtypeStruct(shape, bool if kind == "boolean" else jnp.float32)
    most = planned(bare, x, mask)
    assert planned(ours, x, mask) <= most + 2**20
    more = [jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for a in (x, mask)]
    # What is folded may be copied once each: q, and out.
    assert planned(ours, *more) <= most + 2 * 4 * 2 * 8 * 4096 * 16 + 2**20
    assert planned(back(ours), x, mask) <= planned(back(bare), x, mask) + 2**20


@pytest.mark.parametrize("lead", document_cases.LEADS)
def test_dropout_is_by_heads(lead):
    x = given(lead)
    got = backend.scaled_dot_product_attention(*x, dropout_rate=0.4, seed=5)
    close("dropout", got, document_cases.dropped(x, 0.4, 5))
    if len(lead) == 2:
        with attn_core.use(backend="jax"):
            assert np.array_equal(got, attn_core.attention(*x, dropout=Dropout(0.4, 5)))


def test_symbols_for_sizes():
    """Of jax.export: heads that are not known are as many batches, and have no numbers to drop."""
    call = backend.scaled_dot_product_attention
    x, mask = given((2, 3)), mask_of((2, 1, 1, 7), "boolean")
    sizes = jax.export.symbolic_shape("b, h, i, j")
    told = [(*sizes[:3], 4), (*sizes[:2], sizes[3], 4), (*sizes[:2], sizes[3], 3)]
    spec = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in told]
    spec.append(jax.ShapeDtypeStruct((sizes[0], 1, 1, sizes[3]), bool))
    held = jax.export.export(jax.jit(call))(*spec)
    close("symbols", held.call(*x, mask), judged(x, mask)[0])
    with pytest.raises(ValueError, match=r"a known number of heads.*\(\?, \?, \?, 4\)"):
        jax.export.export(jax.jit(partial(call, dropout_rate=0.1, seed=1)))(*spec)


def test_refused_in_our_words():
    document_cases.check_refused(backend.scaled_dot_product_attention, jnp.asarray)
