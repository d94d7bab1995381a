"""Seconds of work apart from seconds of compilation, which JAX tells about through its monitoring events."""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax


@functools.cache
def _compiled_s() -> list[float]:
    """Two cells that grow from the first call on: seconds of tracing, lowering and compiling, and programs compiled."""
    total = [0.0, 0]

    def add(event: str, duration_s: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            total[0] += duration_s
        if event == "/jax/core/compile/backend_compile_duration":
            total[1] += 1

    jax.monitoring.register_event_duration_secs_listener(add)
    return total


def compilations() -> int:
    """How many programs this process has compiled, or fetched from the cache, since the first call."""
    return int(_compiled_s()[1])


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
