"""The numerical core under x64, without rank promotion, with strict dtype promotion, and without transfers while it runs."""

import os
import subprocess
import sys

STRICT = """
import jax, jax.numpy as jnp, numpy as np
from jaxspec.groups import acoustic_similarity_groups, swap
from jaxspec.sampling import Sampling, probabilities, rows, sample
from jaxspec.types import History
from jaxspec.verify import coarse_grained, exact, tolerance

assert jax.config.jax_enable_x64 and jax.random.key_impl(jax.random.key(0)) == "rbg"
VOCAB, K = 300, 3
embeddings = np.random.default_rng(0).normal(size=(VOCAB, 3))
groups = acoustic_similarity_groups(embeddings, np.float64(0.9), num_codes=np.int64(VOCAB - 1))
assert {array.dtype for array in groups} == {np.dtype("int32")}
settings = [
    Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
    Sampling(temperature=0, repetition_penalty=1.2),
    Sampling(top_k=25, top_p=0.8, repetition_window=10),
    Sampling(repetition_window=2, repetition_redraw_all=True, withheld=3, min_new_tokens=99),
]
batch = len(settings)

@jax.jit
def round_of(verify, keys, logits, settings, history):
    probs = probabilities(logits, settings, history)
    drafted = jax.vmap(sample)(keys, probs[:, 1:])
    verdict = jax.vmap(verify)(keys, drafted, probs[:, 1:], probs)
    return probs, drafted, verdict, jax.vmap(swap, (0, None, 0))(keys, groups, drafted)

arguments = (
    jax.random.split(jax.random.key(0), batch),
    jnp.float32(np.random.default_rng(1).normal(size=(batch, K + 1, VOCAB))),
    rows(settings, batch),
    History(jnp.zeros((batch, 20), jnp.int64), jnp.full(batch, 2, jnp.int32), jnp.full(batch, 9, jnp.int64)),
)
for verify in (exact(), tolerance(np.float64(0.4)), coarse_grained(groups)):
    with jax.transfer_guard("disallow"):
        out = round_of(verify, *arguments)
    probs, *integers = jax.tree.map(np.asarray, out)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(integers)} == {np.dtype("int32")}
alone = probabilities(arguments[1][2], settings[2], History(jnp.zeros(20, jnp.int32), jnp.int32(2), jnp.int32(9)))
np.testing.assert_allclose(alone, probs[2], atol=1e-6)
assert probabilities(jnp.zeros(9), settings[0]).dtype == np.float32  # float64 logits
assert sample(jax.random.key(0), jnp.ones((2, 9))).dtype == np.int32
"""


def test_every_strict_mode_at_once():
    """x64, no rank promotion, strict dtype promotion, rbg by default, warnings as errors, and no transfers in compiled parts."""
    modes = {"ENABLE_X64": "1", "NUMPY_RANK_PROMOTION": "raise", "NUMPY_DTYPE_PROMOTION": "strict", "DEFAULT_PRNG_IMPL": "rbg"}
    environment = os.environ | {f"JAX_{name}": value for name, value in modes.items()}
    done = subprocess.run([sys.executable, "-W", "error", "-c", STRICT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
