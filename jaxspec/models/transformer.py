"""A decoder-only transformer for the Llama, Qwen2 and Qwen3 families, in Flax linen.

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU. The differences between the families are in ``Config``.
"""

import dataclasses
import functools
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from jaxspec import cache as kv
from jaxspec import mesh
from jaxspec.common.trees import flatten, unflatten
from jaxspec.models.int8 import SUFFIX, UNIFORM_INT8, random_int8, scaled
from jaxspec.models.placement import Placement
from jaxspec.types import Array, Cache, LanguageModel, Params, Split

WEIGHTS = ("float", "int8")
_STEP = 16  # tokens of a block of a decoding step, as opposed to those of a prefill or a training batch


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a transformer.

    Attributes:
        input_tables: rows of each input table; ids run through them in order. The first ids are the head's vocabulary.
        vocab: V, the rows of the output head. A tied head is the first V rows of the first input table.
        width: D of the residual stream.
        layers: number of layers.
        heads: query heads.
        kv_heads: key/value heads, a divisor of ``heads``.
        head_dim: dimensions of a head.
        mlp_width: hidden width of SwiGLU.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3's scaling of them.
        norm_eps: epsilon of RMSNorm.
        qkv_bias: whether the query, key and value projections have a bias (Qwen2).
        qk_norm: whether queries and keys are normalised per head (Qwen3).
        tied: whether head and first input table are one.
        head_bias: whether the head has a bias.
        padding: the last ``padding`` of the V rows are no tokens, so that a mesh divides V; their logits are -inf.
        dtype: of activations and KV cache.
        weights: "float", or "int8": kernels, tables and head are int8 with a scale for each output channel, see ``models.int8``.
        feature_layers: which hidden states are the features for drafts, concatenated to [B T F]: i < layers is the residual
            stream after layer i, ``layers`` is the output of the final norm. () computes none.

    Raises:
        ValueError: heads that kv_heads does not divide, a tied head beyond its table, a feature layer that does not exist, or
            unknown weights.
    """

    input_tables: tuple[int, ...]
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    head_bias: bool = False
    padding: int = 0
    dtype: str = "float32"
    feature_layers: tuple[int, ...] = ()
    weights: str = "float"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"expected heads to be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.tied and self.vocab > self.input_tables[0]:
            raise ValueError(f"expected a tied head within the {self.input_tables[0]} rows of the first table, got {self.vocab}")
        if any(not 0 <= i <= self.layers for i in self.feature_layers):
            raise ValueError(f"expected feature layers from 0 to {self.layers}, got {self.feature_layers}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"expected weights among {', '.join(WEIGHTS)}, got {self.weights!r}: choose one of these")

    @property
    def int8(self) -> bool:
        """Whether the weights are int8."""
        return self.weights == "int8"


def positions(segment: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    """The position of each token in its segment.

    >>> positions(jnp.array([[4, 4, 4, 7, 7]], jnp.int32)).tolist()
    [[0, 1, 2, 0, 1]]
    """
    place = jnp.arange(segment.shape[1], dtype=jnp.int32)[None]
    begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)


def causal(segment: Int32[Array, "B T"]) -> Bool[Array, "B T T"]:
    """What each token of packed sequences sees: itself and those before it in its segment."""
    return jnp.tri(segment.shape[1], dtype=bool)[None] & (segment[:, :, None] == segment[:, None])


def rope_frequencies(config: Config) -> Array:
    """Angular frequency of each pair of a head's dimensions, float32 [head_dim / 2]."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position * frequency / (2 * math.pi)  # within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequency * (smooth + (1 - smooth) / scaling.factor)


