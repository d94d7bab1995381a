"""The loop under JAX's strict settings: x64, strict dtype promotion, no rank promotion, no implicit transfers."""

import json
import os
import pathlib
import subprocess
import sys

STRICT = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
}

PROGRAM = """
import sys, json
import jax, numpy as np
sys.path.insert(0, {tests!r})
with jax.transfer_guard("allow"):
    from jaxspec import groups, speculate, verify, Sampling, request
    from jaxspec.draft import model_draft, ngram_draft
    from jaxspec.models.transformer import Config, init_params, language_model
    shape = dict(vocab=11, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24, qkv_bias=True, qk_norm=True, head_bias=True)
    big, small = Config((11, 4), layers=2, feature_layers=(0, 2), **shape), Config((11, 4), layers=1, **shape)
    params, draft_params = init_params(jax.random.key(0), big), init_params(jax.random.key(1), small)
    near = groups.acoustic_similarity_groups(np.asarray(params["table_0"]), 0.1, num_codes=10)
    rules = [verify.exact(), verify.tolerance(0.3), verify.coarse_grained(near)]
    key = jax.random.key(5)
target, draft = language_model(big), model_draft(language_model(small), 3)
prompt, length = np.random.default_rng(0).integers(0, 15, (5, 4)), np.array([4, 1, 2, 3, 4])
sampling = [Sampling(temperature=0), Sampling(top_k=5), Sampling(top_p=0.9), Sampling(repetition_window=3),
            Sampling(repetition_penalty=1.2, min_p=0.01, withheld=10, min_new_tokens=3)]
settings = dict(max_new_tokens=9, stop_ids=(10,), sampling=sampling)
said = []
for rule in rules:
    out = speculate.generate(key, target, params, draft, draft_params, rule, prompt, length, **settings)
    said.append(jax.device_get(out.tokens).tolist())
out = speculate.generate(key, target, params, ngram_draft(2, 11), None, rules[0], prompt, length, **settings)
said.append(jax.device_get(out.tokens).tolist())
said.append(jax.device_get(speculate.autoregressive(key, target, params, prompt, length, **settings).tokens).tolist())
asked = request.check(key, prompt, length, 9, None, (10,), sampling)
state = speculate.init(target, params, draft, draft_params, asked, 4 + 9 + 4)
rounds = jax.device_put(np.int32(100))
state = speculate.advance(target, params, draft, draft_params, rules[0], state, rounds)
assert jax.device_get(speculate.finish(state, 9).tokens).tolist() == said[0]
print(json.dumps(said))
"""


def run(settings):
    environment = {name: value for name, value in os.environ.items() if name not in STRICT} | settings | {"JAX_PLATFORMS": "cpu"}
    program = PROGRAM.format(tests=str(pathlib.Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_loop_gives_the_same_tokens_under_strict_settings():
    assert run(STRICT) == run({})
