"""What this device can do, measured, and what a step must read and compute: the roofline that its time is compared with."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.bench import presets
from jaxspec.common.trees import flatten
from jaxspec.models import transformer
from jaxspec.models.transformer import Config

_MOVED = 2**28  # bytes that one timed read moves at least, so that calling it costs little beside it


class Rates(NamedTuple):
    """The best measured rates of the device.

    Attributes:
        bytes_per_s: of reading the weights of a model again and again. A model that fits in the processor's cache is read from
            there, several times as fast as from memory, so the rate belongs to the size of the model.
        flops_per_s: of matrix products in the benchmarked dtype.
    """

    bytes_per_s: float
    flops_per_s: float


class Work(NamedTuple):
    """What a pass of a model over a block must read and compute at least."""

    bytes: float
    flops: float

    def bound_s(self, rates: Rates) -> float:
        """The least time, in seconds.

        >>> Work(bytes=2e9, flops=1e9).bound_s(Rates(bytes_per_s=1e9, flops_per_s=1e12))
        2.0
        """
        return max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The median time of a call, after one that compiles."""
    jax.block_until_ready(call())
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def reading(dtype: str, size: int) -> Callable[[], float]:
    """Prepares to measure how fast an array is read, as a decode loop reads its weights: again and again, in one program.

    Args:
        dtype: of the array.
        size: its bytes; of more than half a GB on a CPU, and 4 GB elsewhere, so much is read.

    Returns:
        A function that gives bytes per second, by the fastest of three programs: a chain of products with one vector, with eight
        (a GPU reads a matrix faster for several), and of maxima.
    """
    item = jnp.dtype(dtype).itemsize
    side = max(int((min(size, 2**29 if _on_cpu() else 2**32) / item) ** 0.5), 64)
    nbytes = side * side * item
    times = max(_MOVED // nbytes, 1)
    matrix, vector = jnp.full((side, side), 1 / side, dtype), jnp.ones(side, dtype)

    def repeat(body: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return jax.jit(lambda matrix, start: jax.lax.fori_loop(0, times, lambda _, x: body(matrix, x), start))

    product, largest = repeat(lambda matrix, x: matrix @ x), repeat(lambda matrix, x: jnp.max(matrix + x))
    programs = (product, vector), (product, jnp.ones((side, 8), dtype)), (largest, vector[0])

    def measure() -> float:
        return times * nbytes / min(seconds(functools.partial(program, matrix, start)) for program, start in programs)

    return measure


def multiplying(dtype: str) -> Callable[[], float]:
    """Prepares to measure matrix products; the function that it returns gives operations per second."""
    side = 2048 if _on_cpu() else 8192
    square = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return lambda: 2 * side**3 / seconds(lambda: product(square, square))


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def model_pass(config: Config, batch: int, block: int, cells: float) -> Work:
    """The work of one pass: every weight but the input tables is read once, and the cache up to ``cells``.

    Args:
        config: the shape of the model.
        batch: rows.
        block: tokens of each row.
        cells: tokens that each row attends to.

    Returns:
        The least bytes and operations.
    """
    leaves = flatten(transformer.stored_params(config))
    read = [leaf for path, leaf in leaves.items() if not path.startswith("table_")]
    size, weights = sum(leaf.size * leaf.dtype.itemsize for leaf in read), sum(leaf.size for leaf in read)
    if config.tied:
        weights += config.vocab * config.width
        size += config.vocab * config.width * leaves["table_0"].dtype.itemsize
    attention = 2 * 2 * config.layers * config.heads * config.head_dim * cells * batch * block
    return Work(size + presets.cache_bytes(config, batch, 1) * cells, 2 * weights * batch * block + attention)


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Expected tokens of a round when each position is accepted with the same probability (arXiv 2211.17192, equation 1).

    (1 - a^(K+1)) / (1 - a)

    >>> expected_tokens(0.5, 3)
    1.875
    >>> expected_tokens(1.0, 3)
    4.0
    """
    return float(sum(acceptance**i for i in range(draft_length + 1)))
