"""`attn_core.compat.torch` against torch's own function, option by option and in pairs."""

from __future__ import annotations

import inspect
from typing import Any

import compat_cases as cases
import numpy as np
import pages
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attn_core
from attn_core import compat, reference
from attn_core.compat.torch import scaled_dot_product_attention as ours

theirs = torch.nn.functional.scaled_dot_product_attention
OPTIONS = ("boolean", "added", "is_causal", "scale", "enable_gqa", "more_queries")


def asked(options: tuple[str, ...], dtype: Any) -> tuple[dict[str, Any], cases.Judge]:
    """torch's arguments, as NumPy arrays, and the judge's."""
    rows, keys = (9, 5) if "more_queries" in options else (5, 9)
    kv_heads = 2 if "enable_gqa" in options else 4
    shapes = {
        "query": (2, 4, rows, 8),
        "key": (2, kv_heads, keys, 8),
        "value": (2, kv_heads, keys, 6),
    }
    arrays = {
        name: cases.draw(n, *shape, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())
    }
    given: dict[str, Any] = dict(arrays)
    judge: cases.Judge = dict(arrays)
    seen = np.ones((rows, keys), bool)
    if "boolean" in options:
        given["attn_mask"] = seen = np.random.default_rng(7).random((2, 1, rows, keys)) < 0.6
        seen[0, 0, 2] = False  # a row that sees nothing
    if "added" in options:
        added = cases.draw(8, 4, rows, keys, dtype=dtype)
        added[1, 1, :] = -np.inf
        added[0, 0, 1] = -np.inf
        given["attn_mask"], judge["bias"] = added, added[None]
    if "is_causal" in options:
        given["is_causal"] = True
        seen = seen & cases.causal(rows, keys)
    if "scale" in options:
        given["scale"] = judge["scale"] = -0.7
    if "enable_gqa" in options:
        given["enable_gqa"] = True
    return given, {**judge, "mask": seen}


CASES = [c for c in cases.singly_and_in_pairs(OPTIONS) if not {"boolean", "added"} <= set(c)]


def answered(function: Any, given: dict[str, Any], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    tensors = {n: torch.tensor(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if n in ("query", "key", "value")}
    mask = tensors.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves["bias"] = mask.requires_grad_()
    out = function(**tensors)
    gradients = torch.autograd.grad(out, list(leaves.values()), torch.tensor(cotangent))
    found = {"out": out.detach().numpy()}
    for name, gradient in zip(leaves, gradients, strict=True):
        found[f"d_{name}"] = gradient.numpy()[None] if name == "bias" else gradient.numpy()
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", CASES, ids="+".join)
def test_every_option_alone_and_in_pairs(options, dtype):
    given, judge = asked(options, dtype)
    cotangent = cases.draw(9, *given["query"].shape[:3], 6, dtype=dtype)
    name = np.dtype(dtype).name
    mine = cases.shares(judge, cotangent, answered(ours, given, cotangent), name)
    assert cases.inside(mine), mine
    if "is_causal" not in options or not {"boolean", "added"} & set(options):
        its = cases.shares(judge, cotangent, answered(theirs, given, cotangent), name)
        assert cases.inside(its), its


@pytest.mark.parametrize("added", [False, True])
def test_mask_and_causal_both_apply(added):
    """torch refuses the two together; its kernel on a CPU, until 2.15, applies both."""
    q, k, v = [torch.tensor(cases.draw(n, 2, 4, t, 8)) for n, t in enumerate((5, 9, 9))]
    mask = torch.tensor(cases.draw(3, 5, 9))
    mask = mask if added else mask > 0
    later = torch.ones(5, 9, dtype=torch.bool).triu(1)
    want = theirs(q, k, v, mask.masked_fill(later, -torch.inf if added else False))
    torch.testing.assert_close(ours(q, k, v, mask, is_causal=True), want)
    try:
        its, said = theirs(q, k, v, mask, is_causal=True), "should not be set when is_causal"
    except RuntimeError as error:
        its, said = want, str(error)
    assert "should not be set when is_causal" in said
    torch.testing.assert_close(its, want)
    assert not torch.allclose(want, theirs(q, k, v, mask), atol=1e-3)


@pytest.mark.parametrize("made", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_torchs_causal_biases(made, heads):
    """Tensors whose entries nobody has written: of two heads one was added as it was."""
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(2, heads, n, 8, generator=generator) for n in (5, 9, 9)]
    found = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in arrays]
        out = function(*leaves, attn_mask=made(5, 9))
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda *x: ours(*x, attn_mask=made(5, 9)), backend="aot_eager")
    torch.testing.assert_close(compiled(*arrays), found[0][0].detach())
    with pytest.raises(ValueError, match="`is_causal` must be False beside a CausalBias"):
        ours(*arrays, attn_mask=made(5, 9), is_causal=True)


