"""Seconds of work and seconds of compilation, told apart by JAX's monitoring events."""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax


@functools.cache
def _compiled_s() -> list[float]:
    """Two sums from the first call on: seconds of tracing, lowering and compiling, and the number of compiled programs."""
    total = [0.0, 0]

    def add(event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            total[0] += duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            total[1] += 1

    jax.monitoring.register_event_duration_secs_listener(add)
    return total


def compilations() -> int:
    """How many programs this process has compiled, or fetched from the cache, since the first call."""
    return int(_compiled_s()[1])


class Stopwatch:
    """Adds up seconds by name; what a block spends on tracing and compiling goes under "compile".

    Args:
        names: that are 0 from the start.
    """

    def __init__(self, *names: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("compile", *names), 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block, which must wait for its own results."""
        compiled, began, before = _compiled_s(), time.perf_counter(), _compiled_s()[0]
        yield
        compiling = compiled[0] - before
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began - compiling
