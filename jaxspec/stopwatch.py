"""Seconds of work apart from seconds of compilation, which JAX tells about through its monitoring events."""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax


@functools.cache
def _compiled_s() -> list[float]:
    """One cell that grows by every trace, lowering and compilation of this process from the first call on."""
    total = [0.0]

    def add(event: str, duration_s: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            total[0] += duration_s

    jax.monitoring.register_event_duration_secs_listener(add)
    return total


class Stopwatch:
    """Adds up seconds under names; what a block spends on compiling goes under "compile"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block, which must wait for its own results."""
        compiled, began, before = _compiled_s(), time.perf_counter(), _compiled_s()[0]
        yield
        compiling = compiled[0] - before
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began - compiling
