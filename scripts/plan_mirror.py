"""Compiles the programs of a mirrored round for the two halves of a TPU slice that is not attached, and prints their cycles.

    python scripts/plan_mirror.py --model llasa-8b --topology v5e:2x4 --candidates 1 4 8

The target is on the first half of the chips, the draft on the other. Cycles are those of the compiler's schedule, which leaves
waiting for memory and for other chips out; no figure is a measurement.
"""

import argparse
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import mirror, request, rounds, verify
from jaxspec.bench import chips, hlo, presets
from jaxspec.bench.plan_shapes import nbytes
from jaxspec.draft import model_draft
from jaxspec.mirror import Mirror
from jaxspec.models import transformer
from jaxspec.models.placement import Placement
from jaxspec.sampling import Sampling

PADDED = 1024  # rows of head and tables are a multiple of this


def padded(shape):
    """A shape as ``convert --pad-to`` makes it."""
    more = -shape.vocab % PADDED
    tables = (shape.input_tables[0] + more, *shape.input_tables[1:])
    return dataclasses.replace(shape, vocab=shape.vocab + more, input_tables=tables, padding=more)


def placed(tree, where):
    """Shapes of a tree like that of ``Placement.state``, on a mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, Placement(where).state(tree)
    )


def weights(shape, where):
    """Shapes of parameters, divided on a mesh."""
    places = transformer.shardings_of(shape, Placement(where), strict=False)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), transformer.stored_params(shape), places
    )


def figures(where, function, *arguments):
    """(the result's shapes, cycles, bytes on a chip, collectives by kind) of a jitted function on a mesh."""
    with jax.set_mesh(where):
        compiled = function.lower(*arguments).compile()
        static = next((i for i, value in enumerate(arguments) if jax.tree.leaves(value) and _is_array(value)), 0)
        out = jax.eval_shape(lambda *rest: function(*arguments[:static], *rest), *arguments[static:])
    text, said = compiled.as_text(), compiled.memory_analysis()
    program = hlo.parse(text)
    held = said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    kinds = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    return out, {
        "cycles": hlo.scheduled_cycles(program, program.entry),
        "gigabytes": held / 1e9,
        "collectives": {kind: count for kind, count in counts.items() if count},
    }


def _is_array(value):
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))


def main():
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(presets.PAIRS), default="llasa-8b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--cells", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="of the target; by default all")
    options = parser.parse_args()
    devices = chips.devices(options.topology)
    half = len(devices) // 2
    there, here = mirror.meshes(half, (1, half), devices)
    pair = presets.pair(options.model, "bfloat16")
    target, shape = padded(pair.target), padded(pair.draft)
    target = dataclasses.replace(target, layers=options.layers or target.layers)
    split, K = transformer.split(target, target.layers // 2), options.draft_length
    draft = model_draft(transformer.language_model(shape), K)
    target_params, draft_params = weights(target, there), weights(shape, here)
    width = options.cells // 2

    def asked():
        prompt, length = np.zeros((1, width), np.int32), np.full(1, width)
        return request.check(
            jax.random.split(jax.random.key(0), 1), prompt, length, options.cells - width - K - 1, None, (), Sampling()
        )

    with jax.set_mesh(there):
        start = functools.partial(mirror.start, split.model, K, options.cells)
        state = placed(jax.eval_shape(start, target_params, placed(jax.eval_shape(asked), there)), there)
    side = placed(state._replace(cache=()), here)
    with jax.set_mesh(here):
        proposal, side = placed(jax.eval_shape(functools.partial(mirror.begin, draft, width), draft_params, side), here)
    sent = placed(proposal, there)
    _, anew = figures(here, jax.jit(rounds.propose, static_argnums=0), draft, draft_params, side)
    for candidates in options.candidates:
        pair = Mirror(split, draft, candidates, there, here)
        (hidden, guesses, after), lower = figures(there, mirror.score_lower, split, candidates, target_params, sent, state)
        rule = jax.tree_util.Partial(verify.exact())
        _, upper = figures(
            there, mirror.score_upper, split, target_params, rule, placed(hidden, there), sent, placed(after, there)
        )
        guesses = placed(guesses, here)
        branches, rolling = figures(here, mirror.roll_out, pair.draft, draft_params, side, proposal.tokens, guesses)
        outcome = jax.ShapeDtypeStruct((3, 1), jnp.int32, sharding=Placement(here).sharding())
        arguments = draft_params, side, proposal.tokens, guesses, placed(branches, here), outcome
        _, following = figures(here, mirror.follow, draft, *arguments)
        parts = {"lower": lower, "upper": upper, "branches": rolling, "follow": following, "propose": anew}
        print(
            json.dumps(
                {
                    "model": options.model,
                    "candidates": candidates,
                    "weights_gb": nbytes(target_params) / 1e9,
                    "target_layers": target.layers,
                    "draft_layers": shape.layers,
                    **parts,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