def rotate(
    x: Float[Array, "B T H D"], position: Int32[Array, "B T"], frequency: Float32[Array, " half"]
) -> Float[Array, "B T H D"]:
    """Rotary positions in the half-split layout: x [B T H D_head], position int32 [B T]."""
    angle = position[:, :, None, None].astype(jnp.float32) * jnp.expand_dims(frequency, (0, 1, 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _logical(init: nn.initializers.Initializer, *axes: str) -> nn.initializers.Initializer:
    """The initializer with logical axis names on what it makes; inside ``apply`` parameters are plain arrays."""
    return cast(nn.initializers.Initializer, nn.with_logical_partitioning(init, axes))


def _matrix(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, int],
    axes: tuple[str, str],
    channels: int,
    int8: bool,
) -> tuple[Array, Array | None]:
    """A matrix of parameters, and the scales of its channels, which lie along the axis ``channels``, where it is int8."""
    if not int8:
        return module.param(name, _logical(init, *axes), shape, jnp.float32), None
    values = module.param(name, _logical(random_int8, *axes), shape, jnp.int8)
    deviation = shape[1 - channels] ** -0.5  # products have the variance of their inputs
    constant = _logical(nn.initializers.constant(deviation / UNIFORM_INT8), axes[channels])
    return values, module.param(name + SUFFIX, constant, (shape[channels],), jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [... D] -> [... D]."""
        scale = self.param("scale", _logical(nn.initializers.ones, "embed"), (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias); the kernel is [in, out] and carries logical axis names."""

    features: int
    axes: tuple[str, str]
    bias: bool = False
    int8: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [... in] -> [... out]."""
        shape = x.shape[-1], self.features
        kernel, scale = _matrix(self, "kernel", nn.initializers.lecun_normal(), shape, self.axes, 1, self.int8)
        y = x @ kernel.astype(x.dtype)
        y = y if scale is None else scaled(y, scale)
        if self.bias:
            zeros = _logical(nn.initializers.zeros, *self.axes[1:])
            bias = self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)
            y = y + jnp.expand_dims(bias, range(y.ndim - 1))
        return y


class Attention(nn.Module):
    """Causal grouped-query attention over the cache, or over the block itself when there is none (training)."""

    config: Config

    def setup(self) -> None:
        """Declares the projections."""
        c = self.config
        self.query = Linear(c.heads * c.head_dim, ("embed", "heads"), c.qkv_bias, c.int8)
        self.key = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias, c.int8)
        self.value = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias, c.int8)
        self.out = Linear(c.width, ("heads", "embed"), int8=c.int8)
        if c.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)

    def keys_values(self, x: Array, position: Array) -> kv.KVCache:
        """What queries see of some positions: x [B T D], position int32 [B T] -> a block of T cells."""
        k, v = (self._heads(project(x), "kv_heads") for project in (self.key, self.value))
        k = self.key_norm(k) if self.config.qk_norm else k
        return kv.of_block(rotate(k, position, rope_frequencies(self.config)), v)

    def __call__(
        self, x: Array, position: Array, mask: Array, cache: kv.KVCache | None, context: kv.KVCache | None = None
    ) -> tuple[Array, kv.KVCache | None]:
        """x [B T D], position [B T], mask bool [B T S] -> ([B T D], cache).

        Without a cache, the C cells of ``context`` precede those of the block, S = C + T.
        """
        c = self.config
        q, block = self._heads(self.query(x), "heads"), self.keys_values(x, position)
        q = rotate(self.query_norm(q) if c.qk_norm else q, position, rope_frequencies(c))
        if cache is not None:
            cache = kv.write(cache, block, position[:, 0])
            block = cache
        elif context is not None:
            block = kv.join(context, block)
        rows = q.reshape(*q.shape[:2], c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)  # [B H_kv G T D_head]
        weights = self._weights(rows, block.key, mask)
        out = kv.attend(weights.astype(block.value.dtype), block.value).transpose(0, 3, 1, 2, 4).reshape(*q.shape[:2], -1)
        return self.out(out.astype(x.dtype)), cache

    def _heads(self, y: Array, axis: str) -> Array:
        return mesh.constrain(y.reshape(*y.shape[:2], -1, self.config.head_dim), "batch", None, axis)

    def _weights(self, rows: Array, k: Array, mask: Array) -> Array:
        scores = kv.attend(rows, k) / math.sqrt(self.config.head_dim)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        self.sow("intermediates", "attention", weights)
        return weights


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B T D] -> [B T D]."""
        c = self.config
        gate = Linear(c.mlp_width, ("embed", "mlp"), int8=c.int8, name="gate")(x)
        up = Linear(c.mlp_width, ("embed", "mlp"), int8=c.int8, name="up")(x)
        hidden = mesh.constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return Linear(c.width, ("mlp", "embed"), int8=c.int8, name="down")(hidden)


class Layer(nn.Module):
    """Attention and SwiGLU, each on a normalised branch of the residual stream."""

    config: Config

    def setup(self) -> None:
        """Declares the two branches."""
        c = self.config
        self.attention_norm, self.attention = RMSNorm(c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.norm_eps), SwiGLU(c)

    def __call__(
        self, x: Array, position: Array, mask: Array, cache: kv.KVCache | None, context: kv.KVCache | None = None
    ) -> tuple[Array, kv.KVCache | None]:
        """x [B T D] -> ([B T D], cache), see ``Attention``."""
        y, cache = self.attention(self.attention_norm(x), position, mask, cache, context)
        x = mesh.constrain(x + y, "batch", None, "embed")
        return mesh.constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, "embed"), cache

    def keys_values(self, x: Array, position: Array) -> kv.KVCache:
        """The keys and values of vectors [B T D] that are normalised already."""
        return self.attention.keys_values(x, position)


class Transformer(nn.Module):
    """Tokens to logits over the head's vocabulary, and to the features that drafts read."""

    config: Config

    def setup(self) -> None:
        """Declares the input tables, the layers and the head."""
        c = self.config
        self.tables = [self._table(f"table_{i}", rows) for i, rows in enumerate(c.input_tables)]
        self.stack = [Layer(c, name=f"layer_{i}") for i in range(c.layers)]
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.head = self._table("head", c.vocab)
        if c.head_bias:
            zeros = _logical(nn.initializers.zeros, "vocab")
            self.bias = self.param("head_bias", zeros, (c.vocab,), jnp.float32)

    def _table(self, name: str, rows: int) -> tuple[Array, Array | None]:
        """A matrix [rows D], and the scales of its rows."""
        c = self.config
        return _matrix(self, name, nn.initializers.normal(c.width**-0.5), (rows, c.width), ("vocab", "embed"), 0, c.int8)

    def embed(self, tokens: Array) -> Array:
        """int32 [B T] -> [B T D]: each id from the table that holds it."""
        c = self.config
        x, first = self._rows(0, jnp.clip(tokens, 0, c.input_tables[0] - 1)), 0
        for i, rows in enumerate(c.input_tables[:-1]):
            first += rows
            row = jnp.clip(tokens - first, 0, c.input_tables[i + 1] - 1)
            x = jnp.where((tokens >= first)[:, :, None], self._rows(i + 1, row), x)
        return mesh.constrain(x, "batch", None, "embed")

    def _rows(self, i: int, row: Array) -> Array:
        """The rows int32 [B T] of input table i."""
        table, scale = self.tables[i]
        x = table[row] if scale is None else table[row] * scale[row][:, :, None]
        return x.astype(self.config.dtype)

    def logits(self, x: Array) -> Array:
        """The normalised residual stream [B T D] -> float32 [B T V]."""
        c = self.config
        head, scale = self.tables[0] if c.tied else self.head
        head = head[: c.vocab].astype(x.dtype)
        if x.shape[1] <= _STEP:  # head @ x is up to twice as fast on CPU as x @ head.T
            y = jnp.moveaxis(jnp.einsum("vd,btd->vbt", head, x, preferred_element_type=jnp.float32), 0, -1)
        else:
            y = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
        y = mesh.constrain(y if scale is None else scaled(y, scale[: c.vocab]), "batch", None, "vocab")
        y = y + self.bias[None, None] if c.head_bias else y
        return jnp.where(jnp.arange(c.vocab)[None, None] < c.vocab - c.padding, y, -jnp.inf) if c.padding else y

    def __call__(
        self,
        tokens: Array,
        cache: tuple[kv.KVCache, ...] | None = None,
        length: Array | None = None,
        segment: Array | None = None,
    ) -> tuple[Array, Array | None, tuple[kv.KVCache, ...] | None]:
        """Scores a block: tokens int32 [B T] at positions length .. -> (logits float32 [B T V], features [B T F], cache).

        Without a cache the block begins at position 0 and attends to itself only, as in training. There, ``segment`` int32
        [B T] packs several sequences into a row: positions begin anew where it changes, and each sequence attends to itself.
        """
        batch, block = tokens.shape
        length = jnp.zeros(batch, jnp.int32) if length is None else length
        if segment is None:
            position, mask = kv.span(length, block), kv.visible(length, block, block if cache is None else cache[0].cells)
        else:
            position, mask = positions(segment), causal(segment)
        x, hidden, new_cache = self.embed(tokens), [], []
        for i, layer in enumerate(self.stack):
            x, layer_cache = layer(x, position, mask, None if cache is None else cache[i])
            hidden.append(x)
            new_cache.append(layer_cache)
        x = self.norm(x)
        hidden.append(x)
        wanted = [hidden[i] for i in self.config.feature_layers]
        features = jnp.concatenate(wanted, axis=-1) if wanted else None
        return self.logits(x), features, None if cache is None else tuple(new_cache)

    def lower(self, tokens: Array, cache: Cache, length: Array, layers: int) -> tuple[Array, Array, Cache]:
        """The first ``layers`` layers: the residual stream after them, and what norm and head make of it, an early exit."""
        x, cache = self._through(self.embed(tokens), cache, length, 0, layers)
        return x, self.logits(self.norm(x)), cache

    def upper(self, x: Array, cache: Cache, length: Array, layers: int) -> tuple[Array, Cache]:
        """The layers after the first ``layers``, norm and head."""
        x, cache = self._through(x, cache, length, layers, self.config.layers)
        return self.logits(self.norm(x)), cache

    def _through(self, x: Array, cache: Cache, length: Array, first: int, end: int) -> tuple[Array, Cache]:
        """The residual stream [B T D] after the layers first .. end - 1, and the cache with their cells written."""
        position, mask, cells = kv.span(length, x.shape[1]), kv.visible(length, x.shape[1], cache[0].cells), list(cache)
        for i in range(first, end):
            x, cells[i] = self.stack[i](x, position, mask, cells[i])
        return x, tuple(cells)


@functools.lru_cache
def language_model(config: Config) -> LanguageModel:
    """The transformer as the pair of pure functions that the loop takes; the same object for the same config.

    On TPU and GPU a step of a single token, or of one for each part of the batch on a mesh, is padded to two tokens: TPUs before
    the seventh generation compute a matrix times one vector on their vector unit, at a quarter of the bandwidth (``jaxspec plan``
    shows it), and an H200 takes 1.3 times as long for one token as for two (docs/tpu-gpu.md). The cell of the second is in the
    slack of the cache, see ``cache.write``.
    """
    model = Transformer(config)

    def once(params: Params, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array | None, Cache]:
        scores: Any = model.apply({"params": params}, tokens, cache, length)
        return scores

    def padded(params: Params, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array | None, Cache]:
        logits, features, cache = once(params, jnp.repeat(tokens, 2, axis=1), cache, length)
        return logits[:, :1], None if features is None else features[:, :1], cache

    def apply(params: Params, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array | None, Cache]:
        if tokens.shape[1] > 1 or tokens.shape[0] > mesh.parts("batch"):
            return once(params, tokens, cache, length)
        return jax.lax.platform_dependent(params, tokens, cache, length, tpu=padded, cuda=padded, default=once)

    def init_cache(batch: int, cells: int) -> Cache:
        cell = functools.partial(kv.init, batch, cells, config.kv_heads, config.head_dim, jnp.dtype(config.dtype))
        return tuple(cell() for _ in range(config.layers))

    return LanguageModel(apply, init_cache, config.vocab, sum(config.input_tables))


@functools.lru_cache
def split(config: Config, layers: int) -> Split:
    """The transformer in two parts, with an early exit after its first ``layers`` layers; the same object for the same arguments.

    Raises:
        ValueError: a part would have no layer.
    """
    if not 0 < layers < config.layers:
        raise ValueError(f"expected an exit after 1 to {config.layers - 1} of {config.layers} layers, got {layers}: choose one")
    model = Transformer(config)

    def lower(params: Params, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array, Cache]:
        out: Any = model.apply({"params": params}, tokens, cache, length, layers, method="lower")
        return out

    def upper(params: Params, hidden: Array, cache: Cache, length: Array) -> tuple[Array, Cache]:
        out: Any = model.apply({"params": params}, hidden, cache, length, layers, method="upper")
        return out

    return Split(language_model(config), lower, upper)


def init_params(key: Array, config: Config, placement: Placement | None = None) -> Params:
    """Random parameters, float32, as a plain tree (without logical axis names; ``logical_axes`` gives them).

    Args:
        key: consumed.
        config: the shape.
        placement: where they go; by default one device.
    """

    def init(key: Array) -> Params:
        return nn.meta.unbox(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    shardings = shardings_of(config, placement) if placement else None
    return jax.jit(init, out_shardings=shardings)(key)


def shardings_of(config: Config, placement: Placement, strict: bool = True) -> Any:
    """The sharding of every parameter, as a tree in the shape of the parameters; see ``Placement.params``."""
    heads = {"heads": config.heads, "kv_heads": config.kv_heads}
    return placement.params(logical_axes(config), abstract_params(config), heads, strict)


def abstract_params(config: Config) -> Any:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    return nn.meta.unbox(_abstract(config))


def stored_params(config: Config) -> Any:
    """The shape and type of every parameter as a checkpoint holds it: floats in the config's dtype, scales in float32."""

    def of(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating) and not path.endswith(SUFFIX)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype) if floating else leaf.dtype)

    return unflatten({path: of(path, leaf) for path, leaf in flatten(abstract_params(config)).items()})


def logical_axes(config: Config) -> Any:
    """The logical axis names of every parameter, as a tree of PartitionSpec in the shape of the parameters."""
    return nn.get_partition_spec(_abstract(config))


def _abstract(config: Config) -> dict[str, Any]:
    """Traces one layer, as all layers have the same shapes."""
    one = Transformer(dataclasses.replace(config, layers=1, feature_layers=()))
    params = jax.eval_shape(lambda: one.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    return params | {f"layer_{i}": params["layer_0"] for i in range(config.layers)}
