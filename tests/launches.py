"""Every launch of some calls, compiled for a GPU that is not there instead of launched.

    python tests/launches.py 90        prints a line of JSON to each launch

Of a case that is a sample of `attn-core kernels compile` it also says in what the launch differs
from what is compiled there.

Triton is given a driver that knows its target and nothing else. What a launch hands over is then
specialised and compiled as it would be there: sizes of 1 and multiples of 16 are other kernels, and
the interpreter knows nothing of that.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from attn_core import Dropout, attention, masks, operand, registry, row, score, scores
from attn_core.backends.torch import triton_launch
from attn_core.kernels import configs, signatures
from attn_core.kernels.ahead import SHARED, Job
from attn_core.kernels.samples import SAMPLES

LAUNCH, ROOM = triton_launch.launch, SHARED["sm_90"]


class Driver:
    """Of a device that only has a target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


IDS = torch.arange(70) // 20
CASES: dict[str, dict[str, Any]] = {
    "one of each": {"sizes": (1, 1, 1, 1, 1, 16, 16)},
    "odd sizes": {
        "sizes": (2, 4, 2, 70, 90, 24, 40),
        "mask": masks.causal(),
        "query_offset": "end",
        "kv_lengths": torch.tensor([3, 90]),
    },
    "decode": {
        "sizes": (2, 8, 2, 1, 4096, 128, 128),
        "mask": masks.causal(),
        "query_offset": "end",
        "kv_lengths": torch.tensor([3, 4096]),
        "sinks": torch.randn(8).requires_grad_(),
    },
    "everything": {
        "sizes": (2, 4, 2, 70, 70, 64, 64),
        "mask": masks.causal() & masks.segments(IDS),
        "bias": torch.randn(1, 4, 70, 70).requires_grad_(),
        "score": scores.relative_bias(torch.randn(16, 4).requires_grad_()),
        "dropout": Dropout(0.1, 3),
        "sinks": torch.randn(4).requires_grad_(),
    },
}
# Of a threshold of 1 the compiler makes a constant, as of every argument that is 1.
CASES["a least rate"] = {"sizes": (1, 1, 1, 1, 1, 16, 16), "dropout": Dropout(2.0**-32, 3)}
TABLES = [operand(torch.randn(*shape).requires_grad_()) for shape in ((256, 256), (4, 256, 256))]
CASES["several tables"] = {
    "sizes": (2, 4, 2, 256, 256, 128, 128),
    "mask": masks.dense(torch.ones(256, 256, dtype=torch.bool)),
    "score": score(lambda s, b, h, q, k: s + TABLES[0][row, k] * TABLES[1][h, row, k]),
}
CASES["fused"] = {**CASES["everything"], "fused": True}
CASES["apart"] = {**CASES["everything"], "apart": True}

EVEN, ODD = (1, 16, 16, 4096, 4096, 64, 64), (2, 6, 3, 2999, 2999, 64, 64)
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal()},
    "softcap": {"mask": masks.causal(), "score": scores.softcap(50.0)},
    "dropout": {"mask": masks.causal(), "dropout": Dropout(0.1, 3)},
}
for sample, given in SAMPLED.items():
    CASES[f"{sample}, even"] = {"sizes": EVEN, "sample": sample, **given}
    CASES[f"{sample}, odd"] = {"sizes": ODD, "sample": sample, **given}
CASES["dropout, odd"]["dropout"] = Dropout(0.6, 3)
for way in ("even", "odd"):
    CASES[f"dropout apart, {way}"] = {**CASES[f"dropout, {way}"], "apart": True}

# Of odd sizes a bias may be padded, so that 16 divides the distance of its rows, or not.
BIASED = {
    "even": ((16, 16, 16, 2048, 2048, 64, 64), 2048),
    "odd": ((2, 6, 3, 299, 299, 64, 64), 304),
    "odd, loose bias": ((2, 6, 3, 299, 299, 64, 64), 299),
}
for way, (sizes, apart) in BIASED.items():
    bias = draw(1, sizes[1], sizes[3], apart)[..., : sizes[4]].requires_grad_()
    CASES[f"bias, {way}"] = {"sizes": sizes, "sample": "bias", "mask": masks.causal(), "bias": bias}