def test_a_causal_bias_of_other_sizes_is_refused():
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"`attn_mask` must be of .* \(5, 5\). Got \(5, 9\)"):
        ours(x, x, x, attn_mask=causal_lower_right(5, 9))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("enable_gqa", "more_queries")])
def test_each_option_changes_the_answer(option):
    _given, judge = asked((option,), np.float32)
    _, off = asked((), np.float32)
    assert cases.off_and_on(judge, off)


def test_the_signature_is_torchs():
    # torch's own is built in: its documentation and its errors say that scale is by name only.
    parameters = inspect.signature(ours).parameters
    assert list(parameters) == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    ]
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False]
    assert (
        parameters["scale"].kind is parameters["enable_gqa"].kind is inspect.Parameter.KEYWORD_ONLY
    )


SHAPES = {
    "rank 2": ((5, 8), (9, 8), (9, 6), None),
    "rank 3": ((3, 5, 8), (3, 9, 8), (3, 9, 6), (3, 5, 9)),
    "rank 5": ((2, 3, 2, 5, 8), (2, 3, 2, 9, 8), (2, 3, 2, 9, 6), (3, 1, 5, 9)),
    "one key head": ((2, 4, 5, 8), (2, 1, 9, 8), (2, 1, 9, 6), (5, 9)),
    "one key head, four of values": ((2, 4, 5, 8), (2, 1, 9, 8), (2, 4, 9, 6), (4, 1, 9)),
    "one query": ((1, 1, 5, 8), (2, 4, 9, 8), (2, 4, 9, 6), (2, 1, 1, 9)),
    "keys without a batch": ((2, 4, 5, 8), (4, 9, 8), (4, 9, 6), (1, 1, 5, 9)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6), None),
}


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_leading_dimensions_broadcast_as_in_torch(shapes, boolean):
    q, k, v = [torch.tensor(cases.draw(n, *shape)) for n, shape in enumerate(shapes[:3])]
    mask = None
    if shapes[3] is not None:
        mask = torch.tensor(cases.draw(3, *shapes[3]))
        mask = mask > -0.5 if boolean else mask
    torch.testing.assert_close(ours(q, k, v, mask), theirs(q, k, v, mask))


