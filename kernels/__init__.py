"""GPU kernels in Triton: tensors, strides, scalars and the two device functions of a mask and a
score go in.

    source.py      the Triton reading: a tree of the language as a device function
    rules.py       what the language decides otherwise than Triton
    tile.py        one tile: who may be seen, score, bias, dropout
    forward.py     rows of queries along their live tiles of keys
    backward.py    the gradients, a kernel for each
    interpreter.py what Triton's interpreter needs under a new NumPy

No implementation answers with them in this version: `impl="triton"` is refused by every backend,
with that reason, and never quietly answered by something else.
"""

if __name__ == "kernels":
    raise ImportError(
        "`kernels` must be imported as attn_core.kernels. Got a bare import of `kernels`; "
        "install the package (pip install -e .) instead of putting its source folder on sys.path."
    )
