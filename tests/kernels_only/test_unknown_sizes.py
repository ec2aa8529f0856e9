"""Kernels in a compiled function that knows no sizes: what reads beyond an array is refused as it
runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, draw

from attn_core import attention

QUERY, KEY, VALUE, BIAS = draw(1, 2, 20, 16), draw(1, 2, 23, 16), draw(1, 2, 23, 16), draw(20, 23)
AT = torch.arange(23, device=DEVICE)


@pytest.fixture(autouse=True)
def _data_in_the_graph() -> Iterator[None]:
    torch._dynamo.reset()
    config = torch._dynamo.config
    before = config.capture_dynamic_output_shape_ops
    config.capture_dynamic_output_shape_ops = True
    yield
    config.capture_dynamic_output_shape_ops = before


def call(keys: Any, values: Any, columns: Any) -> Any:
    key, value, bias = KEY[:, :, keys], VALUE[:, :, values], BIAS[:, columns]
    return attention(QUERY, key, value, bias=bias, impl="triton")


def test_keys_values_and_bias_cut_apart() -> None:
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in (19, 7):
        cut = [n > AT] * 3
        torch.testing.assert_close(compiled(*cut), call(*cut), rtol=0, atol=1e-6)
    with pytest.raises((RuntimeError, AssertionError), match=r"Eq\(u\d+, u\d+\)|u\d+ == u\d+"):
        compiled(AT < 7, AT < 6, AT < 7)
    for n in (6, 8):
        with pytest.raises(ValueError, match=rf"`bias` must broadcast .* Got \(20, {n}\)"):
            compiled(AT < 7, AT < 7, n > AT)
