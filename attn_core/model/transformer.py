"""TransformerConfig: everything static about a Transformer, in numbers and words.

A *stack* is an encoder or a decoder: embedding and positions, `depth` blocks, a norm. A block is
self-attention, in the decoder of an encoder-decoder then attention to the encoder's output, then a
feed-forward; each is a sublayer f around which x flows on::

    x = x + drop(f(norm(x)))              norm_first=True
    x = norm(x + drop(f(x)))              norm_first=False, as published
    f(x) is norm(f(x))                    norm_out=True, with either

    feed-forward: activation(x W1 + b1) W2 + b2
    gated_hidden: (activation(x Wg + bg) * (x W1 + b1)) W2 + b2          arXiv 2002.05202

    encoder           x = stack(tokens or vectors)             -> x, or with `classes` their logits
    decoder           x = stack(tokens), causal                -> logits over `vocabulary`
    encoder-decoder   both, the decoder sees the encoder       -> logits over `vocabulary`

Source: Vaswani et al., arXiv 1706.03762; norms before the sublayers, Xiong et al., 2002.04745; on
both sides of them, and capped logits, Gemma 2, 2408.00118; types of tokens, BERT, 1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from attn_core.config import check_impl
from attn_core.model import fields
from attn_core.model.config import ROOMS, ROTARY, AttentionConfig, Config
from attn_core.spec import DTYPES

KINDS = ("encoder", "decoder", "encoder-decoder")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class TransformerConfig(Config):
    """A Transformer; the module's docstring has the formula.

    Attributes:
        kind: "encoder", "decoder" or "encoder-decoder".
        width: of the residual stream.
        depth: blocks of each stack.
        heads, kv_heads, head_width: as in AttentionConfig.
        vocabulary: how many tokens there are; of a decoder also those that it predicts.
        source_vocabulary: of the encoder in an encoder-decoder; `vocabulary` where left out. The
            stacks have tables of their own in any case.
        inputs: instead of tokens the encoder reads float vectors of this width.
        classes: an encoder's head: logits of classes from the mean of the rows that `lengths`
            counts, of all rows where it is left out. A mask hides keys, and no row from the mean.
        hidden: width within the feed-forward; 4 * width where left out.
        activation: "relu", "gelu" (x * Phi(x), by erf), "gelu_tanh" or "silu".
        gated_hidden: a second projection gates the first.
        encoder_depth, decoder_depth: blocks of one stack; `depth` where left out.
        norm: "layer" or "rms" (no mean, no bias).
        norm_first: norms stand before the sublayers, else after the sums.
        norm_out: a norm also on what each sublayer gives, before it is added.
        norm_embedding: a norm on the embeddings' sum, before dropout.
        norm_epsilon: of every norm.
        final_norm: a norm ends each stack; as norm_first where left out.
        bias: of projections, feed-forward, norms and head.
        positions: "sinusoidal" and "learned" are added to the embedding; "rotary" and "alibi" act
            in self-attention; None ("none" in a file).
        rotary_base, rotary_fraction, rotary_pairs: as in AttentionConfig.
        max_length: rows of the table of learned positions.
        token_types: in an encoder of tokens, how many types of them there are (BERT's segments),
            each with a row that is added to the embedding; a call says which, 0 where it does not.
        scale_embedding: multiply token embeddings by sqrt(width), as published; left out where no
            stack reads tokens.
        tie_embeddings: the head is the decoder's table of embeddings, transposed, without a bias.
        dropout: rate on the embeddings' sum and on each sublayer's output, in training.
        attention_dropout: rate on the attention weights; `dropout` where left out.
        qk_norm, gate, softcap, scale: as in AttentionConfig, of every attention.
        window: neighbours before a position that self-attention sees; in an encoder as many after.
        window_blocks: numbers of the blocks to which the window belongs; all where left out.
        logit_softcap: c * tanh(logits / c), of the head.
        dtype, backend, impl: as in AttentionConfig.

    Raises:
        TypeError, ValueError: a field is not what it must be.
    """

    TABLE: ClassVar[str] = "transformer"
    WORDS: ClassVar[tuple[str, ...]] = ("positions",)

    kind: str
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    vocabulary: int | None = None
    source_vocabulary: int | None = None
    inputs: int | None = None
    classes: int | None = None
    hidden: int | None = None
    activation: str = "relu"
    gated_hidden: bool = False
    encoder_depth: int | None = None
    decoder_depth: int | None = None
    norm: str = "layer"
    norm_first: bool = True
    norm_out: bool = False
    norm_embedding: bool = False
    norm_epsilon: float = 1e-6
    final_norm: bool | None = None
    bias: bool = True
    positions: str | None = "sinusoidal"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_pairs: str = "half"
    max_length: int | None = None
    token_types: int | None = None
    scale_embedding: bool = True
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention_dropout: float | None = None
    qk_norm: str | None = None
    gate: bool = False
    softcap: float | None = None
    scale: float | None = None
    window: int | None = None
    window_blocks: tuple[int, ...] | None = None
    logit_softcap: float | None = None
    dtype: str = "float32"
    backend: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        self.plain()
        fields.choice("kind", self.kind, KINDS)
        for name in ("width", "depth"):
            fields.count(name, getattr(self, name))
        for name in ("vocabulary", "source_vocabulary", "inputs", "classes", "hidden"):
            if getattr(self, name) is not None:
                fields.count(name, getattr(self, name))
        for name in ("encoder_depth", "decoder_depth", "max_length", "token_types"):
            if getattr(self, name) is not None:
                fields.count(name, getattr(self, name))
        for name in ("gated_hidden", "norm_first", "norm_out", "norm_embedding"):
            fields.flag(name, getattr(self, name))
        for name in ("bias", "scale_embedding", "tie_embeddings"):
            fields.flag(name, getattr(self, name))
        if self.final_norm is not None:
            fields.flag("final_norm", self.final_norm)
        fields.choice("activation", self.activation, ACTIVATIONS)
        fields.choice("norm", self.norm, ("layer", "rms"))
        fields.number("norm_epsilon", self.norm_epsilon, 0.0)
        known = ("sinusoidal", "learned", "rotary", "alibi", None)
        fields.choice("positions", self.positions, known)
        fields.rate("dropout", self.dropout)
        if self.attention_dropout is not None:
            fields.rate("attention_dropout", self.attention_dropout)
        if self.logit_softcap is not None:
            fields.number("logit_softcap", self.logit_softcap, 0.0)
        fields.choice("dtype", self.dtype, DTYPES)
        if self.backend is not None:
            fields.choice("backend", self.backend, ROOMS)
        check_impl(self.impl)
        self._check_reading()
        self._check_places()
        self._check_window()
        for stack in self.stacks:
            self.attention(stack)  # AttentionConfig checks the rest

    def _check_reading(self) -> None:
        """What the stacks read, and what comes out, must be stated once."""
        decodes, encodes = self.kind != "encoder", self.kind != "decoder"
        if decodes and self.vocabulary is None:
            raise ValueError(f"`vocabulary` must be given in a model of kind {self.kind!r}.")
        if not decodes and (self.vocabulary is None) == (self.inputs is None):
            raise ValueError(
                "one of `vocabulary` and `inputs` must be given in an encoder. "
                f"Got {self.vocabulary} and {self.inputs}."
            )
        if self.inputs is not None and self.source_vocabulary is not None:
            raise ValueError("one of `source_vocabulary` and `inputs` must be given. Got both.")
        stray = {
            "inputs": not encodes and self.inputs is not None,
            "source_vocabulary": self.kind != "encoder-decoder"
            and self.source_vocabulary is not None,
            "classes": decodes and self.classes is not None,
            "tie_embeddings": not decodes and self.tie_embeddings,
            "token_types": decodes and self.token_types is not None,
            "encoder_depth": not encodes and self.encoder_depth is not None,
            "decoder_depth": not decodes and self.decoder_depth is not None,
        }
        for name, wrong in stray.items():
            if wrong:
                raise ValueError(
                    f"`{name}` must be left out in a model of kind {self.kind!r}. "
                    f"Got {getattr(self, name)!r}."
                )
        if self.inputs is not None and not decodes and not self.scale_embedding:
            raise ValueError(
                "`scale_embedding` must be left out where `inputs` takes the place of tokens: "
                f"there is no embedding. Got False and inputs={self.inputs}."
            )

    def _check_places(self) -> None:
        if self.positions != "rotary":
            fields.unread(self, ROTARY, "positions", "rotary")
        if (self.positions == "learned") != (self.max_length is not None):
            raise ValueError(
                '`max_length` must be given with positions="learned", whose table has so many '
                f"rows, and left out otherwise. Got {self.max_length} and {self.positions!r}."
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(
                '`width` must be even with positions="sinusoidal", whose channels come in pairs '
                f"of sine and cosine. Got {self.width}."
            )

        if self.token_types is not None and self.inputs is not None:
            raise ValueError(
                "`token_types` must be left out where an encoder reads vectors. "
                f"Got {self.token_types}."
            )
        if self.logit_softcap is not None and self.kind == "encoder" and self.classes is None:
            raise ValueError(
                "`logit_softcap` must be left out in an encoder without `classes`, which gives no "
                f"logits. Got {self.logit_softcap}."
            )

    def _check_window(self) -> None:
        if self.window is not None:
            fields.count("window", self.window, 0)
        if self.window_blocks is None:
            return
        if self.window is None:
            raise ValueError(
                "`window_blocks` must be left out without a `window`. "
                f"Got {list(self.window_blocks)}."
            )
        deepest = max(self.blocks(stack) for stack in self.stacks)
        fields.numbers("window_blocks", self.window_blocks, deepest)
        if not self.window_blocks:
            raise ValueError(
                "`window_blocks` must name a block, or `window` be left out, which none would "
                f"read. Got [] and window={self.window}."
            )
        self.set("window_blocks", tuple(self.window_blocks))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of the model, in the order in which they are computed."""
        return tuple([name for name in ("encoder", "decoder") if name in self.kind.split("-")])

    def blocks(self, stack: str) -> int:
        """How many blocks a stack has."""
        own = self.encoder_depth if stack == "encoder" else self.decoder_depth
        return own or self.depth

    def crosses(self, stack: str) -> bool:
        """Whether a stack's blocks attend to the encoder's output."""
        return stack == "decoder" and self.kind == "encoder-decoder"

    def tokens(self, stack: str) -> int | None:
        """How many tokens a stack reads; None where it reads vectors."""
        if stack == "encoder" and self.inputs is not None:
            return None
        return (stack == "encoder" and self.source_vocabulary) or self.vocabulary

    @property
    def hidden_width(self) -> int:
        """Width within the feed-forward."""
        return self.hidden or 4 * self.width

    @property
    def ends_in_norm(self) -> bool:
        """Whether a norm ends each stack."""
        return self.norm_first if self.final_norm is None else self.final_norm

    def windowed(self, number: int) -> bool:
        """Whether the window belongs to the block of that number."""
        return self.window_blocks is None or number in self.window_blocks

    def meaning(self) -> dict[str, Any]:
        """`to_mapping` with what was left open filled in, without what nothing reads."""
        sizes = self.attention(self.stacks[0]).sizes
        found = {
            **self.to_mapping(),
            "kv_heads": sizes.kv_heads,
            "head_width": sizes.head,
            "hidden": self.hidden_width,
            "final_norm": self.ends_in_norm,
            "scale": sizes.head**-0.5 if self.scale is None else self.scale,
        }
        if self.window is not None:
            deepest = max(self.blocks(stack) for stack in self.stacks)
            found["window_blocks"] = [n for n in range(deepest) if self.windowed(n)]
        for stack in self.stacks:
            found[f"{stack}_depth"] = self.blocks(stack)
        if "encoder" in self.stacks:
            found["source_vocabulary"] = self.tokens("encoder")
        del found["depth"]  # what the stacks have, they say themselves
        return found

    def attention(self, stack: str, cross: bool = False, number: int = 0) -> AttentionConfig:
        """The config of self-attention in a stack's block, or of its attention to the encoder."""
        decodes = stack == "decoder"
        inside = self.positions if self.positions in ("rotary", "alibi") and not cross else None
        read = [
            *(ROTARY if inside == "rotary" else ()),
            *(["norm_epsilon"] if self.qk_norm else ()),
        ]
        window, mask = None if cross or not self.windowed(number) else self.window, None
        if window is not None and not decodes:
            window, mask = None, f"(q - k <= {window}) & (k - q <= {window})"
        return AttentionConfig(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            bias=self.bias,
            out_bias=self.bias,
            qk_norm=self.qk_norm,
            positions=inside,
            gate=self.gate,
            causal=decodes and not cross,
            window=window,
            softcap=self.softcap,
            mask=mask,
            scale=self.scale,
            dropout=self.dropout if self.attention_dropout is None else self.attention_dropout,
            dtype=self.dtype,
            backend=self.backend,
            impl=self.impl,
            **{name: getattr(self, name) for name in read},
        )
