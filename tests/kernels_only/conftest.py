"""Triton's interpreter where there is no GPU: chosen before triton is imported, or not at all."""

import os
from importlib.util import find_spec

if find_spec("triton") is None or find_spec("torch") is None:
    collect_ignore_glob = ["*"]
else:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
