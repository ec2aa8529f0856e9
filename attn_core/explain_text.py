"""A report in words: the same rows as aligned text and as a rich table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.explain_blocks import UNKNOWN

if TYPE_CHECKING:
    from attn_core.explained import Candidate, Report

_ASKED = {
    "auto": "chosen by auto",
    "argument": "asked for by the argument `impl`",
    "use": "asked for by attn_core.use",
    "config": "asked for by attn_core.config",
    "environment": "asked for by ATTN_CORE_IMPL",
}
_BACKEND = {
    "array": "the framework of query",
    "default": "NumPy arrays came in, and nothing else is asked for",
    "use": "NumPy arrays came in, and attn_core.use asks for it",
    "config": "NumPy arrays came in, and attn_core.config asks for it",
    "environment": "NumPy arrays came in, and ATTN_CORE_BACKEND asks for it",
}


def plain(x: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, (tuple, list)) else x


def shape(sizes: tuple[int | None, ...]) -> str:
    """ "(2, ?)", with ? for what is not known; a single size keeps its comma."""
    inner = ", ".join("?" if size is None else str(size) for size in sizes)
    return f"({inner},)" if len(sizes) == 1 else f"({inner})"


def size(count: int | None) -> str:
    """Bytes in the unit in which they have one to three digits before the point."""
    if count is None:
        return UNKNOWN
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB", "PiB"):
        if value < 999.95:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def rows(r: Report) -> list[tuple[str, str]]:
    """(name, what is said of it), in the order in which a reader asks."""
    found = [("backend", f"{r.backend} on {r.device}: {_BACKEND[r.backend_from]}")]
    found.append(("implementation", _chosen(r)))
    found += [(f"  {c.name}", _verdict(c)) for c in r.candidates]
    sizes = ", ".join(f"{k} {'?' if n is None else n}" for k, n in r.shape.items())
    found.append(("shape", f"{sizes}, {r.layout}"))
    found.append(("scale", f"{r.scale:.6g}"))
    if r.effective is not None:
        asked = "" if r.precision is None else f' (precision="{r.precision}")'
        found.append(("precision", r.effective + asked))
    else:
        found.append(("dtype", f"{r.dtype}, summed in {r.accumulation}"))
    found.append(("mask", r.mask or "none"))
    found.append(("score", r.score or "none"))
    found += [("operand", said) for said in r.operands]
    if r.options:
        found.append(("options", ", ".join(r.options)))
    found += _blocks(r)
    if r.impl is not None:
        found.append(("memory, forward", f"{size(r.forward)}{_beside(r.forward, ' and results')}"))
        beside = _beside(r.backward, ", results and gradients")
        found.append(("memory, with backward", f"{size(r.backward)}{beside}"))
    return found


def lines(r: Report) -> str:
    """Aligned text."""
    said = rows(r)
    wide = max(len(name) for name, _ in said)
    return "\n".join(f"{name:<{wide}}  {what}" for name, what in said)


def table(r: Report) -> Any:
    """A rich Table."""
    from rich.table import Table
    from rich.text import Text

    found = Table(title="attn_core.explain", title_justify="left", show_header=False)
    found.add_column(no_wrap=True, style="bold")
    found.add_column(overflow="fold")
    for name, what in rows(r):
        # As Text: a mask such as int0[b, q] is no markup.
        found.add_row(Text(name), Text(what))
    return found


def _chosen(r: Report) -> str:
    if r.impl is None:
        return f"none answers impl={r.asked!r}, {_ASKED[r.asked_by]}; attention would raise"
    return f"{r.impl}, {_ASKED[r.asked_by if r.asked != 'auto' else 'auto']}"


def _verdict(c: Candidate) -> str:
    return f"refused: {' '.join(c.reasons)}" if c.reasons else c.verdict


def _blocks(r: Report) -> list[tuple[str, str]]:
    size = "none" if r.tiles is None else f"{r.tiles[0]} queries by {r.tiles[1]} keys"
    size += "" if r.together == 1 else f", {r.together} of a row at a time"
    tiles = ("tiles", size + ("" if r.turn is None else f", {_turn(*r.turn)} at once"))
    b = r.blocks
    if b is None:
        return [tiles, ("live blocks", UNKNOWN)]
    live = b.full + b.partial
    said = f"{live} of {b.total} ({_share(b.live_share)}): {b.full} full, {b.partial} partial"
    axes = [axis for axis, count in (("batch", b.batches), ("head", b.heads)) if count > 1]
    if axes:
        said += f"; of {b.batches * b.heads} maps, one for each {' and '.join(axes)}"
    if r.tiles is None:
        said += f"; in blocks of {b.block_q} by {b.block_k}"
        if r.impl is not None and b.total:
            said += f", since {r.impl} has no tiles of its own"
    found = [tiles, ("live blocks", said)]
    if b.excess is not None and b.allowed_share is not None:
        what = f"{b.excess} live blocks hold nothing allowed; of the entries in live blocks "
        found.append(("excess", f"{what}{_share(b.allowed_share)} are allowed"))
    return found


def _turn(batches: int, heads: int) -> str:
    """Whose tiles are one product."""
    said = "1 key head" if heads == 1 else f"{heads} key heads"
    return said if batches == 1 else f"{said} of {batches} batches"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _beside(known: int | None, what: str) -> str:
    return "" if known is None else f" beside arguments{what} (estimated)"