DOCUMENTS = {
    "mask": masks.segments(torch.arange(2999).expand(4, 2999).int() // 70) & masks.causal(),
    "kv_lengths": torch.tensor([3, 2999, 0, 70]),
    "q_lengths": torch.tensor([1, 0, 1, 1]),
}
SLOPED = {
    "mask": masks.causal(),
    "score": scores.alibi(torch.randn(14)),
    "sinks": torch.randn(14),
}
DECODED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain, decode, even": ((1, 16, 16, 16, 4096, 64, 64), {}),
    "plain, decode, odd": ((1, 6, 2, 13, 2999, 64, 64), {}),
    "plain, decode, odd, one query": ((1, 14, 2, 1, 16399, 64, 64), {}),
    "causal, decode, odd, one query": ((1, 14, 2, 1, 16399, 64, 64), {"mask": masks.causal()}),
    "documents, decode, odd": ((4, 6, 2, 11, 2999, 64, 64), DOCUMENTS),
    "alibi, decode, odd, one query": ((1, 14, 2, 1, 16399, 64, 64), SLOPED),
    "bias, decode, odd, one query, loose bias": (
        (1, 14, 2, 1, 2999, 64, 64),
        {"mask": masks.causal(), "bias": draw(1, 14, 1, 2999)},
    ),
}
"""Sizes and options, in the order of `Job.sizes`: what the check has compiled in its place."""

for name, (sizes, given) in DECODED.items():
    about = {"sizes": sizes, "sample": name.split(", ")[0], "query_offset": "end"}
    CASES[name] = {**about, "forward": True, **given}


LOOSE = configs.Entry(
    "forward", ("sm_90",), (), 0, ("loose",), configs.Config(32, 32, 4, 1), "a test", "tried"
)
"""A tile that nothing else has: whoever has it has been taken for of this class."""


def compiling(case: str, sample: str = "") -> Any:
    """In the place of a launch: what it would be given, compiled."""

    def launch(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        LAUNCH(Compiled(kernel, shape, case, sample), programs, shape, *args, **options)

    return launch


@dataclass(frozen=True)
class Compiled:
    """A kernel that is launched by compiling it, and told of: on a GPU whose memory has an end."""

    kernel: Any
    shape: Any
    case: str
    sample: str

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.launched, grid)

    def launched(self, grid: tuple[int], *args: Any, **options: Any) -> None:
        found = self.kernel.run(*args, grid=grid, warmup=True, **options)
        if found.metadata.shared > ROOM:
            raise OutOfResources(found.metadata.shared, ROOM, "shared memory")
        name = named(self.kernel.__name__, options)
        said = {"case": self.case, "kernel": name, "hash": found.hash}
        said["fewer"] = self.shape.stages - options["num_stages"]
        if self.sample:
            said["differs"] = differs(found.src, name, self.sample, self.shape, self.case)
        print(json.dumps(said), flush=True)


def named(kernel: str, options: dict[str, Any]) -> str:
    """As the table of configurations calls it: by what of its gradients it makes."""
    made = options.get("KEY", True), options.get("VALUE", True)
    return {(True, False): "d_key", (False, True): "d_value"}.get(made, kernel)


