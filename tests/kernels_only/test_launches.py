"""What torch hands over to the kernels compiles as a launch specialises it, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from attn_core.backends.torch import triton_launch
from attn_core.backends.torch.triton_call import loose
from attn_core.kernels import configs

SCRIPT = Path(__file__).resolve().parent.parent / "launches.py"
WAYS = ("even", "odd")


@pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="compiles all of it for a GPU that is not there"
)
def test_every_launch_compiles_for_hopper() -> None:
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "90"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    kernels, made, fewer = defaultdict(set), defaultdict(set), {}
    for line in map(json.loads, run.stdout.splitlines()):
        kernels[line["case"]].add(line["kernel"])
        made[line["case"], line["kernel"]].add(line["hash"])
        fewer[line["case"], line["kernel"]] = line["fewer"]
        # What `attn-core kernels compile` looks at is what is launched, to the last argument.
        assert line.get("differs", []) == []
    # As many arrays as are looked up at every entry have room, if not in as many stages.
    assert [at for at, count in fewer.items() if count] == [("several tables", "forward")]
    both = {"schedule", "forward", "delta", "d_keys", "d_query"}
    assert kernels["one of each"] == kernels["a least rate"] == both
    assert kernels["several tables"] == {*both, "reduced"}
    assert kernels["odd sizes"] == {*both, "facts"}
    assert kernels["decode"] == {*both, "facts", "combine"}
    assert kernels["everything"] == {*both, "d_bias"}
    sampled = [
        f"{name}, {way}" for name in ("plain", "causal", "softcap", "dropout") for way in WAYS
    ]
    # A schedule of sizes alone is kept: a case whose tiles another one has had launches none.
    assert all(kernels[name] | {"schedule"} == both for name in sampled)
    decoded = {name: found for name, found in kernels.items() if "decode" in name}
    assert len(decoded.pop("decode")) == 7
    asked = {*WAYS, "odd, one query", "odd, one query, loose bias"}
    assert {name.partition(", decode, ")[2] for name in decoded} == asked
    assert all({"forward", "combine"} < found for found in decoded.values())
    for way in (*WAYS, "odd, loose bias"):
        assert kernels[f"bias, {way}"] | {"schedule"} == {*both, "d_bias"}
    parted = (both - {"d_keys"}) | {"d_key", "d_value"}
    assert kernels["apart"] == {*parted, "d_bias"}
    assert all(kernels[f"dropout apart, {way}"] | {"schedule"} == parted for way in WAYS)
    assert kernels["fused"] == {"schedule", "forward", "delta", "d_keys", "d_bias"}
    # Nobody waits for a compiler because a cache has grown: as docs/KERNELS.md has it.
    for case, facts in (
        ("a cache that grows", {}),
        ("a cache that grows, with lengths", {"facts": 1}),
    ):
        count = {kernel: len(made[case, kernel]) for kernel in kernels[case]}
        assert count == {**facts, "schedule": 2, "forward": 2, "combine": 1}
    assert len(made["a prompt of any length", "forward"]) == 2


class Roomy:
    """A kernel that has room in so many stages, and more of it where nothing is MASKED."""

    def __init__(self, stages: int, name: str = "shared memory") -> None:
        self.stages, self.name, self.seen = stages, name, list[int]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launched(*args: Any, num_stages: int, MASKED: bool, **options: Any) -> None:
            self.seen.append(num_stages)
            if MASKED and num_stages > self.stages:
                raise OutOfResources(300_000, 232_448, self.name)

        return launched


def test_what_has_no_room_is_launched_in_fewer_stages() -> None:
    kernel, shape = Roomy(1), configs.Config(64, 64, 4, 3)
    for _ in range(2):
        triton_launch.launch(kernel, 1, shape, MASKED=True)
    # It is found out once, and by nobody else.
    assert kernel.seen == [3, 2, 1, 1]
    triton_launch.launch(kernel, 1, shape, MASKED=False)
    assert kernel.seen[4:] == [3]
    for kernel, tried in ((Roomy(0), [3, 2, 1]), (Roomy(1, "threads"), [3])):
        with pytest.raises(OutOfResources):
            triton_launch.launch(kernel, 1, shape, MASKED=True)
        assert kernel.seen == tried


def test_a_bias_is_loose_where_its_keys_are_read_one_by_one() -> None:
    bias = torch.zeros(2, 3, 32, 48)
    # An axis of one entry has no stride, and of one key there is nothing to read at once.
    for whole in (bias, bias[..., :47], bias[:1, :1, :1, :47], bias[..., :1], bias[:, :, 1:]):
        assert not loose(whole)
    assert not loose(torch.zeros(1, 1, 1, 47))
    for anywhere in (bias[..., 1:], bias.transpose(2, 3), torch.zeros(1, 1, 2, 47)):
        assert loose(anywhere)
