"""transformers as a subject: its functions asked as its models ask them, and nothing loaded beside.

What torch's own adapters find is measured in docs/departures.json; here it is whether an adapter
passes on what it is given.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_core.backends import torch as backend
from attn_core.conformance import judgement, subjects

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is missing"
)

# One case for each option of the adapter, and for each of the three functions it chooses among.
PASSES = (
    *("plain", "scale", "heads-mqa", "width-v-wide", "mask-causal", "mask-array", "kv-lengths"),
    *("bias-bhqk", "score-softcap", "sinks", "pair-softcap-bias", "pair-sinks-mqa"),
    *("none-keys", "none-keys-sinks", "plain-bfloat16", "plain-float16"),
)
DEPARTS = {
    "empty-rows": "rows that see no key are the mean of the values instead of 0",
    "bias-hides": "rows that see no key are NaN instead of 0",
    "sinks-mixed": "rows that see no key are not 0",
    "poison-keys": "poison at hidden positions reaches the output",
    "plain-float64": "float64 computed in float32 inside",
}
MISSING = {
    "dropout": "dropout",
    "score-alibi": "score",
    "pair-softcap-sinks": "softcap beside sinks",
}


@pytest.fixture(scope="module")
def peer() -> subjects.Subject:
    return subjects.find("transformers-eager")


@pytest.mark.parametrize("case", PASSES)
def test_it_passes(peer: subjects.Subject, case: str) -> None:
    verdict = judgement.judge(case, peer, backend, "eager")
    assert verdict.status == "passed", verdict
    # No lse; gradients are asked of it as of every other peer.
    assert {"out", "weights", "d_query", "d_key", "d_value"} <= set(verdict.shares)


@pytest.mark.parametrize("case", DEPARTS)
def test_it_departs(peer: subjects.Subject, case: str) -> None:
    verdict = judgement.judge(case, peer, backend, "eager")
    assert (verdict.status, verdict.cause) == ("failed", DEPARTS[case])


@pytest.mark.parametrize("case", MISSING)
def test_it_does_not_offer(peer: subjects.Subject, case: str) -> None:
    verdict = judgement.judge(case, peer, backend, "eager")
    assert (verdict.status, verdict.missing) == ("not offered", MISSING[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_mask_is_the_one_its_models_make(peer: subjects.Subject, dtype: torch.dtype) -> None:
    """Padded on the left, so that there are rows that see no key: those say what hides a key."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    made = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, h, 5, 8, generator=made).to(dtype) for h in (4, 2, 2))
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "eager"
    added = create_causal_mask(config, q.new_zeros(2, 5, 32), padding, None)
    layer = torch.nn.Module().eval()
    layer.num_key_value_groups = 2
    want, weights = eager_attention_forward(layer, q, k, v, added, scaling=0.3)

    mask = (torch.ones(5, 5).tril().bool() & padding[:, None, None]).expand(2, 4, 5, 5)
    out, lse, found = peer.function(q, k, v, mask=mask, scale=0.3)
    assert lse is None
    torch.testing.assert_close(out, want.transpose(1, 2), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, weights, rtol=0, atol=0, equal_nan=True)


def test_it_loads_no_other_framework_and_asks_for_no_network(tmp_path: Path) -> None:
    """Typed in the checkout, as the suite's workers are; it may ask for no address."""
    code = """
import os, socket, sys
def refuse(*given):
    raise OSError(f"the network must not be asked. Got {given}.")
socket.getaddrinfo = socket.create_connection = refuse
sys.path.append(os.getcwd())
path = sys.path[:]
from attn_core.conformance import subjects
subjects.find("transformers-eager")
assert sys.path == path
print(sorted({"tensorflow", "keras", "jax", "jaxlib", "flax", "kernels"} & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr
    assert not list(tmp_path.iterdir())
