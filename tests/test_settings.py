"""Settings refuse what would fail later, and seeds of any size give keys of their own."""

import math

import jax
import numpy as np
import pytest

from jaxspec import verify
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.contract import Reference, Settings
from jaxspec.synthesis.decoding import resolve
from jaxspec.verify.rules import RULES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("beta", value) for value in (-0.1, 1.1, math.nan, "0.2", True)),
        *(("threshold", value) for value in (-1, 1.5, math.nan, False)),
        *(("draft_length", value) for value in (-1, 1.0, True)),
        *(("max_codes", value) for value in (0, 2.5, True)),
        *(("seed", value) for value in (-1, 0.5, True, "1")),
        *(("temperature", value) for value in (-1, math.nan, math.inf)),
        ("top_k", -1),
        ("top_p", 0),
        ("min_p", 2),
        ("verify", "maybe"),
        ("matrix", "draft"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match={"verify": "verifier", "draft_length": "draft length"}.get(field, field)):
        Settings(**{field: value})


@pytest.mark.parametrize("codes", [np.zeros(0, int), np.zeros(3), np.zeros((1, 2, 3), int), np.int32(3)])
def test_a_reference_holds_a_row_of_codes_or_frames(codes):
    with pytest.raises(ValueError, match="reference codes"):
        Reference("Yes.", codes)


@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_reference_codes_are_int32(shape):
    assert Reference("", np.ones(shape, np.int64)).codes.dtype == np.int32


def data(seed):
    return jax.random.key_data(Settings(seed=seed).key()).tolist()


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, np.int64(5)])
def test_a_seed_below_32_bits_is_the_key_of_jax(seed):
    assert data(seed) == jax.random.key_data(jax.random.key(np.uint32(seed))).tolist()


def test_larger_seeds_are_keys_of_their_own():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**64, 2**64 + 2**32, 10**20, 10**40]
    assert len({tuple(data(seed)) for seed in seeds}) == len(seeds)
    assert data(10**20) == data(10**20)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_resolves_to_its_verifier(name):
    synthesizer = builtin()
    made = resolve(synthesizer, Settings(verify=name, beta=0.3)).verify
    expected = {
        "exact": verify.exact(),
        "tolerance": verify.tolerance(0.3),
        "coarse-grained": verify.coarse_grained(synthesizer.groups(synthesizer.threshold, "target")),
        "block-exact": verify.block_exact(),
        "block-tolerance": verify.block_tolerance(0.3),
        "block-coarse-grained": verify.block_coarse_grained(synthesizer.groups(synthesizer.threshold, "target")),
    }[name]
    assert jax.tree.structure(made) == jax.tree.structure(expected)
