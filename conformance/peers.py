"""The peers a user would otherwise call, each told what the suite asks in the peer's own words.

An adapter passes on; it mends nothing. Where a library means something else by a word, the suite
is to find it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attn_core.conformance.subjects import Subject, subject


def torch_sdpa() -> Subject:
    """torch.nn.functional.scaled_dot_product_attention."""
    import torch

    @subject("torch", name="torch-sdpa", alone=("causal",))
    def sdpa(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Any:
        grouped = query.shape[1] != key.shape[1]
        if bias is not None and mask is not None:
            bias = torch.where(mask, bias, -torch.inf)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if bias is None else bias,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )

    return sdpa


def torch_mha() -> Subject:
    """torch.nn.MultiheadAttention with identity projections: its own mask polarity, one width."""
    import torch

    @subject("torch", name="torch-mha", dtypes=("float64", "float32"), grouped=False, widths=False)
    def mha(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        batch, heads, rows, width = query.shape
        size = heads * width
        eye = torch.eye(size, dtype=query.dtype)

        def flat(x: Any) -> Any:
            return x.transpose(1, 2).reshape(batch, x.shape[2], size)

        given = None if mask is None else mask.reshape(batch * heads, rows, key.shape[2])
        out, weights = torch.nn.functional.multi_head_attention_forward(
            *(flat(x).transpose(0, 1) for x in (query, key, value)),
            embed_dim_to_check=size,
            num_heads=heads,
            in_proj_weight=torch.cat([eye, eye, eye]),
            in_proj_bias=None,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=eye,
            out_proj_bias=None,
            training=False,
            need_weights=True,
            attn_mask=given,
            average_attn_weights=False,
        )
        out = out.transpose(0, 1).reshape(batch, rows, heads, width).transpose(1, 2)
        return out, None, weights

    return mha


def torch_flex() -> Subject:
    """torch.nn.attention.flex_attention, uncompiled and forward."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU it has no backward pass.
    @subject("torch", name="torch-flex", backward=False)
    def flex(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Any:
        full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        bias = None if bias is None else bias.expand(full)

        def change(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if bias is not None:
                s = s + bias[b, h, q, k]
            return s if mask is None else torch.where(mask[b, h, q, k], s, -torch.inf)

        return flex_attention(
            query, key, value, score_mod=change, scale=scale, enable_gqa=full[1] != key.shape[1]
        )

    return flex


def transformers_eager() -> Subject:
    """Hugging Face transformers' `eager_attention_forward`, chosen as a model would choose it.

    Each model has its own copy of that function: Llama's is the plain one, Gemma 2's takes a
    softcap, gpt-oss's takes sinks, and none takes both. The mask is additive and in the dtype of
    the query: 0, or the least finite number. A bias goes in with it, since it is all they add.
    """
    import torch

    with _checkout_off_the_path():
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss
        from transformers.models.llama.modeling_llama import eager_attention_forward as llama

    @subject("torch", name="transformers-eager", either=("softcap", "sinks"))
    def eager(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> Any:
        added = bias
        if mask is not None:
            # `masking_utils.eager_mask` says the same, but has no axis for heads, and its
            # parameters change from release to release.
            least = torch.finfo(query.dtype).min
            hides = torch.where(mask, torch.zeros((), dtype=query.dtype), least)
            added = hides if bias is None else bias + hides
        # What the functions read off the layer that calls them.
        layer: Any = torch.nn.Module().eval()
        layer.num_key_value_groups = query.shape[1] // key.shape[1]
        more: dict[str, Any] = {}
        chosen = llama
        if softcap is not None:
            chosen, more = gemma2, {"softcap": softcap}
        elif sinks is not None:
            chosen, layer.sinks = gpt_oss, sinks
        out, weights = chosen(layer, query, key, value, added, scaling=scale, **more)
        return out.transpose(1, 2), None, weights

    return eager


@contextmanager
def _checkout_off_the_path() -> Iterator[None]:
    """sys.path without our source tree, which is on it where a command is typed there.

    transformers asks once, as it is imported, for Hugging Face's package `kernels`, and would find
    our folder of that name, which refuses to be imported so.
    """
    root = Path(__file__).resolve().parent.parent
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = path


def jax_nn() -> Subject:
    """jax.nn.dot_product_attention, its XLA implementation."""
    import jax
    import jax.numpy as jnp

    @subject("jax", name="jax-nn", widths=False)
    def attend(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        window: Any = None,
        scale: float | None = None,
        kv_lengths: Any = None,
        q_lengths: Any = None,
    ) -> Any:
        def lengths(x: Any) -> Any:
            return None if x is None else jnp.asarray(x)

        if window is not None and None in window:
            window = tuple(2**30 if side is None else side for side in window)
        out = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (query, key, value)),
            bias=bias,
            mask=mask,
            scale=scale,
            is_causal=causal,
            query_seq_lengths=lengths(q_lengths),
            key_value_seq_lengths=lengths(kv_lengths),
            local_window_size=window,
            implementation="xla",
        )
        return out.swapaxes(1, 2)

    return attend


def flax_nnx() -> Subject:
    """flax.nnx.dot_product_attention."""
    from flax import nnx

    @subject("jax", name="flax-nnx", grouped=False, widths=False)
    def attend(query: Any, key: Any, value: Any, mask: Any = None, bias: Any = None) -> Any:
        out = nnx.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (query, key, value)), mask=mask, bias=bias
        )
        return out.swapaxes(1, 2)

    return attend


def _keras(framework: str) -> Subject:
    """keras.ops.dot_product_attention; Keras reads its backend once, when it is imported."""
    backend = {"tf": "tensorflow"}.get(framework, framework)
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    import keras

    if keras.backend.backend() != backend:
        raise ImportError(
            f"keras-{framework} must run where Keras uses {backend}. Got a process in which it "
            f"was imported with {keras.backend.backend()}."
        )

    @subject(framework, name=f"keras-{framework}", widths=framework != "jax")
    def attend(
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        bias: Any = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Any:
        def swapped(x: Any) -> Any:
            return keras.ops.transpose(x, (0, 2, 1, 3))

        return swapped(
            keras.ops.dot_product_attention(
                *(swapped(x) for x in (query, key, value)),
                bias=bias,
                mask=mask,
                scale=scale,
                is_causal=causal,
            )
        )

    return attend


def keras_tf() -> Subject:
    """keras.ops.dot_product_attention under the TensorFlow backend."""
    return _keras("tf")


def keras_torch() -> Subject:
    """keras.ops.dot_product_attention under the torch backend."""
    return _keras("torch")


def keras_jax() -> Subject:
    """keras.ops.dot_product_attention under the JAX backend."""
    return _keras("jax")


PEERS: dict[str, Callable[[], Subject]] = {
    "torch-sdpa": torch_sdpa,
    "torch-mha": torch_mha,
    "torch-flex": torch_flex,
    "transformers-eager": transformers_eager,
    "jax-nn": jax_nn,
    "flax-nnx": flax_nnx,
    "keras-tf": keras_tf,
    "keras-torch": keras_torch,
    "keras-jax": keras_jax,
}
"""The shipped adapters, by the names of the command line; each imports its library when called."""
