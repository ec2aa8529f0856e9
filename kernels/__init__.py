"""GPU kernels in Triton: tensors, strides, scalars and the two device functions of a mask and a
score go in.

No kernel ships in this version: `impl="triton"` is refused by every backend, with that reason, and
never quietly answered by something else.
"""

if __name__ == "kernels":
    raise ImportError(
        "`kernels` must be imported as attn_core.kernels. Got a bare import of `kernels`; "
        "install the package (pip install -e .) instead of putting its source folder on sys.path."
    )
