"""Dates in forty languages into ISO form: "27 września 2023" is read as "2023-09-27".

    python examples/dates.py --backend torch
    ATTN_CORE_BACKEND=jax python examples/dates.py

An encoder-decoder reads a date letter by letter and writes ten characters, the classical task for
attention between two sequences. The texts are Babel's (Unicode's locale data) in each language's
medium, long and full format, whose years have four digits. Every tenth day of a century is held
out: the model sees it in no language, and is judged on it, all ten characters or nothing.
Afterwards out/dates.safetensors holds the weights, which any framework loads, and
out/dates.png where the decoder looked while it wrote.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import training
import typer
from babel.dates import format_date
from rich.console import Console
from training.optimisers import Adam

import attn_core

# fmt: off
LANGUAGES = (
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "et",
    "eu", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it",
    "ja", "ko", "lt", "lv", "nb", "nl", "pl", "pt", "ro", "ru",
    "sk", "sl", "sr", "sv", "sw", "th", "tr", "uk", "vi", "zh",
)
# fmt: on
FORMATS = ("medium", "long", "full")
FIRST, DAYS, EVERY = datetime.date(1950, 1, 1), 36525, 10
TARGET = "0123456789-"
START, LENGTH = len(TARGET), 10  # the token that begins, and how many characters follow
PADDING, UNKNOWN = 0, 1
WIDTHS = (16, 24, 40)
LEARNT, JUDGED, BATCH, STEPS, RATE = 60_000, 4_000, 128, 1_200, 3e-3
HEADS = 4
SHOWN = (("pl", "full"), ("eu", "long"), ("el", "long"), ("en", "full"))


class Dates(NamedTuple):
    """Dates as texts, and what they mean.

    Attributes:
        texts: as people write them.
        languages: of each text.
        isos: the same day, ten characters.
    """

    texts: list[str]
    languages: list[str]
    isos: list[str]


def written(day: int, language: str, form: str) -> str:
    """A day, counted from FIRST, in one of a language's formats."""
    return str(format_date(FIRST + datetime.timedelta(day), form, locale=language))


def draw(count: int, held_out: bool, rng: np.random.Generator) -> Dates:
    """So many dates on days that are held out, or on the others; each language as often."""
    days = np.arange(DAYS)
    days = rng.choice(days[(days % EVERY == 0) == held_out], count)
    languages = [LANGUAGES[i] for i in rng.integers(len(LANGUAGES), size=count)]
    forms = [FORMATS[i] for i in rng.integers(len(FORMATS), size=count)]
    texts = [written(int(d), n, f) for d, n, f in zip(days, languages, forms, strict=True)]
    isos = [(FIRST + datetime.timedelta(int(day))).isoformat() for day in days]
    return Dates(texts, languages, isos)


class Letters:
    """The letters of some texts, numbered from 2; what else comes is UNKNOWN."""

    def __init__(self, texts: list[str]) -> None:
        self.numbers = {x: 2 + i for i, x in enumerate(sorted(set("".join(texts))))}
        self.count = 2 + len(self.numbers)

    def tokens(self, text: str) -> list[int]:
        """The numbers of a text's letters."""
        return [self.numbers.get(x, UNKNOWN) for x in text]


def source(letters: Letters, texts: list[str], width: int) -> dict[str, np.ndarray]:
    """What the encoder reads: tokens (B, width), padded, and how many of them count."""
    found = np.full((len(texts), width), PADDING, np.int32)
    for row, text in zip(found, texts, strict=True):
        row[: len(text)] = letters.tokens(text)
    return {"source": found, "source_lengths": np.array([len(x) for x in texts], np.int32)}


def answers(isos: list[str]) -> np.ndarray:
    """What the decoder is to write, (B, 10)."""
    return np.array([[TARGET.index(x) for x in iso] for iso in isos], np.int32)


def widths(texts: list[str]) -> np.ndarray:
    """For each text the padded width in which it travels, so that few shapes are compiled."""
    lengths = np.array([len(text) for text in texts])
    return np.array(WIDTHS)[np.searchsorted(WIDTHS, lengths)]


def batches(letters: Letters, dates: Dates, size: int, seed: int) -> Iterator[training.Batch]:
    """Batches without end, each of texts of about one length.

    The decoder reads what it should have written, one place later.
    """
    rng = np.random.default_rng(seed)
    targets, wide = answers(dates.isos), widths(dates.texts)
    starts = np.full((len(targets), 1), START)
    given = np.concatenate([starts, targets[:, :-1]], 1).astype(np.int32)
    sources = source(letters, dates.texts, WIDTHS[-1])
    while True:
        order = rng.permutation(len(targets))
        groups = [order[wide[order] == width] for width in WIDTHS]
        cuts = [x[i : i + size] for x in groups for i in range(0, len(x) - size + 1, size)]
        for i in rng.permutation(len(cuts)):
            rows, width = cuts[i], int(wide[cuts[i][0]])
            read = {
                "source": sources["source"][rows, :width],
                "source_lengths": sources["source_lengths"][rows],
            }
            yield {"given": given[rows], **read}, targets[rows]


