"""What `torch.utils.flop_counter.FlopCounterMode` counts of our operators, as torch of its own.

    forward     2 * B * Hq * Tq * Tk * (D + Dv)              two products
    backward    2 * B * Hq * Tq * Tk * (3 * D + 2 * Dv)      five, the logits made again

Every entry counts, whatever the mask hides, as in torch's `sdpa_flop_count`.

A counter takes along the formulas that there are when it is made, and importing its module would
import triton. So nothing is registered before a call has met a counter: that one is told, and so
are those to come. A graph that was exported, and so calls no code of ours, is counted from then on.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def counted() -> bool:
    """Whether a FlopCounterMode is at work, which then knows our operators."""
    name = "torch.utils.flop_counter"
    if not torch._C._len_torch_dispatch_stack() or name not in sys.modules:
        return False
    module: Any = sys.modules[name]
    modes = _get_current_dispatch_mode_stack()
    counters: list[Any] = [getattr(mode, "counter", None) for mode in modes]
    counters = [each for each in counters if isinstance(each, module.FlopCounterMode)]
    if counters:
        _register(module)
    for counter in counters:
        for operator in _formulas():
            counter.flop_registry.setdefault(operator, module.flop_registry[operator])
    return bool(counters)


def _register(module: Any) -> None:
    for operator, formula in _formulas().items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)


def _formulas() -> dict[Any, Any]:
    ours = torch.ops.attn_core
    return {ours.chunked_forward: _forward, ours.chunked_backward: _backward}


def _forward(*given: Any, **_: Any) -> int:
    ask, _, query, key, value = given[:5]
    return _entries(ask, query, key) * (query[3] + value[3])


def _backward(*given: Any, **_: Any) -> int:
    ask, _, _, query, key, value = given[:6]
    return _entries(ask, query, key) * (3 * query[3] + 2 * value[3])


def _entries(ask: str, query: Any, key: Any) -> int:
    """Twice the entries of all heads' logits; query and key are shapes."""
    from attn_core.backends.torch.chunked_parts import read

    first = read(ask).layout == "BHTD"
    batch, heads, q_len = query[:3] if first else (query[0], query[2], query[1])
    return int(2 * batch * heads * q_len * key[2 if first else 1])
