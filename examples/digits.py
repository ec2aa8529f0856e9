"""Handwritten digits, read by an encoder: sixteen patches that attend to one another.

    python examples/digits.py --backend torch
    ATTN_CORE_BACKEND=jax python examples/digits.py

The 1797 digits of scikit-learn, 8 x 8 pixels, become 16 patches of 2 x 2 pixels each. An encoder
with learned positions reads them, and classes come from the mean of what it makes of them. A fifth
of the digits is held out. Afterwards out/digits.safetensors holds the weights, which any framework
loads, and out/digits.png what some patches attend to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import training
import typer
from rich.console import Console
from training.optimisers import Adam

import attn_core

SIDE, PATCH, CLASSES = 8, 2, 10
TOKENS, INPUTS = (SIDE // PATCH) ** 2, PATCH * PATCH
CONFIG = attn_core.TransformerConfig(
    kind="encoder",
    inputs=INPUTS,
    classes=CLASSES,
    width=64,
    depth=2,
    heads=4,
    hidden=128,
    positions="learned",
    max_length=TOKENS,
    dropout=0.1,
)
BATCH, STEPS, RATE = 64, 600, 2e-3
HELD_OUT = 360
LOOKING = (5, 6, 9, 10)
"""The patches in the middle, whose attention is drawn."""


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches (N, 16, 4), float32 in 0 .. 1, and what they show, int32 (N,), in seeded order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    n = SIDE // PATCH
    cut = data.images.reshape(-1, n, PATCH, n, PATCH).transpose(0, 1, 3, 2, 4)
    order = np.random.default_rng(seed).permutation(len(cut))
    patches = cut.reshape(len(cut), TOKENS, INPUTS)[order] / 16
    return patches.astype(np.float32), data.target[order].astype(np.int32)


def batches(
    patches: np.ndarray, shown: np.ndarray, size: int, seed: int
) -> Iterator[training.Batch]:
    """Batches without end, each digit once in a round."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(shown))
        for i in range(0, len(order) - size + 1, size):
            rows = order[i : i + size]
            yield {"given": patches[rows]}, shown[rows]


def draw(patches: np.ndarray, weights: np.ndarray, path: Path) -> None:
    """A row for each digit: the digit, and what some patches (red) attend to, mean over heads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = SIDE // PATCH
    shape = (len(patches), 1 + len(LOOKING))
    figure, grid = plt.subplots(*shape, figsize=(1.8 * shape[1], 1.8 * shape[0]), squeeze=False)
    for cells, digit, seen in zip(grid, patches, weights.mean(1), strict=True):
        image = digit.reshape(n, n, PATCH, PATCH).transpose(0, 2, 1, 3).reshape(SIDE, SIDE)
        cells[0].imshow(image, cmap="gray_r")
        for cell, patch in zip(cells[1:], LOOKING, strict=True):
            cell.imshow(seen[patch].reshape(n, n), cmap="viridis", vmin=0)
            y, x = divmod(patch, n)
            cell.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="red", lw=2))
        for cell in cells:
            cell.set_xticks([])
            cell.set_yticks([])
    figure.suptitle("what a patch (red) attends to in the last block, mean over heads")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    backend: Annotated[
        str | None, typer.Option(help="torch, tf or jax; ATTN_CORE_BACKEND where left out.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Of data, first values and dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for weights and picture.")] = Path("out"),
) -> None:
    """Learn to read digits, and be judged on those held out."""
    console = Console()
    trainer = training.trainer(CONFIG, Adam(), backend, seed)
    patches, shown = digits(seed)
    learnt = batches(patches[HELD_OUT:], shown[HELD_OUT:], BATCH, seed)
    start = time.perf_counter()

    def rate(step: int) -> float:
        return RATE * (1 + math.cos(math.pi * step / steps)) / 2

    training.run(trainer, learnt, steps, rate, "digits")
    seconds = time.perf_counter() - start
    found = trainer.ask("forward", patches[:HELD_OUT], return_weights=True)
    accuracy = float((np.asarray(found.out).argmax(-1) == shown[:HELD_OUT]).mean())
    out.mkdir(parents=True, exist_ok=True)
    attn_core.save_weights(out / "digits.safetensors", trainer.export().weights, CONFIG)
    draw(patches[:4], np.asarray(found.weights["encoder"][-1].attention)[:4], out / "digits.png")
    console.print(
        f"{accuracy:.1%} of {HELD_OUT} held-out digits, after {steps} steps in {seconds:.0f} s\n"
        f"weights: {out / 'digits.safetensors'}\nattention: {out / 'digits.png'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
