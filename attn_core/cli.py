"""The command line: `attn-core explain`, `doctor`, `conformance`, `bench` and `kernels`.

Options and their words stand here and in `cli_*.py`; what they lead to is imported when it is
asked for.

Completion: `attn-core --install-completion`.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from attn_core.cli_bench import benches
from attn_core.cli_conformance import suite
from attn_core.cli_kernels import kernels
from attn_core.cli_terminal import backends, told

app = typer.Typer(
    help="One attention with one meaning for PyTorch, TensorFlow, JAX and NumPy.",
    no_args_is_help=True,
)
app.add_typer(suite, name="conformance")
app.add_typer(benches, name="bench")
app.add_typer(kernels, name="kernels")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("attn-core"))
        raise typer.Exit


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command."""


def _masks(incomplete: str) -> list[str]:
    from attn_core.cli_words import MASKS

    return [name for name in MASKS if name.startswith(incomplete)]


def _scores(incomplete: str) -> list[str]:
    from attn_core.cli_words import scores_for

    return [name for name in scores_for(1) if name.startswith(incomplete)]


@app.command("explain")
def explain_shapes(
    backend: Annotated[
        str, typer.Option(help="Backend to ask.", autocompletion=backends)
    ] = "numpy",
    shape: Annotated[str, typer.Option(help="B,Hq,Tq,D of query.")] = "1,8,2048,64",
    kv_heads: Annotated[int | None, typer.Option(help="Hk; as query.")] = None,
    keys: Annotated[int | None, typer.Option(help="Tk; as query.")] = None,
    value_width: Annotated[int | None, typer.Option(help="Dv; as query.")] = None,
    dtype: Annotated[str, typer.Option(help="Of query, key and value.")] = "float32",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="causal, window:255, prefix:16, dilated:2, chunks:64, global_tokens:1, text such "
            'as "q >= k", or "causal & window(255)"; may be repeated, all apply.',
            autocompletion=_masks,
        ),
    ] = None,
    bias: Annotated[
        str | None, typer.Option(help="Its shape, Tq,Tk or 1,Hq,Tq,Tk and the like.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help='softcap:50, alibi or text such as "s * 0.5"; may be repeated, one after another.',
            autocompletion=_scores,
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="1 / sqrt(D) when left out.")] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="A sink to each head.")] = False,
    kv_lengths: Annotated[
        str | None, typer.Option(help="An int for all batches, or one to each, commas between.")
    ] = None,
    q_lengths: Annotated[str | None, typer.Option(help="As --kv-lengths.")] = None,
    query_offset: Annotated[
        str | None, typer.Option(help="start, end, an int, or one to each batch.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="The rate.")] = 0.0,
    layout: Annotated[str, typer.Option(help="BHTD or BTHD.")] = "BHTD",
    precision: Annotated[str | None, typer.Option(help="highest or fast.")] = None,
    impl: Annotated[str, typer.Option(help="auto, or the name of an implementation.")] = "auto",
    return_lse: Annotated[bool, typer.Option("--return-lse", help="Ask for lse too.")] = False,
    return_weights: Annotated[
        bool, typer.Option("--return-weights", help="Ask for the weights too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What attention would do with arrays of these sizes; exit 1 where nothing answers."""
    from json import dumps

    from attn_core.explain_shapes import report

    with told(ValueError, TypeError, ImportError):
        found = report(
            backend,
            shape,
            kv_heads=kv_heads,
            keys=keys,
            value_width=value_width,
            dtype=dtype,
            mask=mask or (),
            bias=bias,
            score=score or (),
            scale=scale,
            sinks=sinks,
            kv_lengths=kv_lengths,
            q_lengths=q_lengths,
            query_offset=query_offset,
            dropout=dropout,
            layout=layout,
            precision=precision,
            impl=impl,
            return_lse=return_lse,
            return_weights=return_weights,
        )
    if json:
        typer.echo(dumps(found.as_dict(), indent=2))
    else:
        Console().print(found)
    raise typer.Exit(0 if found.impl else 1)


@app.command()
def doctor() -> None:
    """What is installed, and which backends can be used."""
    from attn_core.cli_doctor import lines

    console = Console()
    for line in lines():
        console.print(line, markup=False)
