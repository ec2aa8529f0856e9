"""The torch backend where conformance does not look.

Autocast, precision, dropout bits, NumPy in and out, odd strides, gradient bookkeeping, devices, and
the documents' function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torchs_own
from torch.utils._python_dispatch import TorchDispatchMode

import attn_core
from attn_core import Dropout, UnsupportedError, attention, check, masks, reference, scores
from attn_core.backends.numpy import philox as host_philox
from attn_core.backends.torch import from_numpy, scaled_dot_product_attention, to_numpy
from attn_core.backends.torch.philox import product
from attn_core.spec import FAR

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 8, 6
RNG = np.random.default_rng(5)


def draw(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.as_tensor(RNG.standard_normal(shape)).to(dtype)


q, k, v = draw(B, HQ, TQ, D), draw(B, HK, TK, D), draw(B, HK, TK, DV)


def judge(q: Any, k: Any, v: Any, **options: Any) -> np.ndarray:
    return reference.attention(*[x.double().numpy() for x in (q, k, v)], **options).out


# --- What is remembered from call to call. --------------------------------------------------------


def test_a_call_like_the_last_one_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    stated = check._stated
    monkeypatch.setattr(check, "_stated", lambda *a, **o: counted.append(a) or stated(*a, **o))
    check._known.cache_clear()
    options: Any
    for options in ({}, {"mask": masks.causal()}, {"scale": 0.3}, {"return_lse": True}):
        options = {**options, "query_offset": None}
        x = draw(1, 2, 6, 8)
        before = len(counted)
        for _ in range(3):
            attention(x, x + 1, x, **options)
        assert len(counted) == before + 1, options
        other = draw(1, 2, 6, 8)
        got = attention(other, other, other, **{**options, "return_lse": False})
        given = {n: o for n, o in options.items() if n == "scale"}
        if "mask" in options:
            given["mask"] = np.tril(np.ones((6, 6), bool))
        np.testing.assert_allclose(got, judge(other, other, other, **given), atol=1e-5)
    # A sequence of lengths, of which each call has its own, is read every time.
    before = len(counted)
    for length in (3, 4, 3):
        attention(q, k, v, kv_lengths=length)
    assert len(counted) == before + 3


def test_what_is_remembered_is_told_apart() -> None:
    """After a call that may be remembered, calls that look much like it."""
    x = draw(1, 2, 6, 8)
    attention(x, x, x, scale=1.0)
    with pytest.raises(TypeError, match="`scale` must be a host number"):
        attention(x, x, x, scale=True)
    with pytest.raises(TypeError, match="`scale` must be a host number"):
        attention(x, x, x, scale=np.ones(1))
    attention(x, x, x)
    with pytest.raises(TypeError, match="must share one dtype"):
        attention(x, x.double(), x)
    with pytest.raises(TypeError, match="`key` must be an array of torch"):
        attention(x, x.numpy(), x)
    with pytest.raises(ValueError, match="`value` must agree on Tk"):
        attention(x, x, x[:, :, :3])
    for _ in range(2):
        with pytest.raises(ValueError, match="`query_offset` must be given"):
            attention(x[:, :, :5], x, x, mask=masks.causal())
        with pytest.raises(ValueError, match="`layout` must be one of"):
            attention(x, x, x, layout=["BHTD"])
    leaf = x.clone().requires_grad_()
    assert attention(leaf, x, x).requires_grad
    with torch.no_grad():
        assert not attention(leaf, x, x).requires_grad
    one, flag = attn_core.mask(lambda b, h, q, k: q // 2 == k), masks.causal()
    assert not torch.equal(attention(x, x, x, mask=one), attention(x, x, x, mask=flag))


# --- Autocast. ------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts the casts to bfloat16, and notes every dtype that is multiplied in a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.casts, self.multiplied = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.casts += "_to_copy" in str(func) and kwargs.get("dtype") == torch.bfloat16
        if "mm" in str(func):
            self.multiplied.add(args[0].dtype)
        return func(*args, **kwargs)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_rounds_the_inputs_and_nothing_else(impl: str) -> None:
    bias, sinks = draw(HQ, TQ, TK)[None], draw(HQ)
    options = {"bias": bias, "sinks": sinks, "score": scores.softcap(2.0), "return_lse": True}
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as seen:
        got = attention(q, k, v, **options, impl=impl)
    if impl == "reference":
        # The other is one opaque operator to whoever watches.
        assert seen.casts == 4, "query, key and value once each, and out"
        assert seen.multiplied == {torch.float32}
    rounded = [x.bfloat16().double().numpy() for x in (q, k, v)]
    want = reference.attention(
        *rounded,
        bias=bias.numpy(),
        sinks=sinks.numpy(),
        score=lambda s, b, h, q, k: 2 * np.tanh(s / 2),
    )
    assert got.lse.dtype == torch.float32
    np.testing.assert_allclose(got.lse.numpy(), want.lse, rtol=0, atol=2e-6)
    assert got.out.dtype == torch.bfloat16
    # One rounding of out: half a unit in the last of bfloat16's 8 bits.
    np.testing.assert_allclose(got.out.double().numpy(), want.out, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_torchs_own(dtype: Any) -> None:
    x = draw(B, HQ, TQ, D, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, own = attention(x, x, x), torchs_own(x, x, x)
    assert got.dtype == own.dtype
    atol = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(got, own, rtol=0, atol=atol)
    if dtype == torch.float64:
        assert torch.equal(got, attention(x, x, x))


def test_autocast_of_mixed_dtypes_and_gradients() -> None:
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(leaf, k.bfloat16(), v.half())
        with pytest.raises(TypeError, match="share one dtype"):
            attention(q, k.double(), v)
        with torch.autocast("cpu", enabled=False):
            assert attention(q, k, v).dtype == torch.float32
    out.float().square().sum().backward()
    assert leaf.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="share one dtype"):
        attention(q, k.bfloat16(), v)


def test_autocast_of_another_device_is_not_ours() -> None:
    with torch.autocast(
        "meta" if torch.amp.is_autocast_available("meta") else "xpu", enabled=False
    ):
        assert attention(q, k, v).dtype == torch.float32


# --- Precision. -----------------------------------------------------------------------------------


@pytest.fixture
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_highest_is_refused_naming_the_switch(medium: None) -> None:
    for impl in ("auto", "reference"):
        with pytest.raises(UnsupportedError, match=r"set_float32_matmul_precision.*'medium'"):
            attention(q, k, v, precision="highest", impl=impl)
    for precision in ("fast", None):
        assert attention(q, k, v, precision=precision).shape == (B, HQ, TQ, DV)
    assert attention(q.double(), k.double(), v.double(), precision="highest") is not None


def test_highest_asks_at_every_call() -> None:
    """A plan that was found before the switch was turned must not outlive it."""
    call = lambda: attention(q, k, v, precision="highest", scale=0.125)  # noqa: E731
    before = call()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UnsupportedError, match="'high'"):
            call()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(call(), before)


# --- Dropout, to the bit. -------------------------------------------------------------------------

SEEDS = {
    "int": (12345, 12345),
    "negative int": (-7, -7),
    "beyond 32 bits": (2**40 + 7, 2**40 + 7),
    "beyond 64 bits": (2**64 + 1, 1),
    "NumPy uint64": (np.uint64(2**63 + 9), 2**63 + 9),
    "int64 tensor": (torch.tensor(2**40 + 7), 2**40 + 7),
    "negative int64 tensor": (torch.tensor(-7), -7),
    "negative int32 tensor": (torch.tensor(-7, dtype=torch.int32), -7),
    "negative int8 tensor": (torch.tensor(-7, dtype=torch.int8), -7),
    "uint8 tensor": (torch.tensor(250, dtype=torch.uint8), 250),
    "uint32 tensor": (torch.tensor(2**32 - 5, dtype=torch.uint32), 2**32 - 5),
    "uint64 tensor": (torch.tensor(2**64 - 5, dtype=torch.uint64), -5),
    "pair": ((7, 2**31), 7 + 2**63),
    "uint32 pair tensor": (
        torch.tensor([7, 2**32 - 1], dtype=torch.uint32),
        7 + (2**32 - 1) * 2**32,
    ),
    "uint32 pair array": (np.array([7, 2**31], np.uint32), 7 + 2**63),
}


def kept(**options: Any) -> np.ndarray:
    """The keep mask (B, Hq, Tq, Tk), read off out: equal weights over the rows of a unit matrix."""
    eye = torch.eye(TK).expand(B, HQ, TK, TK)
    out = attention(torch.zeros(B, HQ, TQ, D), torch.zeros(B, HQ, TK, D), eye, **options)
    rate, found = options["dropout"].rate, out.numpy()
    np.testing.assert_allclose(found[found != 0], 1 / TK / (1 - rate), rtol=1e-6)
    return found != 0


def positions(offset: Any) -> np.ndarray:
    return np.arange(TQ) + np.broadcast_to(offset, B)[:, None]


@pytest.mark.parametrize("name", SEEDS)
def test_dropout_bits_are_numpys(name: str) -> None:
    seed, number = SEEDS[name]
    for rate in (0.5, 0.1):
        got = kept(dropout=Dropout(rate, seed))
        words = (number % 2**64 % 2**32, number % 2**64 // 2**32)
        threshold = round(rate * 2**32)
        want = host_philox.keep(threshold, words, B, HQ, positions(0), TK)
        np.testing.assert_array_equal(got, want)
        judged = reference.keep(rate, number, range(B), range(HQ), positions(0), range(TK))
        np.testing.assert_array_equal(got, judged)
        assert 0 < got.mean() < 1


@pytest.mark.parametrize("offset", [-3, -FAR, FAR, [5, -1], [FAR, -FAR]], ids=str)
def test_dropout_bits_follow_the_absolute_position(offset: Any) -> None:
    want = reference.keep(0.4, 99, range(B), range(HQ), positions(offset), range(TK))
    assert 0 < want.mean() < 1
    for given in (offset, torch.as_tensor(offset), np.asarray(offset, np.int32)):
        got = kept(dropout=Dropout(0.4, 99), query_offset=given)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("factor", [0xD2511F53, 0xCD9E8D57])
def test_products_of_words_are_exact(factor: int) -> None:
    ends = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1]
    x = [*ends, *RNG.integers(0, 2**32, 10000).tolist()]
    high, low = product(torch.tensor(x), factor)
    assert high.tolist() == [a * factor >> 32 for a in x]
    assert low.tolist() == [a * factor & 0xFFFFFFFF for a in x]


@pytest.mark.parametrize("rate", [1e-12, 2**-32, 0.75, 1 - 2**-33])
def test_dropout_thresholds(rate: float) -> None:
    got = kept(dropout=Dropout(rate, 3))
    want = reference.keep(rate, 3, range(B), range(HQ), positions(0), range(TK))
    np.testing.assert_array_equal(got, want)


# --- NumPy in, NumPy out. -------------------------------------------------------------------------

HOST = [x.numpy() for x in (q, k, v)]


@pytest.fixture
def through_torch() -> Iterator[None]:
    with attn_core.use(backend="torch"):
        yield


def backwards(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]


def locked(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def field(x: np.ndarray) -> np.ndarray:
    """A field of records: strides that are no multiple of an entry."""
    record = np.zeros(x.shape, [("tag", "u1"), ("x", x.dtype)])
    record["x"] = x
    return record["x"]


LAID_OUT = {
    "read-only": locked,
    "negative strides": backwards,
    "Fortran": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "field": field,
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only and backwards": lambda x: np.broadcast_to(backwards(x), x.shape),
}


@pytest.mark.parametrize("how", LAID_OUT)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numpy_in_numpy_out(how: str, dtype: str, through_torch: None) -> None:
    if dtype == "bfloat16" and how in ("other byte order", "field"):
        pytest.skip("NumPy itself cannot: ml_dtypes' bfloat16 has one byte order and no records")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    plain = [x.astype(kind) for x in HOST]
    laid = [LAID_OUT[how](x) for x in plain]
    before = [x.copy() for x in laid]
    got = attention(*laid, mask=masks.causal(), query_offset="end", return_lse=True)
    assert type(got.out) is np.ndarray
    assert got.out.dtype == np.dtype(kind)
    assert got.lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    want = attention(*plain, mask=masks.causal(), query_offset="end")
    np.testing.assert_array_equal(got.out.astype("f8"), want.astype("f8"))
    exact = reference.attention(*plain, mask=np.tri(TQ, TK, TK - TQ, dtype=bool)).out
    rtol = {"float64": 1e-12, "float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(got.out.astype("f8"), exact, rtol=rtol, atol=rtol)
    for x, y in zip(laid, before, strict=True):
        assert not np.shares_memory(got.out, x)
        np.testing.assert_array_equal(x, y)
    got.out[...] = 0  # what comes back is the caller's


def test_every_operand_may_be_laid_out_oddly(through_torch: None) -> None:
    allowed = RNG.random((TQ, TK)) < 0.6
    bias, sinks = HOST[0][..., :TK], HOST[0][0, :, 0, 0]
    ids, slopes, lengths = np.array([0, 0, 1, 1, 1, 2, 2]), np.abs(sinks) + 0.1, np.array([7, 4])

    def call(laid: Any) -> Any:
        mask = masks.segments(laid(ids)) | masks.dense(laid(allowed))
        options = {"bias": laid(bias), "sinks": laid(sinks), "kv_lengths": laid(lengths)}
        score, drop = scores.alibi(laid(slopes)), Dropout(0.2, 3)
        return attention(*HOST, mask=mask, score=score, query_offset=1, dropout=drop, **options)

    want = call(lambda x: x)
    for laid in (
        locked,
        field,
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
        lambda x: x.astype(x.dtype.newbyteorder(">")),
    ):
        np.testing.assert_array_equal(call(laid), want)


def test_zero_rank_bfloat16_there_and_back() -> None:
    x = np.array(1.5, ml_dtypes.bfloat16)
    tensor = from_numpy(x)
    assert (tensor.shape, tensor.dtype, tensor.item()) == ((), torch.bfloat16, 1.5)
    assert to_numpy(tensor) == x
    assert to_numpy(tensor).dtype == x.dtype


def test_framework_arrays_stay_and_are_not_mixed() -> None:
    with attn_core.use(backend="numpy"):
        assert isinstance(attention(q, k, v), torch.Tensor)
    with attn_core.use(backend="torch"):
        for given in ((q, HOST[1], v), (HOST[0], k, HOST[2])):
            with pytest.raises(TypeError, match="frameworks are not mixed"):
                attention(*given)
        with pytest.raises(TypeError, match="`bias`"):
            attention(q, k, v, bias=HOST[0][..., :TK])
        with pytest.raises(TypeError, match="`bias`"):
            attention(*HOST, bias=q[..., :TK])


def test_host_operands_beside_tensors() -> None:
    """Masks, ids, tables, lengths and offsets may be NumPy; they answer as the tensors would."""
    allowed, ids = RNG.random((B, 1, TQ, TK)) < 0.7, RNG.integers(0, 2, (B, TK))
    slopes = RNG.random(HQ).astype(np.float32)

    def call(kind: Any) -> Any:
        mask = masks.dense(kind(allowed)) & masks.segments(kind(ids))
        at, n = kind(np.array([1, -1])), kind(np.array([7, 3]))
        score = scores.alibi(kind(slopes))
        return attention(leaf, k, v, mask=mask, score=score, query_offset=at, kv_lengths=n)

    leaf = q.clone().requires_grad_()
    found = []
    for kind in (torch.as_tensor, lambda x: x, lambda x: x.astype(x.dtype.newbyteorder(">"))):
        out = call(kind)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- Strides, gradients, kinds of tensors, devices. -----------------------------------------------


def spread(x: torch.Tensor) -> torch.Tensor:
    return x[:1, :1].expand(x.shape)


STRIDED = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last axis first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "expanded": spread,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "packed": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("how", STRIDED)
def test_strides_make_no_difference(how: str) -> None:
    leaves = [STRIDED[how](x).detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in leaves]
    assert how in ("offset",) or any(
        x.stride() != y.stride() for x, y in zip(leaves, plain, strict=True)
    )
    found = []
    for given in (leaves, plain):
        out = attention(*given, mask=masks.causal(), query_offset="end", score=scores.softcap(3.0))
        assert out.is_contiguous()
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_gradient_bookkeeping() -> None:
    leaf = q.clone().requires_grad_()
    assert attention(leaf, k, v).requires_grad
    assert not attention(leaf.detach(), k, v).requires_grad
    with torch.no_grad():
        assert not attention(leaf, k, v).requires_grad
    with torch.inference_mode():
        assert attention(leaf, k, v).is_inference()
    slopes = torch.rand(HQ, requires_grad=True)
    for options in (
        {"score": scores.alibi(slopes), "query_offset": 0},
        {"bias": torch.zeros(TQ, 1, requires_grad=True)},
        {"sinks": torch.zeros(HQ, requires_grad=True)},
    ):
        assert attention(q, k, v, **options).requires_grad, options
    with attn_core.use(backend="torch"):
        assert isinstance(attention(*HOST, return_lse=True).lse, np.ndarray)


def test_inference_tensors_are_taken_outside() -> None:
    with torch.inference_mode():
        made = [x.clone() for x in (q, k, v)]
    assert torch.equal(attention(*made), attention(q, k, v))


class Tagged(torch.Tensor):
    pass


def test_parameters_and_subclasses() -> None:
    assert type(attention(torch.nn.Parameter(q), k, v)) is torch.Tensor
    out = attention(q.as_subclass(Tagged), k, v, mask=masks.causal(), query_offset=0)
    assert type(out) is Tagged
    want = attention(q, k, v, mask=masks.causal(), query_offset=0)
    assert torch.equal(out.as_subclass(torch.Tensor), want)


@pytest.mark.parametrize("name", ["key", "value", "bias", "sinks", "kv_lengths", "mask", "score"])
def test_mixed_devices_are_one_clear_error(name: str) -> None:
    given = {
        "query": q,
        "key": k,
        "value": v,
        "bias": q[..., :TK],
        "sinks": q[0, :, 0, 0],
        "kv_lengths": torch.tensor([7, 3]),
    }
    away = dict(given)
    if name == "mask":
        away["mask"] = masks.segments(torch.zeros(TK, dtype=torch.int32, device="meta"))
    elif name == "score":
        away["score"] = scores.alibi(torch.zeros(HQ, device="meta"))
    else:
        away[name] = given[name].to("meta")
    assert attention(**given, query_offset=0) is not None
    with pytest.raises(ValueError, match=f"`{name}` must be on the device of query, cpu. Got meta"):
        attention(**away, query_offset=0)


def test_shapes_are_inferred_on_the_meta_device() -> None:
    got = attention(
        *[x.to("meta") for x in (q, k, v)],
        mask=masks.causal() & masks.segments([0, 0, 1, 1, 1, 2, 2]),
        query_offset="end",
        dropout=Dropout(0.3, 4),
        kv_lengths=[7, 3],
        return_lse=True,
        return_weights=True,
    )
    assert [x.device.type for x in got] == ["meta"] * 3
    assert [tuple(x.shape) for x in got] == [(B, HQ, TQ, DV), (B, HQ, TQ), (B, HQ, TQ, TK)]


# --- The documents' function. ---------------------------------------------------------------------


def formula(q: Any, k: Any, v: Any, mask: Any = None, scale: Any = None) -> np.ndarray:
    """softmax(scale * q kᵀ + mask) v in float64; rows that may see nothing give 0."""
    q, k, v = [np.asarray(x, np.float64) for x in (q, k, v)]
    s = (1 / np.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    if mask is not None:
        mask = np.asarray(mask)
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask
    m = s.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(np.isfinite(m), m, 0))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total) @ v


LEADS = [(), (1,), (3,), (2, 4), (2, 3, 2), (0,), (2, 0, 3)]


@pytest.mark.parametrize("scale", [None, 1.0, -0.3])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_documents_function(lead: tuple[int, ...], scale: Any) -> None:
    x = draw(*lead, TQ, D), draw(*lead, TK, D), draw(*lead, TK, DV)
    full = (*lead, TQ, TK)
    shapes = {(), (TK,), (1, TK), (TQ, 1), (TQ, TK), full, (1,) * len(full)}
    shapes |= {full[i:] for i in range(len(full))} | {(*lead[:-1], *(1,) * (len(lead) > 0), TQ, TK)}
    for shape in sorted(shapes):
        selects = torch.as_tensor(RNG.random(shape) < 0.6)
        if selects.dim() > 1:
            selects[..., :1, :] = False
        for mask in (draw(*shape), selects, selects.numpy(), draw(*shape).double().numpy()):
            if isinstance(mask, np.ndarray) and mask.dtype == np.float64:
                mask = mask.astype(np.float32)
            got = scaled_dot_product_attention(*x, mask, scale=scale)
            assert got.shape == (*lead, TQ, DV)
            np.testing.assert_allclose(got, formula(*x, mask, scale), rtol=1e-4, atol=1e-5)
    got = scaled_dot_product_attention(*x, scale=scale)
    np.testing.assert_allclose(got, formula(*x, None, scale), rtol=1e-4, atol=1e-5)


def listing(q: Any, k: Any, v: Any, mask: Any, softmax: Any) -> Any:
    return softmax(q @ k.transpose(-1, -2) + mask) @ v


def written_out(s: Any) -> Any:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 4)], ids=str)
def test_scale_one_is_the_listing(lead: tuple[int, ...], dtype: Any) -> None:
    """To the bit where softmax is written out; torch.softmax itself rounds by a few units else.

    Its vectorised exp and division differ from torch.exp and `/` in the last place, and a matrix
    product without leading axes takes another kernel: 3 units of the largest entry were the most
    that was found, 8 are allowed.
    """
    for rows, keys, width in ((64, 64, 64), (197, 100, 32)):
        x = [draw(*lead, n, m, dtype=dtype) for n, m in ((rows, width), (keys, width), (keys, 6))]
        mask = draw(rows, keys, dtype=dtype)
        with attn_core.use(impl="reference"):
            got = scaled_dot_product_attention(*x, mask, scale=1.0)
        if lead:
            assert torch.equal(got, listing(*x, mask, written_out))
        want = listing(*x, mask, lambda s: torch.softmax(s, -1))
        units = (got - want).abs().max() / (torch.finfo(dtype).eps * want.abs().max())
        assert units <= 8
        assert not torch.allclose(got, scaled_dot_product_attention(*x, mask), atol=1e-3)


def test_documents_pytorch_form() -> None:
    """`mask == 0` is hidden: masked_fill(mask == 0, -inf) in the listing, `mask != 0` here."""
    x = draw(B, HQ, TQ, D), draw(B, HQ, TK, D), draw(B, HQ, TK, DV)
    mask = torch.as_tensor(RNG.integers(0, 3, (B, 1, TQ, TK)))
    mask[..., 0] = 1
    s = (x[0] @ x[1].transpose(-1, -2) / D**0.5).masked_fill(mask == 0, -torch.inf)
    got = scaled_dot_product_attention(*x, mask != 0)
    torch.testing.assert_close(got, torch.softmax(s, -1) @ x[2], rtol=0, atol=2e-6)
    kept = reference.keep(0.3, 5, range(B), range(HQ), np.arange(TQ)[None].repeat(B, 0), range(TK))
    dropped = torch.softmax(s, -1) * torch.as_tensor(kept) / 0.7
    got = scaled_dot_product_attention(*x, mask != 0, 0.3, seed=5)
    torch.testing.assert_close(got, dropped @ x[2], rtol=0, atol=2e-6)


def test_documents_function_differentiates_its_mask() -> None:
    x = [draw(3, n, m, dtype=torch.float64) for n, m in ((TQ, 3), (TK, 3), (TK, 2))]
    for shape in ((TK,), (TQ, 1), (3, 1, TK)):
        given = [y.requires_grad_() for y in (*x, draw(*shape, dtype=torch.float64))]
        assert torch.autograd.gradcheck(scaled_dot_product_attention, given, fast_mode=True)


def test_documents_function_takes_numpy() -> None:
    x = [RNG.standard_normal((2, n, m)) for n, m in ((TQ, D), (TK, D), (TK, DV))]
    mask = (RNG.random((TQ, TK)) < 0.6)[::-1]
    with attn_core.use(backend="numpy"):
        got = scaled_dot_product_attention(*[backwards(y) for y in x], mask)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, formula(*x, mask), rtol=1e-12, atol=1e-12)
    tensors = [torch.as_tensor(y) for y in x]
    assert torch.equal(scaled_dot_product_attention(*tensors, mask), torch.as_tensor(got))


Z = torch.zeros
REFUSED = {
    "mask too small": (
        ValueError,
        r"`mask` must broadcast to.*\(3, 5, 7\). Got \(3, 7\)",
        {"mask": Z(3, 7)},
    ),
    "mask of higher rank": (ValueError, "`mask` must broadcast", {"mask": Z(1, 3, 5, 7)}),
    "integer mask": (TypeError, "`mask` must be boolean.*`mask != 0`", {"mask": Z(5, 7).int()}),
    "wide mask": (TypeError, "`mask` must not be wider", {"mask": Z(5, 7).double()}),
    "rank 1": (ValueError, "`q` must have rank 2 or more", {"q": Z(8)}),
    "leading": (ValueError, r"`k` must have the leading dimensions of `q`, \(3,\)", {"k": Z(7, 8)}),
    "leading of v": (ValueError, "`v` must have the leading dimensions", {"v": Z(1, 7, 6)}),
    "list": (TypeError, "`k` must be a tensor", {"k": [[1.0]]}),
    "mixed": (TypeError, "`v` must be a tensor", {"v": np.zeros((3, 7, 6), np.float32)}),
    "width": (ValueError, "agree on D", {"k": Z(3, 7, 9)}),
    "no seed": (TypeError, "`seed` must be given", {"dropout_rate": 0.1}),
    "rate": (ValueError, "`rate` must be", {"dropout_rate": 1.0, "seed": 1}),
    "negative rate": (ValueError, "`rate` must be", {"dropout_rate": -0.1, "seed": 1}),
    "scale": (TypeError, "`scale` must be a host number", {"scale": Z(())}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_documents_function_refuses(name: str) -> None:
    error, words, change = REFUSED[name]
    given = {"q": Z(3, 5, 8), "k": Z(3, 7, 8), "v": Z(3, 7, 6)}
    scaled_dot_product_attention(**given)
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(**(given | change))
