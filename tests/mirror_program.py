"""Decodes with the draft on a device of its own, and prints what test_mirror.py checks, as JSON."""

import dataclasses
import itertools
import json
import sys

import chi_square
import fakes
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import Sampling, groups, mirror, speculate, verify
from jaxspec.draft import model_draft
from jaxspec.models import transformer
from jaxspec.types import Split

V, K, N = 4, 2, 4
ROWS = 4000
PROMPT = np.tile(np.int32([2, 0]), (ROWS, 1))
HASH = fakes.hash_model()


def _apply(params, tokens, cache, length):
    logits, _, cache = HASH.apply(params, tokens, cache, length)
    return logits, None, cache


LM = HASH._replace(apply=_apply)
TARGET = fakes.table(3, V)
DRAFT = TARGET + fakes.table(4, V, scale=0.7)
EXIT = fakes.table(5, V, scale=0.7)  # what the exit adds to the target's logits
MESHES = mirror.meshes(1)


def _lower(params, tokens, cache, length):
    logits, _, cache = LM.apply(params, tokens, cache, length)
    return logits, logits + EXIT[:1, None], cache


TOY = Split(LM, _lower, lambda params, hidden, cache, length: (hidden, cache))
RULES = {
    "exact": verify.exact(),
    "coarse-grained": verify.coarse_grained(groups.acoustic_similarity_groups(np.eye(V)[[0, 0, 2, 3]] + 0.0, 0.5)),
    "block-exact": verify.block_exact(),
}


def toy(rule, candidates, key=11, rows=ROWS, sampling=Sampling(), **settings):
    """(the plain loop's generation, the mirrored one)."""
    draft, settings = model_draft(LM, K), {"max_new_tokens": N, "sampling": sampling} | settings
    rest = RULES[rule], PROMPT[:rows], np.full(rows, 2), 
    plain = speculate.generate(jax.random.key(key), LM, TARGET, draft, DRAFT, *rest, **settings)
    pair = mirror.Mirror(TOY, draft, candidates, *MESHES)
    return plain, mirror.generate(jax.random.key(key), pair, TARGET, mirror.place(DRAFT, MESHES[1]), *rest, **settings)


if __name__ == "__main__":
    for rule in RULES:
        for c in (1, 4):
            for rows in (1, 3):
                for key in range(3):
                    plain, m = toy(rule, c, key, rows, max_new_tokens=30)
                    same = jax.tree.map(np.array_equal, jax.device_get(plain), jax.device_get(m.generation))
                    print(rule, c, rows, m.rounds, m.reused, all(jax.tree.leaves(same)))