def read(trainer: Any, letters: Letters, texts: list[str], size: int) -> list[str]:
    """What the model writes for each text, always in batches of one size."""
    found = [""] * len(texts)
    wide = widths(texts)
    for width in WIDTHS:
        rows = np.flatnonzero(wide == width)
        for i in range(0, len(rows), size):
            chosen = rows[i : i + size]
            full = np.resize(chosen, size)  # what stands there twice is written twice
            told = source(letters, [texts[j] for j in full], width)
            prompt = np.full((size, 1), START, np.int32)
            tokens = np.asarray(trainer.ask("generate", prompt, steps=LENGTH, **told))
            for j, row in zip(chosen, tokens, strict=False):
                found[j] = "".join([(TARGET + "^")[token] for token in row])
    return found


def looked(trainer: Any, letters: Letters, text: str, iso: str) -> np.ndarray:
    """Cross-attention of the last block while it writes `iso`, (heads, 10, letters)."""
    given = np.array([[START, *answers([iso])[0][:-1]]], np.int32)
    told = source(letters, [text], len(text))
    found = trainer.ask("forward", given, **told, return_weights=True)
    return np.asarray(found.weights["decoder"][-1].cross)[0]


def draw_attention(panels: list[tuple[str, str, np.ndarray]], heads: list[int], path: Path) -> None:
    """A row for each date, a column for each head: written characters down, letters across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.6 * len(heads), 2.4 * len(panels))
    figure, grid = plt.subplots(len(panels), len(heads), figsize=size, squeeze=False)
    for cells, (text, iso, weights) in zip(grid, panels, strict=True):
        for head, cell in zip(heads, cells, strict=True):
            cell.imshow(weights[head], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            cell.set_xticks(range(len(text)), list(text), fontsize=7)
            cell.set_yticks(range(LENGTH), list(iso), fontsize=7)
    for head, cell in zip(heads, grid[0], strict=True):
        cell.set_title(f"head {head}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    backend: Annotated[
        str | None, typer.Option(help="torch, tf or jax; ATTN_CORE_BACKEND where left out.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = STEPS,
    size: Annotated[int, typer.Option(min=1, help="Dates in a batch.")] = BATCH,
    learnt: Annotated[int, typer.Option(min=1, help="Dates to learn from.")] = LEARNT,
    judged: Annotated[int, typer.Option(min=1, help="Held-out dates to be judged on.")] = JUDGED,
    head: Annotated[list[int] | None, typer.Option(help="To be drawn; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of data and first values.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for weights and picture.")] = Path("out"),
) -> None:
    """Learn to read dates, and be judged on days never seen."""
    console = Console()
    heads = head or list(range(HEADS))
    if not all(0 <= number < HEADS for number in heads):
        raise typer.BadParameter(f"a head must be one of 0 to {HEADS - 1}. Got {heads}.")
    rng = np.random.default_rng(seed)
    seen, held_out = draw(learnt, False, rng), draw(judged, True, rng)
    letters = Letters(seen.texts)
    config = attn_core.TransformerConfig(
        kind="encoder-decoder",
        width=64,
        depth=1,
        encoder_depth=2,
        heads=HEADS,
        hidden=128,
        source_vocabulary=letters.count,
        vocabulary=START + 1,
    )
    trainer = training.trainer(config, Adam(), backend, seed)
    start = time.perf_counter()

    def rate(step: int) -> float:
        """Up for a twentieth of the steps, then down to 0 along a cosine."""
        rising = (step + 1) / (0.05 * steps)
        return RATE * min(rising, (1 + math.cos(math.pi * step / steps)) / 2)

    training.run(trainer, batches(letters, seen, size, seed), steps, rate, "dates")
    seconds = time.perf_counter() - start
    found = read(trainer, letters, held_out.texts, size)
    missed = [i for i, iso in enumerate(held_out.isos) if found[i] != iso]
    out.mkdir(parents=True, exist_ok=True)
    attn_core.save_weights(out / "dates.safetensors", trainer.export().weights, config)
    panels = []
    for (language, form), day in zip(SHOWN, range(7000, DAYS, 7770), strict=False):
        text = written(day, language, form)
        iso = (FIRST + datetime.timedelta(day)).isoformat()
        panels.append((text, iso, looked(trainer, letters, text, iso)))
    draw_attention(panels, heads, out / "dates.png")

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for i in missed[:5]:
        say(f'missed: {held_out.languages[i]} "{held_out.texts[i]}" read as {found[i]}')
    say(
        f"{1 - len(missed) / judged:.2%} of {judged} held-out dates exact, "
        f"after {steps} steps in {seconds:.0f} s"
    )
    say(f"weights: {out / 'dates.safetensors'}\nattention: {out / 'dates.png'}")


if __name__ == "__main__":
    typer.run(main)
