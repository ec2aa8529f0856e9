"""`attn_core.explain`: the words, the counts and who is asked; each framework has a file too."""

from __future__ import annotations

import inspect
import json
import tracemalloc
from io import StringIO
from typing import Any

import numpy as np
import pytest
from explain_cases import FLOAT32, as_of_zeros, counted, keys_of, live, near
from rich.console import Console
from support import seen
from tile_cases import CASES, TRACED
from typer.testing import CliRunner

import attn_core
from attn_core import UnsupportedError, attention, explain, masks, registry, scores
from attn_core.cli import app
from attn_core.explain_shapes import report
from attn_core.explain_text import size
from attn_core.footprint import reading

NUMPY = registry.load("numpy")


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("ATTN_CORE_BACKEND", raising=False)
    monkeypatch.delenv("ATTN_CORE_IMPL", raising=False)
    yield
    attn_core.config.set(backend=None, impl=None)


def zeros(*shape: int, dtype: Any = "float32") -> np.ndarray:
    """No memory to speak of, however large."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def asked(rows: int = 30, keys: int = 40, batch: int = 2, heads: int = 2, **options: Any) -> Any:
    key = zeros(batch, heads, keys, 8)
    return explain(zeros(batch, heads, rows, 8), key, key, **options)


# --- The same question as attention's. ------------------------------------------------------------


def test_the_arguments_are_those_of_attention() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (explain, attention))
    assert list(ours.values()) == list(theirs.values())


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NUMPY, "attend", None)
    monkeypatch.setattr(NUMPY, "_HANDLERS", {})
    asked(mask=masks.causal(), query_offset="end", return_weights=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": np.zeros((30, 40))},
        {"mask": lambda b, h, q, k: q >= k},
        {"mask": masks.causal()},
        {"layout": "TBHD"},
        {"impl": "fastest"},
        {"precision": "low"},
        {"kv_lengths": 41},
        {"bias": np.zeros((2, 30, 40), "float32")},
    ],
)
def test_arguments_are_refused_as_attention_refuses_them(wrong: dict[str, Any]) -> None:
    query, key = np.zeros((2, 2, 30, 8), "float32"), np.zeros((2, 2, 40, 8), "float32")
    with pytest.raises((TypeError, ValueError)) as theirs:
        attention(query, key, key, **wrong)
    with pytest.raises(theirs.type) as ours:
        explain(query, key, key, **wrong)
    assert str(ours.value) == str(theirs.value)


# --- What is chosen, and who asked. ---------------------------------------------------------------


def test_the_chosen_one() -> None:
    found = asked()
    assert (found.backend, found.backend_from, found.impl) == ("numpy", "default", "reference")
    assert [(c.name, c.verdict) for c in found.candidates] == [("reference", "chosen")]


@pytest.mark.parametrize("impl", ["chunked", "native", "triton"])
def test_what_would_raise_is_told(impl: str) -> None:
    found = asked(impl=impl)
    assert (found.impl, found.effective, found.forward, found.tiles) == (None,) * 4
    refused, other = found.candidates
    assert (refused.name, refused.verdict, other.verdict) == (impl, "refused", "would answer")
    x = np.zeros((1, 1, 2, 2), "float32")
    with pytest.raises(UnsupportedError) as error:
        attention(x, x, x, impl=impl)
    assert refused.reasons
    for reason in refused.reasons:
        assert reason in str(error.value)
        assert f"refused: {reason}" in str(found)
    assert "attention would raise" in str(found)


def test_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> tuple[str, str, str, str]:
        found = asked()
        return found.asked, found.asked_by, found.backend, found.backend_from

    assert said() == ("auto", "auto", "numpy", "default")
    monkeypatch.setenv("ATTN_CORE_IMPL", "reference")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "numpy")
    assert said() == ("reference", "environment", "numpy", "environment")
    attn_core.config.set(impl="chunked", backend="numpy")
    assert said() == ("chunked", "config", "numpy", "config")
    with attn_core.use(impl="reference", backend="numpy"):
        assert said() == ("reference", "use", "numpy", "use")
        assert asked(impl="triton").asked_by == "argument"
        assert "asked for by attn_core.use" in str(asked())
    with attn_core.use(impl="auto"):
        assert said() == ("auto", "use", "numpy", "config")
        assert "chosen by auto" in str(asked())


# --- Blocks, against the dense mask. --------------------------------------------------------------


def dense(name: str, offset: Any, kv: Any = None, rows: Any = None) -> np.ndarray:
    found = seen(CASES[name], (2, 2, 30, 40), offset).copy()
    for b in range(2):
        found[b, :, :, None if kv is None else kv[b] :] &= kv is None
        found[b, :, None if rows is None else rows[b] :] &= rows is None
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("offset", [0, 10, "each"])
def test_blocks_are_those_of_the_dense_mask(
    name: str, offset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_core.explained.NOMINAL", (4, 8))
    offset = TRACED["offsets"] if offset == "each" else offset
    counted(asked(mask=CASES[name], query_offset=offset), dense(name, offset))
    kv, rows = TRACED["kv_lengths"], TRACED["q_lengths"]
    given = {"kv_lengths": kv, "q_lengths": rows, "query_offset": offset}
    counted(asked(mask=CASES[name], **given), dense(name, offset, kv, rows))


def test_offset_end_counts_from_the_lengths() -> None:
    kv, rows = np.array([40, 21]), np.array([30, 17])
    ended = asked(mask=masks.causal(), query_offset="end", kv_lengths=kv, q_lengths=rows)
    stated = asked(mask=masks.causal(), query_offset=kv - rows, kv_lengths=kv, q_lengths=rows)
    assert ended.blocks == stated.blocks
    assert 'query_offset "end"' in ended.options


def test_large_masks_are_counted_by_blocks_alone() -> None:
    found = asked(2**17, 2**17, mask=masks.causal())
    assert live(found) == (2**10 * (2**10 - 1) // 2, 2**10, 2**10 * (2**10 - 1) // 2)
    assert found.blocks is not None
    assert (found.blocks.excess, found.blocks.allowed_share) == (None, None)
    assert "excess" not in str(found)


def test_dead_blocks_that_a_map_keeps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.explained.NOMINAL", (2, 2))
    found = asked(mask=CASES["arithmetic"], query_offset=0)
    counted(found, dense("arithmetic", 0))
    assert found.blocks is not None
    assert found.blocks.excess
    assert f"{found.blocks.excess} live blocks hold nothing allowed" in str(found)


@pytest.mark.parametrize("sizes", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 0)])
def test_nothing_at_all(sizes: tuple[int, int, int]) -> None:
    rows, keys, batch = sizes
    lengths = np.zeros(batch, int)
    found = asked(
        rows, keys, batch, mask=masks.lengths(kv=lengths), kv_lengths=lengths, query_offset=lengths
    )
    assert live(found) == (0, 0, found.blocks.total) if found.blocks else False
    assert found.blocks.live_share == 0
    assert str(found)


# --- Numbers. -------------------------------------------------------------------------------------


def test_memory_of_numpy_is_about_what_it_takes() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 2, 512, 16)).astype("float32")
    for more in ({}, {"score": scores.softcap(3.0)}, {"dropout": attn_core.Dropout(0.1, 3)}):
        given: dict[str, Any] = {"query": x, "key": x, "value": x, "mask": masks.causal(), **more}
        found = explain(**given)
        for estimate, call in (
            (found.forward, lambda given=given: attention(**given)),
            (found.backward, lambda given=given: NUMPY.vjp(given, {"out": x})),
        ):
            call()
            tracemalloc.start()
            call()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert near(estimate, peak)


def test_reference_is_quadratic() -> None:
    one, two = (asked(n, n) for n in (1024, 2048))
    assert one.forward
    assert one.backward
    assert (two.forward, two.backward) == (4 * one.forward, 4 * one.backward)


def test_what_a_tree_holds() -> None:
    tile = {"b": 1, "h": 2, "row": 16, "k": 8}
    assert reading(None, tile, 4) == 0
    assert reading(masks.causal().tree, tile, 4) == 16 * 8
    # q - k, a constant and the comparison.
    assert reading(masks.window(left=3).tree, tile, 4) == 16 * 8 * 5 + 4
    assert reading(scores.softcap(2.0).tree, tile, 8) >= 3 * 2 * 16 * 8 * 8


def test_effective_precision() -> None:
    assert asked().effective == FLOAT32
    x = zeros(1, 1, 4, 2, dtype="float16")
    found = explain(x, x, x, precision="highest")
    assert found.effective == "float16 multiplied as float32, summed in float32"
    assert f'{found.effective} (precision="highest")' in str(found)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (None, "known when it runs"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
    ],
)
def test_bytes_in_words(count: int | None, said: str) -> None:
    assert size(count) == said


# --- How it prints. -------------------------------------------------------------------------------


def everything() -> Any:
    ids, slopes = np.zeros((2, 40), np.int32), np.ones(2, np.float32)
    bias = np.zeros((1, 2, 1, 40), np.float32)
    return asked(
        mask=masks.segments(ids) & masks.causal(),
        score=scores.alibi(slopes),
        bias=bias,
        sinks=slopes,
        kv_lengths=[40, 20],
        query_offset=10,
        dropout=attn_core.Dropout(0.25, 1),
        return_lse=True,
    )


def test_it_prints_text_table_and_json_alike() -> None:
    found = everything()
    text = str(found)
    for said in (
        "int0[b, q] == int0[b, k]",
        "mask int0: int32 (2, 40)",
        "score float0: float32 (2,)",
        "bias (1, Hq, 1, Tk) float32, sinks float32, kv_lengths, query_offset 10, dropout 0.25",
        "B 2, Hq 2, Hk 2, Tq 30, Tk 40, D 8, Dv 8, BHTD",
    ):
        assert said in text
    console = Console(width=400, record=True, file=StringIO())
    console.print(found)
    table = console.export_text()
    for line in text.splitlines():
        for cell in line.strip().split("  ", 1):
            assert cell.strip() in table
    plain = keys_of(found)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["blocks"]["live_share"] == found.blocks.live_share


def test_a_report_is_a_frozen_value() -> None:
    found = asked(mask=masks.causal(), query_offset=0)
    assert found == asked(mask=masks.causal(), query_offset=0)
    with pytest.raises(AttributeError):
        found.impl = "other"


# --- The command. ---------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["explain", *words])


def test_the_command_prints_json() -> None:
    done = run(
        *("--shape", "2,4,300,16", "--kv-heads", "2", "--keys", "500", "--value-width", "8"),
        *("--mask", "causal", "--mask", "q - k <= 99", "--query-offset", "end"),
        *("--kv-lengths", "500,300", "--dtype", "float16", "--layout", "BTHD", "--json"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found["shape"].values()) == [2, 4, 2, 300, 500, 16, 8]
    assert found["mask"] == "(q >= k) & (q - k <= 99)"
    assert found["options"] == ["kv_lengths", 'query_offset "end"']
    assert (found["dtype"], found["layout"]) == ("float16", "BTHD")


def test_the_command_says_the_same_as_the_function() -> None:
    done = run("--shape", "1,2,64,8", "--mask", "window:7,0")
    x = zeros(1, 2, 64, 8)
    found = explain(x, x, x, mask=masks.window(7, 0))
    assert report("numpy", "1,2,64,8", mask=["window:7,0"]) == found
    assert done.exit_code == 0
    assert "reference, chosen by auto" in done.output
    assert run("--impl", "chunked").exit_code == 1


@pytest.mark.parametrize(
    ("words", "field", "said"),
    [
        (("--score", "softcap:50"), "score", "50.0 * tanh(s / 50.0)"),
        (("--score", "s * 0.5"), "score", "s * 0.5"),
        (("--score", "s * 0.5", "--score", "s + 1.0"), "score", "s * 0.5 + 1.0"),
        (("--score", "alibi"), "operands", ["score float0: float64 (4,)"]),
        (("--scale", "0.5"), "scale", 0.5),
        (("--bias", "1,4,1,9"), "options", ["bias (1, Hq, 1, Tk) float32"]),
        (("--bias", "9,9"), "options", ["bias (1, 1, Tq, Tk) float32"]),
        (("--sinks",), "options", ["sinks float32"]),
        (("--dropout", "0.25"), "options", ["dropout 0.25"]),
        (("--kv-lengths", "5"), "options", ["kv_lengths"]),
        (("--q-lengths", "5"), "options", ["q_lengths"]),
        (("--mask", "causal", "--query-offset", "3"), "options", ["query_offset 3"]),
        (
            ("--dropout", "0.25", "--query-offset", "3"),
            "options",
            ["query_offset 3", "dropout 0.25"],
        ),
        (("--return-lse",), "options", ["return_lse"]),
        (("--return-weights",), "options", ["return_weights"]),
    ],
)
def test_an_option_of_the_command_is_in_its_answer(
    words: tuple[str, ...], field: str, said: Any
) -> None:
    question = ("--shape", "2,4,9,8", "--json")
    found = [json.loads(run(*question, *more).stdout)[field] for more in ((), words)]
    assert found[1] == said
    assert found[0] != said


@pytest.mark.parametrize("option", ["--kv-lengths", "--q-lengths", "--query-offset"])
def test_one_int_is_for_all_batches_and_several_are_one_to_each(option: str) -> None:
    def live(words: str) -> Any:
        done = run(*("--shape", "2,1,512,8", "--mask", "causal", option, words, "--json"))
        assert done.exit_code == 0, done.output
        blocks = json.loads(done.stdout)["blocks"]
        return (blocks["full"] + blocks["partial"]) / blocks["batches"]

    assert live("130") == live("130,130")
    assert live("130,300") == (live("130") + live("300")) / 2
    assert live("130") != live("300")
    done = run("--shape", "2,1,512,8", "--mask", "causal", option, "1,2,3")
    assert done.exit_code == 2
    assert "(B,) = (2,). Got (3,)" in done.stderr


def test_of_sizes_alone_it_says_the_same_and_makes_no_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_of_zeros("numpy", monkeypatch)


def test_a_map_that_no_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise MemoryError("Unable to allocate 8.88 TiB")

    monkeypatch.setattr("attn_core.explained.count", full)
    done = run("--shape", "1,1,9,8", "--mask", "causal")
    assert done.exit_code == 2
    assert "tiles can be counted in this machine's memory. Got '1,1,9,8': Unable" in done.stderr


def test_the_command_takes_expressions_in_a_users_own_spacing() -> None:
    done = run("--mask", "(q>=k)&(q-k<9)", "--score", "s*0.5", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["mask"], told["score"]) == ("(q >= k) & (q - k < 9)", "s * 0.5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--score", "sotfcap:3"), "Did you mean 'softcap'?"),
        (("--score", "softcap"), "must give softcap the numbers it takes, as softcap:50"),
        (("--score", "alibi:3"), "must give alibi the numbers it takes, as alibi. Got 'alibi:3'"),
        (("--score", "float0[h] + s"), "must look no array up"),
        (("--score", "q - k < 3"), "must return a number. Got a condition"),
        (("--bias", "3,x"), "`bias` must be ints"),
        (("--bias", "1,2,3"), "`bias` must have rank 2"),
        (("--dropout", "1.5"), "`rate` must be at least 0 and below 1"),
        (("--query-offset", "ends"), "`query_offset` must be start, end or ints"),
        (("--shape", "2,3"), "`shape` must be B,Hq,Tq,D"),
        (
            ("--shape", f"1,1,{2**31},1"),
            "must have sizes from 0 to 2**31 - 1, as positions",
        ),
        (("--shape", f"1,99999,{2**31 - 1},{2**20}"), "and fewer than 2**60 entries. Got"),
        (("--keys", "-3"), "`key` must have sizes from 0"),
        (("--bias", "-1,3"), "`bias` must have sizes from 0"),
        (("--shape", "2,3,x,4"), "`shape` must be ints"),
        (("--mask", "casual"), "Did you mean 'causal'?"),
        (("--mask", "int0[q] == 1"), "must look no array up"),
        (("--mask", "q + k"), "must return a condition"),
        (("--mask", "window"), "must give window the numbers it takes, as window:255. Got"),
        (("--mask", "q >="), "`mask` must be an expression of the language"),
        (("--shape", f"1,{2**21},1,1", "--score", "alibi"), "`heads` must be 2**20 at most"),
        (("--score", "s ** 2"), "Got 's ** 2' in 's ** 2', which is no expression of it."),
        (("--mask", "0 <= q - k < 9"), "Got '0 <= q - k < 9'"),
        (("--dtype", "float23"), "Did you mean"),
        (("--backend", "jaxx"), "Did you mean 'jax'?"),
        (("--keys", "9", "--mask", "causal"), "`query_offset` must be given"),
        (("--impl", "fused"), "`impl` must be one of"),
    ],
)
def test_the_command_refuses_what_says_nothing(words: tuple[str, ...], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr
