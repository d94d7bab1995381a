"""One decoder transformer for the Llama, Qwen2 and Qwen3 family, in linen.

RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU. What sets the members apart is in ``Config``.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.types import Array, Cache, LanguageModel

_FEW = 32  # rows: of a step, not of a prefill or of training


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

    input_tables: rows of each input table; ids run through them one after the other. The first ids are the head's vocabulary.
    vocab: V, the rows of the output head. Tied, the head is the first V rows of the first input table.
    padding: the last so many of the V rows stand for no token, so that a mesh divides V; their logits are -inf.
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

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"expected heads to be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.tied and self.vocab > self.input_tables[0]:
            raise ValueError(f"expected a tied head within the {self.input_tables[0]} rows of the first table, got {self.vocab}")


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


def rotate(x: Array, position: Array, frequency: Array) -> Array:
    """Rotary positions in the half-split layout: x [B T H D_head], position int32 [B T]."""
    angle = position[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _matrix(axes: tuple[str, ...]) -> Any:
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [... D] -> [... D]."""
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias); the kernel is [in, out] and carries logical axis names."""

    features: int
    axes: tuple[str, str]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [... in] -> [... out]."""
        kernel = self.param("kernel", _matrix(self.axes), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", zeros, (self.features,)).astype(x.dtype)
        return y


class Attention(nn.Module):
    """Causal grouped-query attention over the cache, or over the block itself when there is none (training)."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, position: Array, mask: Array, cache: kv.KVCache | None) -> tuple[Array, kv.KVCache | None]:
        """x [B T D], position [B T], mask bool [B T S] -> ([B T D], cache)."""
        c = self.config
        batch, block, _ = x.shape
        q = Linear(c.heads * c.head_dim, ("embed", "heads"), c.qkv_bias, name="query")(x)
        k = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias, name="key")(x)
        v = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias, name="value")(x)
        q, k, v = (y.reshape(batch, block, -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="query_norm")(q), RMSNorm(c.norm_eps, name="key_norm")(k)
        frequency = rope_frequencies(c)
        q, k = rotate(q, position, frequency), rotate(k, position, frequency)
        if cache is not None:
            cache = kv.write(cache, k, v, position[:, 0])
            k, v = cache
        weights = self._weights(q.reshape(batch, block, c.kv_heads, -1, c.head_dim), k, mask)
        out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v).reshape(batch, block, -1)
        return Linear(c.width, ("heads", "embed"), name="out")(out.astype(x.dtype)), cache

    def _weights(self, q: Array, k: Array, mask: Array) -> Array:
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(self.config.head_dim)
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
        gate = Linear(self.config.mlp_width, ("embed", "mlp"), name="gate")(x)
        up = Linear(self.config.mlp_width, ("embed", "mlp"), name="up")(x)
        return Linear(self.config.width, ("mlp", "embed"), name="down")(jax.nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention and SwiGLU, each on a normalised branch of the residual stream."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, position: Array, mask: Array, cache: kv.KVCache | None) -> tuple[Array, kv.KVCache | None]:
        """x [B T D] -> ([B T D], cache)."""
        eps = self.config.norm_eps
        y, cache = Attention(self.config, name="attention")(RMSNorm(eps, name="attention_norm")(x), position, mask, cache)
        x = x + y
        return x + SwiGLU(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), cache


class Transformer(nn.Module):
    """Tokens to logits over the head's vocabulary, and the final features."""

    config: Config

    def setup(self) -> None:
        """Declares the input tables, the layers and the head."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), ("vocab", "embed"))
        self.tables = [self.param(f"table_{i}", init, (rows, c.width)) for i, rows in enumerate(c.input_tables)]
        self.stack = [Layer(c, name=f"layer_{i}") for i in range(c.layers)]
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.head = self.param("head", init, (c.vocab, c.width))
        if c.head_bias:
            self.bias = self.param("head_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (c.vocab,))

    def embed(self, tokens: Array) -> Array:
        """int32 [B T] -> [B T D]: each id from the table that it falls into."""
        dtype = jnp.dtype(self.config.dtype)
        x, first = self.tables[0].astype(dtype)[jnp.clip(tokens, 0, self.config.input_tables[0] - 1)], 0
        for table, rows in zip(self.tables[1:], self.config.input_tables, strict=False):
            first += rows
            row = jnp.clip(tokens - first, 0, table.shape[0] - 1)
            x = jnp.where((tokens >= first)[:, :, None], table.astype(dtype)[row], x)
        return x

    def logits(self, x: Array) -> Array:
        """Features [B T D] -> float32 [B T V]."""
        c = self.config
        head = (self.tables[0][: c.vocab] if c.tied else self.head).astype(x.dtype)
        if x.shape[0] * x.shape[1] <= _FEW:  # rows of the head times x: on a CPU up to 1.4 times as quick as x times its columns
            y = jnp.moveaxis(jnp.einsum("vd,btd->vbt", head, x, preferred_element_type=jnp.float32), 0, -1)
        else:
            y = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
        y = y + self.bias if c.head_bias else y
        return jnp.where(jnp.arange(c.vocab) < c.vocab - c.padding, y, -jnp.inf) if c.padding else y

    def __call__(
        self, tokens: Array, cache: tuple[kv.KVCache, ...] | None = None, length: Array | None = None
    ) -> tuple[Array, Array, tuple[kv.KVCache, ...] | None]:
        """Scores a block: tokens int32 [B T] at positions length .. -> (logits float32 [B T V], features [B T D], cache).

        Without a cache the block stands at position 0 and attends to itself alone, as in training.
        """
        batch, block = tokens.shape
        length = jnp.zeros(batch, jnp.int32) if length is None else length
        position = length[:, None] + jnp.arange(block)
        mask = kv.visible(length, block, block if cache is None else cache[0].key.shape[1])
        x, new = self.embed(tokens), []
        for i, layer in enumerate(self.stack):
            x, layer_cache = layer(x, position, mask, None if cache is None else cache[i])
            new.append(layer_cache)
        x = self.norm(x)
        return self.logits(x), x, None if cache is None else tuple(new)


@functools.lru_cache
def language_model(config: Config) -> LanguageModel:
    """The transformer as the pair of pure functions that the loop takes; the same object for the same config.

    To a TPU a lone token goes twice: before the seventh, they take a matrix times one vector to their vector unit, at a quarter
    of the bandwidth (``jaxspec plan`` shows it). The second's cell lies in the slack of the cache, see ``cache.write``.
    """
    model = Transformer(config)

    def once(params: Any, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array, Cache]:
        return model.apply({"params": params}, tokens, cache, length)

    def twice(params: Any, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array, Cache]:
        logits, features, cache = once(params, jnp.repeat(tokens, 2, axis=1), cache, length)
        return logits[:, :1], features[:, :1], cache

    def apply(params: Any, tokens: Array, cache: Cache, length: Array) -> tuple[Array, Array, Cache]:
        if tokens.size > 1:
            return once(params, tokens, cache, length)
        return jax.lax.platform_dependent(params, tokens, cache, length, tpu=twice, default=once)

    def init_cache(batch: int, cells: int) -> Cache:
        cell = functools.partial(kv.init, batch, cells, config.kv_heads, config.head_dim, jnp.dtype(config.dtype))
        return tuple(cell() for _ in range(config.layers))

    return LanguageModel(apply, init_cache)


def init_params(key: Array, config: Config) -> Any:
    """Random parameters, float32, as a plain tree (logical axis names removed; ``logical_axes`` gives them)."""
    variables = jax.jit(Transformer(config).init)(key, jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(variables["params"])


def abstract_params(config: Config) -> Any:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    return nn.meta.unbox(_abstract(config))


def logical_axes(config: Config) -> Any:
    """The logical axis names of every parameter, as a tree of PartitionSpec in the shape of the parameters."""
    return nn.get_partition_spec(_abstract(config))


def _abstract(config: Config) -> Any:
    """Traces one layer, which all the others are like."""
    one = Transformer(dataclasses.replace(config, layers=1))
    params = jax.eval_shape(lambda: one.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    return params | {f"layer_{i}": params["layer_0"] for i in range(config.layers)}
