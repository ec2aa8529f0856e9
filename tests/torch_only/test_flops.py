"""torch's counter of floating-point operations counts ours, as torch counts its own attention."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from attn_core import attention, masks, scores

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 8, 6
ENTRIES = 2 * B * HQ * TQ * TK

RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "native": ("native", D, {}),
    "native, causal": ("native", D, {"mask": masks.causal(), "query_offset": "end"}),
    "chunked": ("chunked", DV, {}),
    "chunked, score": ("chunked", DV, {"score": scores.softcap(2.0)}),
    "chunked, BTHD": ("chunked", DV, {"layout": "BTHD"}),
    "auto": ("auto", DV, {}),
}


def arrays(width: int, layout: str = "BHTD") -> list[torch.Tensor]:
    given = [torch.randn(B, h, t, w) for h, t, w in ((HQ, TQ, D), (HK, TK, D), (HK, TK, width))]
    given = [x.transpose(1, 2).contiguous() if layout == "BTHD" else x for x in given]
    return [x.requires_grad_() for x in given]


def mode() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


@pytest.mark.parametrize("name", RUNS)
def test_all_products_of_both_passes_are_counted(name: str) -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    impl, width, options = RUNS[name]
    given = arrays(width, options.get("layout", "BHTD"))
    shapes = [(B, HQ, TQ, D), (B, HK, TK, D), (B, HK, TK, width)]
    with mode() as forward:
        out = attention(*given, impl=impl, **options)
    assert forward.get_total_flops() == sdpa_flop_count(*shapes) == ENTRIES * (D + width)
    with mode() as backward:
        out.sum().backward()
    up = (B, HQ, TQ, width)
    assert backward.get_total_flops() == sdpa_backward_flop_count(up, *shapes)
    assert backward.get_total_flops() == ENTRIES * (3 * D + 2 * width)


def test_where_nothing_is_differentiated_either() -> None:
    given = [x.detach() for x in arrays(D)]
    for impl in ("auto", "native", "chunked", "reference"):
        with mode() as counter:
            attention(*given, impl=impl)
        assert counter.get_total_flops() == ENTRIES * 2 * D, impl


def test_an_exported_graph_is_counted() -> None:
    class Module(torch.nn.Module):
        def forward(self, *given: Any) -> Any:
            return attention(*given, impl="chunked")

    given = tuple(x.detach() for x in arrays(DV))
    with mode():
        attention(*given, impl="chunked")
    graph = torch.export.export(Module(), given).module()
    with mode() as counter:
        graph(*given)
    assert counter.get_total_flops() == ENTRIES * (D + DV)


def test_a_counter_made_before_the_first_call_of_a_process_counts_it() -> None:
    """And whoever counts nothing does not import torch's counter."""
    code = """
        import sys, torch
        from attn_core import attention
        x = torch.ones(1, 1, 4, 8)
        class Other(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **kwargs or {})
        with Other():
            attention(x, x, x, impl="chunked")
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            attention(x, x, x, impl="chunked")
        assert counter.get_total_flops() == 2 * 4 * 4 * 16
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
