"""Benchmark a decode loop: warm up, wait for the device, interleave the systems, and take the median.

The weights are random, so a draft would be rejected nearly always; here the target drafts for itself, which shows the other
extreme: everything is accepted, at the full price of the draft. ``jaxspec bench`` measures real cases.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jaxspec
from jaxspec.models.transformer import Config, init_params, language_model


def seconds(run: Callable[[jax.Array], jaxspec.Generation], key: jax.Array) -> float:
    """The time of one call. Without ``block_until_ready`` only its dispatch would be timed."""
    start = time.perf_counter()
    jax.block_until_ready(run(key))
    return time.perf_counter() - start


def main(turns: int = 5) -> None:
    """Times both loops with new keys in every turn, so that nothing is measured on one lucky draw."""
    config = Config((512,), 512, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp_width=256)
    target, params = language_model(config), init_params(jax.random.key(0), config)
    draft, verify = jaxspec.model_draft(target, 3), jaxspec.verify.exact()
    prompt, length = jnp.array([[1, 2, 3]]), jnp.array([3])
    systems = {
        "autoregressive": lambda key: jaxspec.autoregressive(key, target, params, prompt, length, max_new_tokens=64),
        "speculative": lambda key: jaxspec.generate(
            key, target, params, draft, params, verify, prompt, length, max_new_tokens=64
        ),
    }
    for run in systems.values():
        seconds(run, jax.random.key(0))  # compiles
    times = {name: [] for name in systems}
    for key in jax.random.split(jax.random.key(1), turns):
        for name, run in systems.items():
            times[name].append(seconds(run, key))
    plain = statistics.median(times["autoregressive"])
    for name, some in times.items():
        median = statistics.median(some)
        print(f"{name:15} {64 / median:7.0f} codes per second, {plain / median:.2f}x ({min(some):.4f} to {max(some):.4f} s)")


if __name__ == "__main__":
    main()
