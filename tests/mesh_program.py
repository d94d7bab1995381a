"""Decodes on meshes of 8 CPU devices and on one device, and prints as JSON which cases agree; test_mesh.py runs it.

The arguments are meshes ("2x4", data by model) and cases, a draft and a rule ("block:exact"), each a list separated by commas.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from jaxspec import Sampling, groups, mesh, speculate, verify
from jaxspec.common.trees import flatten, unflatten
from jaxspec.draft import block, eagle, medusa, mtp, ngram_draft, recurrent, smaller, streaming
from jaxspec.draft.families import FAMILIES, shardings
from jaxspec.models import placement, transformer

V, K, N = 64, 3, 12
TARGET = transformer.Config((V, 16), V, 32, 3, 8, 2, 8, 48)
PARAMS = transformer.init_params(jax.random.key(0), TARGET)
LAYERS = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 40}
CONFIGS = {
    "model": smaller.Config(TARGET, shape=dataclasses.replace(TARGET, layers=1)),
    "block": block.Config(TARGET, (0, 3), 4, **LAYERS, markov_rank=6),
    "recurrent": recurrent.Config(TARGET, (0, 2), 4, 16, 24, attend=True, own_head=True),
    "eagle": eagle.Config(TARGET, (0, 1, 2), 4),
    "medusa": medusa.Config(TARGET, 4),
    "mtp": mtp.Config(TARGET, 4),
    "streaming": streaming.Config(TARGET, 4, layers=2, rank=6),
}
NEAR = groups.acoustic_similarity_groups(np.asarray(PARAMS["table_0"])[:V], 0.2)
RULES = {
    "exact": verify.exact(),
    "tolerance": verify.tolerance(0.3),
    "coarse-grained": verify.coarse_grained(NEAR),
    "block-exact": verify.block_exact(),
    "block-tolerance": verify.block_tolerance(0.3),
    "block-coarse-grained": verify.block_coarse_grained(NEAR),
}
SAMPLING = [
    Sampling(temperature=0),
    Sampling(top_k=5),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(top_k=9, top_p=0.9, repetition_window=3),
    Sampling(repetition_penalty=1.2, min_p=0.01, withheld=7, min_new_tokens=4),
    Sampling(top_p=0.8, repetition_window=2, repetition_redraw_all=True),
]
RNG = np.random.default_rng(0)
PROMPT, LENGTH = RNG.integers(0, V + 16, (6, 5)).astype(np.int32), np.array([5, 1, 3, 4, 2, 5])
LIMIT = [N, 3, N, 0, N, 7]


def own_params(family, config):
    """A draft's parameters by path, none of them zero."""
    made = flatten(FAMILIES[family].init_params(jax.random.key(1), config, PARAMS))
    keys = jax.random.split(jax.random.key(2), len(made))
    return {path: leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, (path, leaf) in zip(keys, made.items(), strict=True)}


def call(draft_name, rule, place=None):
    """A function of the seed that decodes, with parameters that a placement divides."""
    params = jax.device_put(PARAMS, place and transformer.shardings_of(TARGET, place))
    if draft_name in CONFIGS:
        family, config = FAMILIES[draft_name], CONFIGS[draft_name]
        own = own_params(draft_name, config)
        own = jax.device_put(own, place and shardings(draft_name, config, place, own))
        theirs = flatten(params)
        draft_params = unflatten(own | {path: theirs[origin] for path, origin in family.shared(config).items()})
        target, draft = dataclasses.replace(TARGET, feature_layers=family.feature_layers(config)), family.drafter(config)(K)
    else:
        target, draft, draft_params = TARGET, ngram_draft(K, V), ()
    lm, settings = (
        transformer.language_model(target),
        {"max_new_tokens": N, "limit": LIMIT, "stop_ids": (7,), "sampling": SAMPLING},
    )

    def decode(seed):
        if draft_name == "plain":
            out = speculate.autoregressive(jax.random.key(seed), lm, params, PROMPT, LENGTH, **settings)
        else:
            key, models = jax.random.key(seed), (lm, params, draft, draft_params)
            out = speculate.generate(key, *models, RULES[rule], PROMPT, LENGTH, **settings)
        assert not jax.tree.reduce(lambda some, leaf: some or not leaf.is_fully_replicated, out, False)
        return jax.device_get(out)

    return decode


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def check_blocks():
    """A batch that is smaller than the parts of "data", as that of a stream: every token of a block is scored."""
    lm = transformer.language_model(TARGET)
    for batch, width in ((1, 1), (1, 3), (2, 2), (2, 4)):
        arguments = PARAMS, np.zeros((batch, width), np.int32), lm.init_cache(batch, 8), np.zeros(batch, np.int32)
        assert jax.eval_shape(lm.apply, *arguments)[0].shape == (batch, width, V)


def main(meshes, cases):
    compiled, found = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for case in cases.split(","):
        draft_name, _, rule = case.partition(":")
        alone = [call(draft_name, rule)(seed) for seed in range(3)]
        assert not equal(*alone[:2])
        for name in meshes.split(","):
            chips = mesh.make(*map(int, name.split("x")))
            with jax.set_mesh(chips):
                check_blocks()
                decode = call(draft_name, rule, placement.current())
                out = [decode(0)]
                before = len(compiled)
                out += [decode(seed) for seed in (1, 2)]
                assert len(compiled) == before, compiled[before:]
            found[f"{case} {name}"] = equal(out, alone)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