@pytest.mark.parametrize(
    "shapes",
    [((4, 5, 8), (2, 9, 8), (2, 9, 8)), ((2, 3, 4, 5, 8), (2, 3, 2, 9, 8), (2, 3, 4, 9, 8))],
)
def test_grouped_heads_of_other_ranks(shapes):
    q, k, v = [torch.tensor(cases.draw(n, *shape)) for n, shape in enumerate(shapes)]
    want = theirs(q, k, v, enable_gqa=True)
    torch.testing.assert_close(ours(q, k, v, enable_gqa=True), want)


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (2, 3, 4)])
@pytest.mark.parametrize("shape", [(9,), (1,), ()])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_one_row_and_of_one_number(lead, shape, boolean):
    """torch's kernel for the CPU takes none below rank 2 at heads of rank 4; its plain one does."""
    q, k, v = [torch.tensor(cases.draw(n, *lead, t, 8)) for n, t in enumerate((5, 9, 9))]
    added = torch.tensor(cases.draw(3, *shape))
    mask = added > 0 if boolean else added.requires_grad_()
    out = ours(q, k, v, mask)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = theirs(q, k, v, mask)
    torch.testing.assert_close(out, want)
    if not boolean:
        (mine,), (its,) = [torch.autograd.grad(x.square().sum(), added) for x in (out, want)]
        assert mine.shape == shape
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_and_a_wide_mask():
    q, k, v = [torch.tensor(cases.draw(n, 2, 4, t, 8)).bfloat16() for n, t in enumerate((5, 9, 9))]
    mask = torch.tensor(cases.draw(3, 5, 9))
    out = ours(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    want = theirs(*[x.double() for x in (q, k, v)], mask.double())
    torch.testing.assert_close(out.double(), want, atol=2**-7, rtol=2**-7)


def test_autocast_casts_as_torch_does():
    q, k, v = [torch.tensor(cases.draw(n, 2, 4, 5, 8)) for n in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(q, k, v).dtype == theirs(q, k, v).dtype == torch.bfloat16


def test_dropout_is_governed_by_torchs_generator():
    q, k, v = [torch.tensor(cases.draw(n, 2, 4, 40, 8)) for n in range(3)]
    torch.manual_seed(5)
    first, second = ours(q, k, v, dropout_p=0.3), ours(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(ours(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    arrays = [x.numpy() for x in (q, k, v)]
    want = reference.attention(*arrays, dropout=(0.3, seed)).out
    np.testing.assert_allclose(first.numpy(), want, atol=1e-5)
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    ours(q, k, v)
    assert torch.equal(torch.get_rng_state(), generator), "nothing is drawn without dropout"


def test_all_dropped_is_zero_with_zero_gradients():
    q, k, v = [torch.tensor(cases.draw(n, 2, 4, 5, 8)).requires_grad_() for n in range(3)]
    out = ours(q, k, v, dropout_p=1.0)
    assert torch.equal(out, theirs(q, k, v, dropout_p=1.0))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not gradient.any()


def test_it_compiles_whole_and_vmaps():
    q, k, v = [torch.tensor(cases.draw(n, 3, 2, 4, t, 8)) for n, t in enumerate((5, 9, 9))]
    mask = torch.tensor(cases.draw(3, 5, 9))

    def call(q, k, v, mask):
        return ours(q, k, v, mask, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = call(q, k, v, mask)
    torch.testing.assert_close(compiled(q, k, v, mask), want)
    mapped = torch.vmap(lambda q, k, v: call(q, k, v, mask))(q, k, v)
    torch.testing.assert_close(mapped, want)


def test_dropout_compiles():
    q = torch.tensor(cases.draw(0, 2, 4, 40, 8))
    compiled = torch.compile(
        lambda q: ours(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first = compiled(q)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(q), first)
    torch.testing.assert_close(compiled(q).isfinite().all(), torch.tensor(True))


def test_inside_torchs_own_module(monkeypatch):
    """nn.MultiheadAttention calls the function by its name in torch.nn.functional."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.0)
    x = torch.tensor(cases.draw(0, 2, 7, 16))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    options = {"need_weights": False, "key_padding_mask": padding}
    want, _ = layer(x, x, x, **options)
    called = []

    def spy(*args, **kwargs):
        called.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found, _ = layer(x, x, x, **options)
    assert called
    torch.testing.assert_close(found, want)


X = torch.zeros(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": torch.zeros(8)}, ValueError, "`query` must have rank 2 or more"),
        ({"query": [1.0]}, TypeError, "`query` must be a tensor. Got list"),
        ({"key": X[:, :2]}, ValueError, "without enable_gqa that broadcast"),
        (
            {"key": X[:, :3], "enable_gqa": True},
            ValueError,
            "multiple of those of `key`. Got 4 and 3",
        ),
        ({"key": torch.zeros(3, 4, 5, 8)}, ValueError, "leading dimensions that broadcast"),
        ({"key": X.half()}, TypeError, "must share one dtype"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, TypeError, "write `attn_mask != 0`"),
        ({"attn_mask": torch.ones(5, 5).double()}, TypeError, "not be wider than float32"),
        ({"attn_mask": torch.ones(4, dtype=torch.bool)}, ValueError, "must broadcast to"),
        ({"attn_mask": torch.ones(5, 4)}, ValueError, "must broadcast to"),
        ({"attn_mask": np.ones((5, 5), bool)}, TypeError, "`attn_mask` must be a tensor"),
        ({"dropout_p": 1.5}, ValueError, "`dropout_p` must lie between 0 and 1. Got 1.5"),
        ({"scale": float("inf")}, ValueError, "`scale` must be finite"),
    ],
)
def test_errors_are_in_our_words(arguments, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        ours(**{"query": X, "key": X, "value": X, **arguments})


def test_what_torch_takes_and_ours_refuses():
    """As the page says; each of torch's answers is of what the page says it takes."""
    x = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    scaled, plain = theirs(x, x, x, scale=torch.tensor(0.5)), theirs(x, x, x, scale=0.5)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0)
    with pytest.raises(TypeError, match="`scale` must be a host number"):
        ours(x, x, x, scale=torch.tensor(0.5))
    mean = x.mean(-2, keepdim=True).expand_as(x)
    torch.testing.assert_close(theirs(x[..., :0], x[..., :0], x), mean)
    with pytest.raises(ValueError, match="D, Hq and Hk must be at least 1"):
        ours(x[..., :0], x[..., :0], x)
    few = x[..., :3, :]
    torch.testing.assert_close(theirs(x, x, few), theirs(x, few, few), rtol=0, atol=0)
    with pytest.raises(ValueError, match="`value` must agree on Tk"):
        ours(x, x, few)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(3, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="dense tensor"):
        ours(nested, nested, nested)
    for mask in (nested, torch.ones(5, 5).to_sparse()):
        with pytest.raises(TypeError, match=r"^`attn_mask` must be a dense tensor. Got (a|one)"):
            ours(X, X, X, attn_mask=mask)
    with pytest.raises(TypeError, match=r"^`query` must be a dense tensor. Got one of layout"):
        ours(X.to_sparse(), X, X)


# Conventions by source -------------------------------------------------------------------------


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    "which", [("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")]
)
@pytest.mark.parametrize("rank", [2, 3])
def test_masks_of_multihead_attention(which, added, rank):
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.tensor(cases.draw(0, 2, 7, 16))
    hidden = torch.tensor(cases.draw(1, *((7, 7) if rank == 2 else (8, 7, 7)))) > 0.5
    hidden[..., 0] = False
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    given = {"attn_mask": hidden, "key_padding_mask": padding}
    given = {n: given[n] for n in which}
    if added:
        given = {n: torch.zeros(m.shape).masked_fill(m, -2.5) for n, m in given.items()}
    want, _ = layer(x, x, x, need_weights=False, **given)
    q, k, v = torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k, v = [y.unflatten(-1, (4, 4)) for y in (q, k, v)]
    kwargs = compat.from_torch_mha_mask(**given, heads=4)
    out = layer.out_proj(attn_core.attention(q, k, v, layout="BTHD", **kwargs).flatten(2))
    torch.testing.assert_close(out, want)


def test_the_page_as_written():
    for code in pages.blocks("COMPAT.md", "torch"):
        held: dict[str, Any] = {}
        exec(code, held)
        assert held.get("out", held.get("weights")) is not None
