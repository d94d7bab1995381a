"""What this device can do, measured, and what a step must move and compute: the bound that its time is held against."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.bench import presets
from jaxspec.models import transformer
from jaxspec.models.transformer import Config


class Device(NamedTuple):
    """Rates of the device."""

    bytes_per_s: float  # reading
    flops_per_s: float  # matrix products in the type that is benchmarked


class Work(NamedTuple):
    """What a pass of a model over a block must do at least."""

    bytes: float
    flops: float

    def bound_s(self, device: Device) -> float:
        """The least time."""
        return max(self.bytes / device.bytes_per_s, self.flops / device.flops_per_s)


def seconds(call: Callable[[], Any], times: int = 5) -> float:
    """The median time of a call that has run before."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def meter(dtype: str) -> Callable[[], Device]:
    """What measures this device, each time that it is called: half a GB is read (on a GPU or TPU 4 GB) in the two ways that XLA
    is quickest at, and square matrices are multiplied."""
    small = jax.default_backend() == "cpu"
    size = jnp.dtype(dtype).itemsize
    rows, side = (1 << 29 if small else 1 << 32) // (4096 * size), 2048 if small else 8192
    matrix, vector, square = jnp.ones((rows, 4096), dtype), jnp.ones(4096, dtype), jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    largest = jax.jit(jnp.max)

    def measure() -> Device:
        read_s = min(seconds(lambda: product(matrix, vector)), seconds(lambda: largest(matrix)))
        return Device(rows * 4096 * size / read_s, 2 * side**3 / seconds(lambda: product(square, square)))

    return measure


def middle(devices: Sequence[Device]) -> Device:
    """The median of each rate."""
    return Device(*map(statistics.median, zip(*devices, strict=True)))


def model_pass(config: Config, batch: int, block: int, cells: int) -> Work:
    """A pass over ``block`` tokens a row: every weight but the input tables is read once, and the cache up to ``cells``."""
    size = jnp.dtype(config.dtype).itemsize
    leaves = jax.tree_util.tree_leaves_with_path(transformer.abstract_params(config))
    weights = sum(leaf.size for path, leaf in leaves if not path[0].key.startswith("table_"))
    if config.tied:
        weights += config.vocab * config.width
    attention = 2 * 2 * config.layers * config.heads * config.head_dim * cells * batch * block
    return Work(weights * size + presets.cache_bytes(config, batch, cells), 2 * weights * batch * block + attention)


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Codes a round at an acceptance by position: (1 - a^(K+1)) / (1 - a), arXiv 2211.17192, equation 1.

    >>> expected_tokens(0.5, 3)
    1.875
    >>> expected_tokens(1.0, 3)
    4.0
    """
    return sum(acceptance**i for i in range(draft_length + 1)) * 1.0