def preparing(case: str) -> Any:
    """The same of what schedules are made by."""
    launch = compiling(case)

    def prepare(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        launch(kernel, programs, configs.PREPARED, *args, **options)

    return prepare


def differs(launched: Any, kernel: str, sample: str, shape: Any, case: str) -> list[str]:
    """Arguments that a launch tells the compiler otherwise than the check ahead of time does."""
    about = ("sm_90", SAMPLES[sample], 64, 64, "bfloat16")
    if "decode" in case and kernel in ("forward", "combine"):
        # By the table's own tile, which a launch cuts down to the rows that it has.
        kernel = "decode" if kernel == "forward" else kernel
        job = Job(kernel, *about, even=case.endswith("even"), loose=case.endswith("loose bias"))
        job = job._replace(queries=1 if "one query" in case else 0)
        assert case == f"{sample}, decode, {job.sizes}"
    else:
        loose = case.endswith("loose bias")
        job = Job(kernel, *about, shape, case.endswith("even"), loose=loose)
        if job._replace(config=None).chosen.compiled != shape.compiled:
            return [f"{shape}, in the table {job._replace(config=None).chosen}"]
    checked = signatures.source(job, job.chosen)
    names = checked.fn.arg_names
    found = [
        f"{name}: {launched.signature[name]}, checked {checked.signature[name]}"
        for name in names
        if launched.signature[name] != checked.signature[name]
    ]
    for what in ("constants", "attrs"):
        ours, theirs = getattr(launched, what), getattr(checked, what)
        found += [
            f"{what} of {names[at[0]]}{at}: {ours.get(at)}, checked {theirs.get(at)}"
            for at in sorted({*ours, *theirs})
            if str(ours.get(at) or None) != str(theirs.get(at) or None)
        ]
    if not found and launched.hash() != checked.hash():
        found.append("where Triton's cache keeps it: what is compiled ahead is not found there")
    return sorted(found)


GROWING = (1, 2, 16, 31, 64, 100, 128, 192, 256, 321, 640, 999, 1024, 1600, 2048, 3001, 4096)
"""Keys of a cache, from one to 4096: one tile and many, whole and not, multiples of 16 and not, and
of each number of splits."""


def growing() -> None:
    """Steps of decoding as the cache grows, of several batches; and prompts of any length."""
    for k_len in GROWING:
        for batch in (3, 4):
            name = "a cache that grows, with lengths"
            step(name, (batch, 1, k_len), kv_lengths=torch.full((batch,), k_len))
        step("a cache that grows", (1, 1, k_len), mask=masks.causal())
        step("a prompt of any length", (1, k_len + 16, k_len + 16), mask=masks.causal())


def step(name: str, sizes: tuple[int, int, int], **options: Any) -> None:
    """A forward pass of 14 heads in 2 groups."""
    triton_launch.prepare = preparing(name)
    triton_launch.launch = compiling(name)
    batch, q_len, k_len = sizes
    key = draw(batch, 2, k_len, 64)
    query = draw(batch, 14, q_len, 64)
    attention(query, key, key, impl="triton", query_offset="end", **options)


def main(architecture: int) -> None:
    driver.set_active(Driver(GPUTarget("cuda", architecture, 32)))  # type: ignore[arg-type]
    signatures.hash_in_order()
    # The tensors are on the CPU, and are taken for a GPU's.
    backend = registry.load("torch")
    backend._REFUSALS["triton"] = lambda p: []
    triton_launch.architecture = lambda device: f"sm_{architecture}"
    triton_launch.processors = lambda device: 132
    with configs.trying(LOOSE):
        called()
    growing()


def called() -> None:
    """Every case."""
    for name, given in CASES.items():
        options = dict(given)
        triton_launch.prepare = preparing(name)
        triton_launch.launch = compiling(name, options.pop("sample", ""))
        fused, alone = options.pop("fused", False), options.pop("forward", False)
        apart = options.pop("apart", False)
        batch, heads, kv_heads, q_len, k_len, width, v_width = options.pop("sizes")
        leaves = [
            draw(batch, heads, q_len, width),
            draw(batch, kv_heads, k_len, width),
            draw(batch, kv_heads, k_len, v_width),
        ]
        leaves += [options[n] for n in ("bias", "sinks") if n in options]
        leaves += options["score"].arrays if "score" in options else ()
        out = attention(*[x.requires_grad_() for x in leaves[:3]], impl="triton", **options)
        if alone:
            continue
        with configs.fusing(fused), configs.parting(apart):
            torch.autograd.grad(out, leaves, torch.ones_like(out))


if __name__ == "__main__":
    main(int(sys.argv[1]))
