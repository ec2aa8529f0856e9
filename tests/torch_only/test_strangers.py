"""What the suite asks of somebody else's torch function, and weights() on torch tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.attention.bias

import attn_core
from attn_core import masks, scores
from attn_core.backends import torch as backend
from attn_core.conformance import judgement, subject

TABLE = torch.ones(4, 5)


def attend(query, key, value, slopes, scale, keep):
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    far = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    offset = torch.tensor([2, -1])[:, None, None, None]
    s = scale * query @ key.mT - keep(slopes)[:, None, None] * (far + offset).abs()
    return s.softmax(-1) @ value


def verdict(keep):
    @subject("torch")
    def mine(query, key, value, slopes=None, scale=1.0):
        if slopes is None:
            slopes = torch.zeros(query.shape[1])
        return attend(query, key, value, slopes, scale, keep)

    return judgement.judge("pair-alibi-scale", mine, backend, "eager")


def test_the_gradient_of_slopes_is_judged():
    right, cut = verdict(lambda x: x), verdict(lambda x: x.detach())
    assert right.passed, (right.problem, right.shares)
    assert "d_score0" in right.shares
    assert {what for what, used in cut.shares.items() if not used <= 1} == {"d_score0"}


def test_an_output_of_the_wrong_shape_is_told_as_one():
    @subject("torch")
    def folded(query, key, value):
        return query.sum()

    found = judgement.judge("plain", folded, backend, "eager")
    assert found.status == "error"
    assert "out must have shape (2, 4, 5, 6). Got ()." in found.problem


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, b, h, q, k: s * TABLE[0][h],
        lambda s, b, h, q, k: s * TABLE[h, q],
        lambda s, b, h, q, k: s * TABLE[0, q],
        lambda s, b, h, q, k: s * TABLE[h > q],
        lambda s, b, h, q, k: s * TABLE[0],
        lambda s, b, h, q, k: TABLE[0] * s,
        lambda s, b, h, q, k: torch.tanh(s),
    ],
)
def test_a_tensor_in_a_score_is_told_to_be_an_operand(fn):
    with pytest.raises(TypeError, match=r"attn_core\.operand\(array\)"):
        attn_core.score(fn)


def jagged(*lengths):
    rows = [torch.ones(n, 4, 8) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: jagged(3, 5), "nested"),
        (lambda: torch.ones(2, 4, 3, 8).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_tensors_without_one_shape_or_strides_are_refused(make, kind):
    with pytest.raises(TypeError, match=f"must be dense.*{kind}.*masks.segments"):
        attn_core.attention(make(), make(), make())


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_masked_tensors_are_refused(impl):
    query = torch.ones(1, 2, 3, 4)
    hidden = torch.masked.masked_tensor(torch.ones(3, 3), torch.ones(3, 3) > 0)
    with pytest.raises(TypeError, match=r"plain numbers. Got a MaskedTensor: .*get_data\(\)"):
        attn_core.attention(query, query, query, bias=hidden, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_torchs_causal_biases_are_refused(impl):
    """The hint for their rank would have had numbers added that nobody has written."""
    query = torch.ones(2, 2, 3, 4)
    hidden = torch.nn.attention.bias.causal_lower_right(3, 3)
    with pytest.raises(TypeError, match=r"Got a CausalBias: give masks.causal\(\) .* upper left"):
        attn_core.attention(query, query, query, bias=hidden, impl=impl)


def test_a_mask_of_flex_attention_is_told_what_to_write():
    from torch.nn.attention.flex_attention import create_block_mask

    query = torch.ones(1, 1, 128, 4)
    hidden = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
    with pytest.raises(TypeError, match=r"Got BlockMask: write attn_core.mask\(fn\) with"):
        attn_core.attention(query, query, query, mask=hidden)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_tensors_of_several_devices_are_refused(impl, tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        query = distribute_tensor(torch.ones(1, 2, 3, 4), mesh, [Shard(1)])
        with pytest.raises(TypeError, match=r"plain numbers. Got a DTensor: .*to_local\(\)"):
            attn_core.attention(query, query, query, impl=impl)
        local = query.to_local()
        assert attn_core.attention(local, local, local, impl=impl).shape == (1, 2, 3, 4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_foreign_operand_is_named_without_ticks_in_ticks():
    query = torch.ones(1, 2, 3, 4)
    mask = attn_core.Mask(*(lambda m: (m.tree, ("text",)))(masks.segments([0, 0, 1])))
    with pytest.raises(TypeError, match=r"^operand 0 of `mask` must be an array of torch"):
        attn_core.attention(query, query, query, mask=mask)


def test_weights_of_chosen_heads_and_rows():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    query, key = normal(2, 4, 30, 8), normal(2, 2, 40, 8)
    options = {
        "mask": masks.causal(),
        "query_offset": "end",
        "score": scores.alibi(normal(4)),
        "bias": normal(1, 4, 30, 1),
        "kv_lengths": [40, 21],
        "q_lengths": [30, 9],
    }
    every = attn_core.attention(query, key, key, return_weights=True, **options).weights
    found = attn_core.weights(query, key, heads=[3, 0], queries=[29, 4], **options)
    torch.testing.assert_close(found, every[:, [3, 0]][:, :, [29, 4]])


def test_weights_of_chosen_rows_compile_whole():
    query, key = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)

    def asked(query, key):
        return attn_core.weights(query, key, mask=masks.causal(), heads=[3, 0], queries=29)

    compiled = torch.compile(asked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), asked(query, key))


LAYOUTS = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "torch._mkldnn": lambda x: x.to_mkldnn(),
    "a nested one": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mask", "bias", "sinks", "query", "value", "kv_lengths"])
def test_what_is_not_dense_is_refused_by_its_name(name, layout):
    query = torch.ones(2, 2, 5, 8)
    given = {"query": query, "key": query, "value": query, name: LAYOUTS[layout](torch.ones(5, 5))}
    with pytest.raises(TypeError, match=rf"^`{name}` must be dense, .* Got {layout}.*segments"):
        attn_core.attention(**given)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_documents_functions_and_layers_name_it_too(layout):
    x, other = torch.ones(2, 5, 8), LAYOUTS[layout](torch.ones(5, 5))
    layer = attn_core.build({"width": 8, "heads": 2}, backend="torch")
    documents = backend.scaled_dot_product_attention
    calls = {
        "mask": [lambda: documents(x, x, x, other), lambda: layer(x, mask=other)],
        "bias": [lambda: layer(x, bias=other)],
        "q": [lambda: documents(other, x, x)],
        "query": [lambda: layer(other)],
    }
    for name, several in calls.items():
        for call in several:
            with pytest.raises(TypeError, match=rf"^`{name}` must be dense, .* Got {layout}"):
                call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_tensor_is_no_table():
    with pytest.raises(TypeError, match=r"of one shape. Got a nested tensor: .*to_padded_tensor"):
        masks.dense(torch.nested.nested_tensor([torch.ones(3, 3, dtype=torch.bool)] * 2))
