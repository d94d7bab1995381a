"""Decodes with the draft on a device of its own, of two on the CPU, and prints what test_mirror.py checks, as JSON."""

import dataclasses
import functools
import json
import sys

import fakes
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import Sampling, groups, mirror, speculate, verify
from jaxspec import request as requests
from jaxspec.draft import model_draft
from jaxspec.models import transformer
from jaxspec.types import Split

V, K, N, EACH = 4, 2, 4, 8000
TARGET = fakes.table(3, V)
DRAFT = TARGET + fakes.table(4, V, scale=0.7)
PROMPT = [2, 0]
RULES = {
    "exact": verify.exact(),
    "coarse-grained": verify.coarse_grained(groups.acoustic_similarity_groups(np.eye(V)[[0, 0, 2, 3]], 0.5)),
}


@functools.cache
def meshes():
    """The devices of the target and of the draft; not at the import, as there may be one device."""
    return mirror.meshes(1)


def blind(params, tokens, cache, length):
    """The hash model without features."""
    logits, _, cache = fakes.hash_model().apply(params, tokens, cache, length)
    return logits, None, cache


def lower(params, tokens, cache, length):
    """An exit that errs: it forgets the best token."""
    logits, _, cache = blind(params, tokens, cache, length)
    best = jnp.argmax(logits, axis=-1, keepdims=True) == jnp.arange(V)[None, None]
    return logits, jnp.where(best & (logits.sum(-1, keepdims=True) > 0), -9.0, logits), cache


LM = fakes.hash_model()._replace(apply=blind)
TOY = Split(LM, lower, lambda params, hidden, cache, length: (hidden, cache))


def decode(rule, candidates, rows, key=11, **settings):
    """Sequences with branches, int [rows], and the share of rounds that began with a branch."""
    pair = mirror.Mirror(TOY, model_draft(LM, K), candidates, *meshes())
    prompt, length = np.tile(np.int32(PROMPT), (rows, 1)), np.full(rows, 2)
    settings = {"max_new_tokens": N} | settings
    params = TARGET, mirror.place(DRAFT, meshes()[1])
    out = mirror.generate(jax.random.key(key), pair, *params, RULES[rule], prompt, length, **settings)
    plain = speculate.generate(jax.random.key(key), LM, TARGET, pair.draft, DRAFT, RULES[rule], prompt, length, **settings)
    return out, all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(out.generation), jax.device_get(plain))))


def law():
    """Sequences of many rows, by rule and number of candidates, and whether they are the plain loop's."""
    found = {}
    for rule in RULES:
        for candidates in (1, V):
            out, same = decode(rule, candidates, EACH)
            tokens = np.asarray(out.generation.tokens).tolist()
            found[f"{rule} {candidates}"] = {"tokens": tokens, "same": same, "missed": out.rounds - 1 - out.reused}
    return found


def alone():
    """One row and one candidate, so that some branches are reused: (rounds, reused, whether the tokens are the plain loop's)."""
    runs = [decode("exact", 1, 1, key, max_new_tokens=24) for key in range(4)]
    return [(out.rounds, out.reused, same) for out, same in runs]


def branches():
    """The drafted tokens of many rows, and the branches after a guess at each place: tokens, and probs of the first row."""
    draft, here = model_draft(LM, K), meshes()[1]
    params = mirror.place(DRAFT, here)
    request = requests.check(jax.random.key(5), np.tile(np.int32(PROMPT), (EACH, 1)), np.full(EACH, 2), N)
    state = mirror.start(LM, K, 2 + N + K + 1, TARGET, mirror.send(request, meshes()[0]))
    drafted, side = mirror.begin(draft, 2, params, mirror.send(state._replace(cache=()), here))
    guesses = mirror.send(np.tile(np.int32([[0], [2], [1]]), (EACH, 1, 1)), here)
    proposal, _ = mirror.roll_out(draft, params, side, drafted.tokens, guesses)
    tokens, probs = np.asarray(proposal.tokens).reshape(EACH, K + 1, K), np.asarray(proposal.probs[: K + 1])
    return {"drafted": np.asarray(drafted.tokens).tolist(), "tokens": tokens.tolist(), "probs": probs.tolist()}


def real():
    """Greedy and sampled rows of a transformer, ragged, of which some end early: whether the tokens are the plain loop's."""
    shape = transformer.Config((24, 4), 24, 16, 3, 2, 1, 8, 24)
    params = transformer.init_params(jax.random.key(0), shape)
    small = dataclasses.replace(shape, layers=1)
    draft, own = (
        model_draft(transformer.language_model(small), 3),
        {k: v for k, v in params.items() if k not in ("layer_1", "layer_2")},
    )
    pair = mirror.Mirror(transformer.split(shape, 2), draft, 3, *meshes())
    prompt, length = np.random.default_rng(0).integers(0, 28, (3, 5)).astype(np.int32), np.array([5, 1, 3])
    settings = {
        "max_new_tokens": 12,
        "limit": [12, 0, 7],
        "stop_ids": (7,),
        "sampling": [Sampling(temperature=0), Sampling(), Sampling(top_k=5, repetition_window=3)],
    }
    asked = verify.exact(), prompt, length
    plain = speculate.generate(jax.random.key(1), pair.split.model, params, draft, own, *asked, **settings)
    out = mirror.generate(jax.random.key(1), pair, params, mirror.place(own, meshes()[1]), *asked, **settings)
    greedy = {**settings, "sampling": Sampling(temperature=0)}
    oracle = speculate.autoregressive(jax.random.key(1), pair.split.model, params, prompt, length, **greedy)
    best = mirror.generate(jax.random.key(1), pair, params, mirror.place(own, meshes()[1]), *asked, **greedy)
    return {
        "same": all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(out.generation), jax.device_get(plain)))),
        "greedy": np.array_equal(best.generation.tokens, oracle.tokens),
        "reused": best.reused,
    }


if __name__ == "__main__":
    json.dump({"law": law(), "alone": alone(), "branches": branches(), "real": real()}, sys.stdout)
