"""torch's export to ONNX: the graph has no operator that ONNX has not, and computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import attn_core
from attn_core import AttentionConfig, Dropout, attention, masks, scores

# torch says so of itself, and of what is not installed.
pytestmark = pytest.mark.filterwarnings("ignore")

Q, K, V = ((2, 4, 9, 8), (2, 2, 12, 8), (2, 2, 12, 6))
END: dict[str, Any] = {"query_offset": "end"}


def calls(q: Any, k: Any, v: Any, slopes: Any, lengths: Any, ids: Any, sinks: Any) -> list[Any]:
    """One call for each way that operands come into a graph."""
    near = scores.alibi(slopes).then(scores.softcap(20.0))
    out, lse = attention(q, k, v, mask=masks.causal(), return_lse=True, **END)[:2]
    return [
        out,
        lse,
        attention(q, k, v),
        attention(q, k, v, mask=masks.causal() & masks.window(4), score=near, **END),
        attention(q, k, v, mask=masks.segments(ids), kv_lengths=lengths, query_offset=0),
        attention(q, k, v, sinks=sinks, dropout=Dropout(0.25, seed=2**40 + 3), layout="BHTD"),
    ]


class All(torch.nn.Module):
    def forward(self, *given: Any) -> Any:
        return tuple(calls(*given))


def evaluated(program: Any, *given: Any) -> list[np.ndarray]:
    model = program.model_proto
    onnx.checker.check_model(model)
    names = [each.name for each in model.graph.input]
    fed = dict(zip(names, [np.asarray(x) for x in given], strict=True))
    return list(ReferenceEvaluator(model).run(None, fed))


def test_every_operand_in_one_graph() -> None:
    """`auto` passes over what has operators of its own, whether or not it was asked before."""
    draw = np.random.default_rng(5)
    wide = [draw.standard_normal(shape) for shape in (Q, K, V)]
    wide += [np.linspace(0.1, 0.8, 4)]
    rest = [np.array([12, 5]), np.arange(12) // 4, draw.standard_normal(4)]
    host = [x.astype("float32") if x.dtype == "float64" else x for x in (*wide, *rest)]
    given = tuple(torch.from_numpy(x) for x in host)
    All()(*given)
    found = evaluated(torch.onnx.export(All(), given, verbose=False), *host)
    want = calls(*[x.astype("float64") if x.dtype == "float32" else x for x in host])
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_layer_of_sizes_that_change() -> None:
    config = AttentionConfig(width=32, heads=4, kv_heads=2, positions="rotary", causal=True)
    layer = attn_core.build(config, backend="torch").eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    x = torch.randn(2, 10, 32)
    program = torch.onnx.export(layer, (x,), verbose=False, dynamic_shapes=(sizes,))
    for other in (x, torch.randn(3, 7, 32)):
        (found,) = evaluated(program, other)
        np.testing.assert_allclose(found, layer(other).detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["chunked", "native"])
def test_by_name_it_is_refused(impl: str) -> None:
    class One(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return attention(x, x, x, mask=masks.window(3), impl=impl)

    x = (torch.randn(1, 2, 9, 8),)
    with pytest.raises(Exception, match=r'an ONNX graph must be made of impl="reference"\. Got'):
        torch.onnx.export(One(), x, verbose=False)
    # No other export is one to ONNX.
    assert "attn_core.chunked_forward" in str(torch.export.export(One(), x).graph)
