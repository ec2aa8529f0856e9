"""The same attention, on the same data, through every framework: the handwritten digits.

    python examples/demo.py                          every framework that is installed
    python examples/demo.py --backend torch --backend jax

Each 8 x 8 digit becomes 64 tokens: the 3 x 3 patch around each pixel, projected on the principal
components of all patches. A token attends to tokens at most two pixels away (a mask written as a
Python function), less so the further they are (a score with a slope for each head), and every
head has a sink. Each framework computes outputs, weights and gradients in a process of its own,
and is compared with the float64 judge. Exit status 1 means that one disagrees.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attn_core
from attn_core import config, reference, registry

HEADS, KV_HEADS, WIDTH, SIDE, REACH = 4, 2, 8, 8, 2
IMAGES = 64
ALLOWED = 2e-5  # float32: a few hundred roundings of numbers around 1


def tokens() -> dict[str, np.ndarray]:
    """query, key, value and sinks made from the digits, and the digits themselves."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:IMAGES] / 16.0
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    patches = np.stack(
        [padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)], -1
    ).reshape(IMAGES, SIDE * SIDE, 9)
    centred = patches - patches.mean((0, 1))
    _, sizes, components = np.linalg.svd(centred.reshape(-1, 9), full_matrices=False)
    features = centred @ components[:WIDTH].T / (sizes[:WIDTH] / np.sqrt(IMAGES * SIDE * SIDE))
    rng = np.random.default_rng(0)

    def heads(n: int) -> np.ndarray:
        turn = np.linalg.qr(rng.standard_normal((n, WIDTH, WIDTH)))[0]
        return np.einsum("btd,hde->bhte", features, turn).astype(np.float32)

    key = heads(KV_HEADS)
    return {
        # A query looks for what is like it: its own key, and some noise to tell heads apart.
        "query": 0.4 * np.repeat(key, HEADS // KV_HEADS, 1) + 0.2 * heads(HEADS),
        "key": key,
        "value": heads(KV_HEADS),
        "sinks": np.linspace(-1, 1, HEADS, dtype=np.float32),
        "slopes": np.array([0.0, 0.25, 0.5, 1.0], np.float32),
        "images": images,
    }


def near(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Pixels of a SIDE x SIDE image at most REACH rows and columns apart."""
    return (abs(q // SIDE - k // SIDE) <= REACH) & (abs(q % SIDE - k % SIDE) <= REACH)


def arguments(data: dict[str, Any], slopes: Any) -> dict[str, Any]:
    """The call, in the language: nothing here names a framework."""
    found = attn_core.operand(slopes)
    return {
        **{name: data[name] for name in ("query", "key", "value", "sinks")},
        "mask": attn_core.mask(near),
        "score": attn_core.score(
            lambda s, b, h, q, k: (
                s - found[h] * (abs(q // SIDE - k // SIDE) + abs(q % SIDE - k % SIDE))
            )
        ),
        "return_lse": True,
        "return_weights": True,
    }


def judged(data: dict[str, np.ndarray], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """What the judge says: float64 NumPy that shares nothing with the backends."""
    y, x = np.divmod(np.arange(SIDE * SIDE), SIDE)
    rows, columns = np.abs(y[:, None] - y), np.abs(x[:, None] - x)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any) -> Any:
        return s - slopes[h] * (rows + columns)

    call: dict[str, Any] = {
        **{name: data[name] for name in ("query", "key", "value", "sinks")},
        "mask": (rows <= REACH) & (columns <= REACH),
        "score": score,
        "operands": (data["slopes"],),
    }
    out = reference.attention(**call)
    gradients = reference.gradients(**call, d_out=cotangent)
    found = dict(out._asdict())
    found |= {f"d {name}": gradients[name] for name in ("query", "key", "value", "sinks")}
    return found | {"d slopes": gradients["operands"][0]}


def work(name: str, given: Path, result: Path) -> None:
    """One framework, in this process alone."""
    data = dict(np.load(given))
    backend = registry.load(name)
    arrays = {key: backend.from_numpy(data[key]) for key in ("query", "key", "value", "sinks")}
    call = arguments(arrays, backend.from_numpy(data["slopes"]))
    cotangent = {"out": backend.from_numpy(data["cotangent"])}
    output, gradients = backend.vjp(call, cotangent)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        backend.to_numpy(attn_core.attention(**call).out)
        seconds.append(time.perf_counter() - start)
    found = {key: backend.to_numpy(x) for key, x in output._asdict().items()}
    found |= {f"d {key}": backend.to_numpy(gradients[key]) for key in arrays}
    found["d slopes"] = backend.to_numpy(gradients["score"][0])
    # The flag: NumPy in, NumPy out, another framework by name.
    with attn_core.use(backend=name):
        by_flag = attn_core.attention(**arguments(data, data["slopes"]))
    found["by flag"] = by_flag.out
    np.savez(result, seconds=statistics.median(seconds), **found)


def draw(data: dict[str, np.ndarray], weights: dict[str, np.ndarray], path: Path) -> None:
    """One digit, and what four of its pixels attend to, a row to each framework."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image, pixels = 3, (18, 29, 36, 52)
    figure, grid = plt.subplots(
        len(weights), 1 + len(pixels), figsize=(2 * (1 + len(pixels)), 2.1 * len(weights))
    )
    for cells, (name, found) in zip(np.atleast_2d(grid), weights.items(), strict=True):
        cells[0].imshow(data["images"][image], cmap="gray_r")
        cells[0].set_ylabel(name, fontsize=12)
        for cell, pixel in zip(cells[1:], pixels, strict=True):
            cell.imshow(found[image, :, pixel].mean(0).reshape(SIDE, SIDE), cmap="viridis")
            cell.plot(pixel % SIDE, pixel // SIDE, "r+", markersize=10)
        for cell in cells:
            cell.set_xticks([])
            cell.set_yticks([])
    figure.suptitle("what a pixel (+) attends to, mean over heads: the same in every framework")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    backend: Annotated[
        list[str] | None, typer.Option(help="numpy, torch, tf or jax; may be repeated.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path(
        "out/digits_attention.png"
    ),
    worker: Annotated[tuple[str, Path, Path] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run digits through every framework, and compare."""
    if worker is not None:
        work(*worker)
        return
    console = Console()
    names = backend or config.installed().split(", ")
    data = tokens()
    rng = np.random.default_rng(1)
    shape = (IMAGES, HEADS, SIDE * SIDE, WIDTH)
    data["cotangent"] = rng.standard_normal(shape).astype(np.float32)
    want = judged(data, data["cotangent"])
    want["by flag"] = want["out"]
    table = Table(title=f"{IMAGES} digits, {HEADS} heads, {SIDE * SIDE} tokens, float32")
    table.add_column("error, relative to the judge's largest")
    for name in names:
        table.add_column(name, justify="right")
    found: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(given := Path(folder) / "given.npz", **data)
        for name in track(names, "computing", console=Console(stderr=True), transient=True):
            config.check_backend(name)
            result = Path(folder) / f"{name}.npz"
            command = [sys.executable, __file__, "--worker", name, str(given), str(result)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                console.print(f"{name} failed:\n{done.stderr}", markup=False)
                raise typer.Exit(1)
            found[name] = dict(np.load(result))
    worst = 0.0
    for what, exact in want.items():
        spread = np.abs(exact).max()
        errors = [float(np.abs(found[name][what] - exact).max() / spread) for name in names]
        worst = max(worst, *errors)
        table.add_row(what, *[f"{error:.1e}" for error in errors])
    table.add_row(
        "time of one call, ms", *[f"{1e3 * float(found[n]['seconds']):.1f}" for n in names]
    )
    console.print(table)
    draw(data, {name: found[name]["weights"] for name in names}, picture)
    console.print(f"heat map: {picture}", markup=False)
    agree = worst <= ALLOWED
    word = "all agree" if agree else "DISAGREEMENT"
    console.print(f"{word}: worst error {worst:.1e}, allowed {ALLOWED:.0e}")
    raise typer.Exit(0 if agree else 1)


if __name__ == "__main__":
    typer.run(main)
