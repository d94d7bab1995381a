"""Times a pass of a target by the length of its block: python scripts/block_lengths.py [--preset llasa-8b] [--layers 8].

Shows what scoring K + 1 tokens costs beside a step of one, and the rate at which each reads the weights: random ones in bfloat16,
a cache of 512 cells of which 64 are filled, 20 passes in one program, the median of 5 runs.
"""

import argparse
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.bench import presets, roofline
from jaxspec.models import transformer

PASSES, CELLS, FILLED = 20, 512, 64


def seconds(config: transformer.Config, params: Any, batch: int, block: int) -> float:
    """The time of one pass over ``block`` tokens of each row, without the padding of ``transformer.language_model``."""
    model, cache = transformer.Transformer(config), transformer.language_model(config).init_cache(batch, CELLS)

    def again(i: jax.Array, carry: Any) -> Any:
        cache, tokens = carry
        logits, _, cache = model.apply({"params": params}, tokens, cache, jnp.full(batch, FILLED, jnp.int32) + i)
        return cache, jnp.argmax(logits, -1).astype(jnp.int32)

    passes = jax.jit(lambda cache: jax.lax.fori_loop(0, PASSES, again, (cache, jnp.zeros((batch, block), jnp.int32))))
    return roofline.seconds(lambda: passes(cache), 5) / PASSES


def main() -> None:
    """Reads the arguments and prints a line for each batch and block length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets.PAIRS, default="llasa-8b")
    parser.add_argument("--layers", type=int, default=8, help="of the target; fewer compile faster")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    config = dataclasses.replace(presets.pair(arguments.preset, "bfloat16").target, layers=arguments.layers)
    params = presets.random_params(jax.random.key(0), config)
    print(f"{arguments.preset}, {config.layers} layers; {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for batch, block in itertools.product(arguments.batches, arguments.blocks):
        pass_s = seconds(config, params, batch, block)
        rate = roofline.model_pass(config, batch, block, FILLED).bytes / pass_s
        print(f"batch {batch}, {block} tokens: {pass_s * 1e3:.3f} ms, {rate / 1e9:.0f} GB/s read", flush=True)


if __name__ == "__main__":
    main()
