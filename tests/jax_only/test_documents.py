"""The documents' `scaled_dot_product_attention` of JAX against its listing and the judge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cases import DV, TK, TQ, D, backend, close, normal, rng

from attn_core import reference


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
