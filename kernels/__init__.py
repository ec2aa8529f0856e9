"""GPU kernels in Triton: tensors, strides, scalars and the two device functions of a mask and a
score go in.

    source.py      the Triton reading: a tree of the language as a device function
    rules.py       what the language decides otherwise than Triton
    tile.py        one tile: who may be seen, score, bias, dropout
    forward.py     rows of queries along their live tiles of keys
    backward.py    the gradients, a kernel for each; bias.py that of a bias
    weights.py     what a tile weighs, and what flows back into it
    statistics.py  what the gradients want to know of rows
    interpreter.py what Triton's interpreter lacks; interpreter_once.py: what it does too often
    configs.py     how large a tile is, by what is static
    ahead.py       compiled ahead of time, without a GPU
    hazards.py     known faults of the compilers below Triton

torch calls them, as `impl="triton"` (`attn_core.backends.torch.triton`); no other framework does.
"""

if __name__ == "kernels":
    raise ImportError(
        "`kernels` must be imported as attn_core.kernels. Got a bare import of `kernels`; "
        "install the package (pip install -e .) instead of putting its source folder on sys.path. "
        "transformers asks for another package of that name, and finds this one where the source "
        "folder is on sys.path, as it is for `python -c` and `python -m` run there: run elsewhere."
    )
