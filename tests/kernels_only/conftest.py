"""Triton's interpreter where there is no GPU: chosen before triton is imported, or not at all."""

import os
from importlib.util import find_spec

import pytest

if find_spec("triton") is None or find_spec("torch") is None:
    pytest.skip("triton and torch are not installed", allow_module_level=True)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
