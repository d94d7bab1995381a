"""Measures the loop with the draft on a device of its own on two CPU devices of one thread each; prints a table, or JSON.

    python scripts/measure_mirror.py --preset builtin --json mirror.json

builtin: the built-in voice, and layers of it as the draft, neither trained for it. small: random weights of the benchmark's
preset, greedy; "small, hits" has zeros as the weights of the upper layers, so that the exit guesses every token. Loops with and
without branches are interleaved, and ratios are medians over the repeats.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from jaxspec import mirror, rounds, speculate, verify
from jaxspec import request as requests
from jaxspec.bench import presets
from jaxspec.bench.cases import Case, random_requests
from jaxspec.bench.loading import text_requests
from jaxspec.draft import model_draft, smaller
from jaxspec.draft.family import with_shared
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.synthesis.builtin import builtin
from jaxspec.text.held_out import held_out


def models(preset, new_tokens, draft_layers, exit_layer):
    """(target's shape and parameters, draft's shape and parameters, number of a repeat -> its request)."""
    case = Case("exact", 0, 1, 64)
    if preset == "builtin":
        voice, synthesizer = voices.load(), builtin()
        config = smaller.Config(voice.target, tuple(draft_layers), trained=())
        params = with_shared({}, smaller.shared(config), synthesizer.target_params)
        asked = text_requests(synthesizer, held_out(), new_tokens)
        return voice.target, synthesizer.target_params, smaller.shape(config), params, lambda n: asked(case, n)
    pair = presets.pair("small", "float32")
    keys = jax.random.split(jax.random.key(0))
    params = presets.random_params(keys[0], pair.target)
    if preset == "small, hits":
        for i in range(exit_layer, pair.target.layers):
            params[f"layer_{i}"] = jax.tree.map(lambda leaf: 0 * leaf, params[f"layer_{i}"])
    asked = random_requests(pair.num_codes, new_tokens, Sampling(temperature=0))
    return pair.target, params, pair.draft, presets.random_params(keys[1], pair.draft), lambda n: asked(case, n)


def timed(function, *arguments):
    """(result, seconds)."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - began


def loops(pairs, target_params, draft_params, rule, request, repeats):
    """The figures of each number of candidates, against the loop without branches."""
    first = next(iter(pairs.values()))
    here, found = mirror.place(draft_params, first.draft_mesh), {count: [] for count in pairs}

    def plain(n, asked):
        whole = first.split.model, target_params, first.draft, draft_params
        return speculate.generate(jax.random.key(n), *whole, rule, **asked._asdict())

    def mirrored(n, asked, pair):
        return mirror.generate(jax.random.key(n), pair, target_params, here, rule, **asked._asdict())

    for n in range(repeats + 1):
        asked = request(n)
        nothing = asked._replace(limit=np.zeros_like(asked.limit))
        for count, pair in pairs.items():
            _, fill = timed(plain, n, nothing)
            out, took = timed(plain, n, asked)
            _, fill_2 = timed(mirrored, n, nothing, pair)
            with_branches, took_2 = timed(mirrored, n, asked, pair)
            same = np.array_equal(out.tokens, with_branches.generation.tokens)
            without = (took - fill) / int(out.info.rounds.max())
            found[count].append((without, (took_2 - fill_2) / with_branches.rounds, with_branches, out, same))
    rows = []
    for count, some in found.items():
        some = some[1:]  # the first compiles
        generations = [out.generation for _, _, out, _, _ in some]
        rows.append(
            {
                "candidates": count,
                "reused": sum(out.reused for _, _, out, _, _ in some) / sum(out.rounds - 1 for _, _, out, _, _ in some),
                "accepted": float(
                    sum(g.info.accepted.sum() for g in generations) / sum(g.info.drafted.sum() for g in generations)
                ),
                "round_without_ms": 1e3 * statistics.median(row[0] for row in some),
                "round_with_ms": 1e3 * statistics.median(row[1] for row in some),
                "ratio": statistics.median(row[1] / row[0] for row in some),
                "ratio_spread": [pick(row[1] / row[0] for row in some) for pick in (min, max)],
                "same_tokens": all(row[4] for row in some),
            }
        )
    return rows


def parts(pair, target_params, draft_params, rule, asked, repeats):
    """Milliseconds of the programs of a round, each alone, and of the upper layers and the branches at the same time."""
    request = requests.check(jax.random.key(0), **asked._asdict())
    width, K = request.prompt.shape[1], pair.draft.length
    cells = width + asked.max_new_tokens + K + 1
    there, here = pair.target_mesh, pair.draft_mesh
    draft_params = mirror.place(draft_params, here)
    rule = mirror.place(speculate.as_pytree(rule), there)
    anew = jax.jit(rounds.propose, static_argnums=0)
    state = mirror.start(pair.split.model, K, cells, target_params, mirror.send(request, there))
    side = mirror.send(state._replace(cache=()), here)
    proposal, side = mirror.begin(pair.draft, width, draft_params, side)
    found = {name: [] for name in ("lower", "upper", "branches", "propose", "upper and branches", "transfers")}

    def upper(hidden, sent, state):
        return mirror.score_upper(pair.split, target_params, rule, hidden, sent, state)

    def branches(received):
        return mirror.roll_out(pair.draft, draft_params, side, proposal.tokens, received)

    def both_at_once(hidden, sent, state, received):
        return upper(hidden, sent, state), branches(received)

    for n in range(repeats + 1):
        sent, sending = timed(mirror.send, proposal, there)
        (hidden, guesses, state), lower = timed(mirror.score_lower, pair.split, pair.candidates, target_params, sent, state)
        received, receiving = timed(mirror.send, guesses, here)
        _, rolling = timed(branches, received)
        _, proposing = timed(anew, pair.draft, draft_params, side)
        if n % 2:
            (_, state), alone = timed(upper, hidden, sent, state)
            found["upper"].append(alone)
        else:
            ((_, state), _), both = timed(both_at_once, hidden, sent, state, received)
            found["upper and branches"].append(both)
        for name, took in (("lower", lower), ("branches", rolling), ("propose", proposing), ("transfers", sending + receiving)):
            found[name].append(took)
    return {name: 1e3 * statistics.median(some[1:]) for name, some in found.items()}


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["builtin", "small", "small, hits"], default="builtin")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--exit", type=int, nargs="+", default=[])
    parser.add_argument("--draft-layers", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = []
    layers = 6 if options.preset == "builtin" else 12
    for exit_layer in options.exit or [layers // 2]:
        target, params, shape, draft_params, request = models(
            options.preset, options.new_tokens, options.draft_layers, exit_layer
        )
        draft = model_draft(transformer.language_model(shape), options.draft_length)
        split, meshes = transformer.split(target, exit_layer), mirror.meshes(1)
        pairs = {count: mirror.Mirror(split, draft, count, *meshes) for count in options.candidates}
        rule = verify.exact()
        rows = loops(pairs, params, draft_params, rule, request, options.repeats)
        for row in rows:
            row = {"preset": options.preset, "exit": exit_layer, "draft_layers": shape.layers} | row
            row["parts_ms"] = parts(pairs[row["candidates"]], params, draft_params, rule, request(0), 4 * options.repeats)
            print(json.dumps(row), flush=True)
            result.append(row)
    if options.json:
        load = os.getloadavg()[0]
        options.json.write_text(json.dumps({"load": load, "jax": jax.__version__, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
