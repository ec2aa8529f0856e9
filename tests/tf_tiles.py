"""Problems of several tiles for TensorFlow's chunked backend, and its answers under one set of
names, as NumPy."""

import numpy as np
import tensorflow as tf

from attn_core.backends import tf as backend

HQ, HK, D, DV = 4, 2, 3, 5


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def inputs(b, tq, tk, hq=HQ, dtype=np.float64):
    return {
        "query": draw(b, hq, tq, D, seed=1, dtype=dtype),
        "key": draw(b, HK, tk, D, seed=2, dtype=dtype),
        "value": draw(b, HK, tk, DV, seed=3, dtype=dtype),
    }


def answers(call, form="function", lse=True, up=None, **changes):
    """Outputs and gradients. `lse`: it is asked for too; `up`: what flows back into out."""
    return traced(call, form, lse, **changes)(call, up)


def traced(call, form="function", lse=True, **changes):
    """`answers` as a function of arrays like those of `call`, and of `up`, in one trace."""

    def given(call, up):
        b, hq, tq, _ = call["query"].shape
        arguments = {n: tf.constant(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
        arguments = {"impl": "chunked", "return_lse": lse} | arguments | changes
        pulled = {"out": draw(b, hq, tq, DV, seed=4) if up is None else up}
        if lse:
            pulled["lse"] = draw(b, hq, tq, seed=5)
        return arguments, {n: tf.constant(x, call["query"].dtype) for n, x in pulled.items()}

    run = backend.pullback(*given(call, None), form)

    def answer(call, up=None):
        output, found = run(*given(call, up))
        found.pop("score", None)
        return {n: x.numpy() for n, x in (found | output._asdict()).items() if x is not None}

    return answer
