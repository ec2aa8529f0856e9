"""One training run, three frameworks: the loss curves lie on each other.

    python examples/same_run.py                                  torch, TensorFlow and JAX
    python examples/same_run.py --backend torch --backend jax

The encoder of examples/digits.py, dropout on, trained with SGD and momentum from the same seed in
each framework, in a process of its own. At half time each writes a checkpoint, which the next
framework continues, and the first the last's. Printed is the largest relative departure of any
loss from the first framework's; beside it, so that the figure can be judged, that of a run of the
first framework in which one weight starts one unit in the last place higher. Exit status 1 means
that the curves departed by more than is allowed. out/same_run.png shows the curves over each
other, and departures.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import digits
import numpy as np
import training
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training.optimisers import Momentum

FRAMEWORKS = ("torch", "tf", "jax")
# A smooth activation and a quiet rate: under relu, or at five times the rate, one ulp in one weight
# grows to percents of the loss within these steps, and no two frameworks could be told apart.
CONFIG = dataclasses.replace(digits.CONFIG, width=32, hidden=64, activation="gelu")
STEPS, BATCH, RATE, SEED = 300, 32, 0.01, 0
NUDGED = "encoder.0.feed.input.weight"
ALLOWED = 1e-4
"""Relative, at every step, in float32 on one CPU."""


def work(backend: str, steps: int, folder: Path, starts: list[str]) -> None:
    """The runs of one framework, in this process alone.

    A start is "seed"; "nudged", the same but for one unit in the last place; or another framework,
    whose checkpoint is continued. Each run writes its losses, and "seed" a checkpoint at half time.
    """
    trainer = training.trainer(CONFIG, Momentum(), backend, SEED)
    first = trainer.export()
    patches, shown = digits.digits(SEED)
    for start in starts:
        begun = first
        if start == "nudged":
            begun = first._replace(weights={**first.weights, NUDGED: nudged(first.weights[NUDGED])})
        elif start != "seed":
            begun = training.Checkpoint.read(folder / f"{start}-half")
        trainer.load(begun)
        batches = digits.batches(patches, shown, BATCH, SEED)
        for _ in range(trainer.steps):
            next(batches)  # what earlier steps have seen
        losses = []
        for end in (steps // 2, steps):
            if trainer.steps < end:
                count = end - trainer.steps
                losses += training.run(trainer, batches, count, lambda step: RATE, backend)
            if start == "seed" and end < steps:
                trainer.export().save(folder / f"{backend}-half", CONFIG)
        np.save(folder / f"{backend}-{start}.npy", losses)


def nudged(weight: np.ndarray) -> np.ndarray:
    """A matrix whose first entry is one unit in the last place higher."""
    moved = weight.copy()
    moved[0, 0] = np.nextafter(moved[0, 0], np.float32(np.inf))
    return moved


def started(console: Console, *words: object) -> None:
    """Run a worker to its end, or exit with what it said."""
    command = [sys.executable, __file__, *[str(word) for word in words]]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=quiet)
    if done.returncode:
        console.print(done.stderr.strip(), markup=False, highlight=False)
        raise typer.Exit(1)


def departure(losses: np.ndarray, others: np.ndarray) -> np.ndarray:
    """|a - b| / |b| at every step."""
    return np.abs(losses - others) / np.abs(others)


def draw(curves: dict[str, np.ndarray], ulp: np.ndarray, path: Path) -> None:
    """Losses over each other, and below how far each departs from the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    first, *others = curves
    for width, (name, losses) in zip((5.0, 2.5, 1.0), curves.items(), strict=False):
        above.plot(losses, label=name, linewidth=width, alpha=0.7)
    above.set_ylabel("loss")
    above.legend()
    for name in others:
        below.plot(departure(curves[name], curves[first]), label=f"{name} from {first}")
    below.plot(ulp, "k:", label=f"{first}, one weight one ulp higher")
    below.axhline(ALLOWED, color="red", linewidth=0.8, label="allowed")
    below.set_yscale("symlog", linthresh=1e-9)
    below.set_ylabel("relative departure")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    backend: Annotated[
        list[str] | None, typer.Option(help="torch, tf or jax; may be repeated. All by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of training.")] = STEPS,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("out"),
    worker: Annotated[tuple[str, int, Path] | None, typer.Option(hidden=True)] = None,
    start: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    probe: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train in every framework, continue each other's checkpoints, and compare."""
    console = Console()
    if worker is not None:
        work(*worker, starts=start or [])
        return
    if probe is not None:
        training.trainer(CONFIG, Momentum(), probe)
        return
    names = backend or list(FRAMEWORKS)
    first, *others = names
    # The first is looked for as it starts: nothing has been trained by then.
    for name in track(others, "looking for models", console=Console(stderr=True), transient=True):
        started(console, "--probe", name)
    with tempfile.TemporaryDirectory() as made:
        runs = [(first, ["seed"])]
        runs += [(name, ["seed", before]) for before, name in itertools.pairwise(names)]
        runs.append((first, ["nudged", names[-1]]))
        for name, starts in track(runs, "training", console=Console(stderr=True)):
            words = [word for start in starts for word in ("--start", start)]
            started(console, "--worker", name, steps, made, *words)

        def losses(name: str, start: str) -> np.ndarray:
            return np.load(Path(made) / f"{name}-{start}.npy")

        curves = {name: losses(name, "seed") for name in names}
        ulp = departure(losses(first, "nudged"), curves[first])
        table = Table(
            title=f"{steps} steps, loss {curves[first][0]:.3f} to {curves[first][-1]:.3f}"
        )
        table.add_column("run")
        table.add_column("largest relative departure", justify="right")
        worst = 0.0
        for name in others:
            found = departure(curves[name], curves[first]).max()
            worst = max(worst, found)
            table.add_row(f"{name} from {first}", f"{found:.1e}")
        for before, name in zip(names, [*others, first], strict=True):
            found = departure(losses(name, before), curves[before][steps // 2 :]).max()
            worst = max(worst, found)
            table.add_row(f"{before}, continued in {name} at step {steps // 2}", f"{found:.1e}")
        table.add_row(f"{first}, one weight one ulp higher", f"{ulp.max():.1e}")
    draw(curves, ulp, out / "same_run.png")
    console.print(table)
    reached = np.flatnonzero(ulp >= max(worst, np.finfo(float).tiny))
    if len(reached):
        word = f"departs by as much at step {reached[0]}"
    else:
        word = "never departs by as much"
    agree = worst <= ALLOWED
    console.print(
        f"{'the same run' if agree else 'NOT THE SAME'}: worst {worst:.1e}, allowed {ALLOWED:.0e}; "
        f"one ulp in one weight {word}\npicture: {out / 'same_run.png'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(0 if agree else 1)


if __name__ == "__main__":
    typer.run(main)
