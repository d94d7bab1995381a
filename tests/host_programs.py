"""Programs that the tests of several hosts run on each of them: python host_programs.py NAME FOLDER."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import mesh, speculate, verify
from jaxspec.common import hosts
from jaxspec.draft import model_draft
from jaxspec.models import transformer
from jaxspec.models.placement import Placement
from jaxspec.models.transformer import Config

TARGET = Config((264,), 256, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=128)
DRAFT = Config((264,), 256, width=64, layers=1, heads=4, kv_heads=4, head_dim=16, mlp_width=128)


def generate(folder):
    """Tokens of ragged prompts, one key a row, written by the first host: of one device where there is one, else of 2 x 4."""
    on = mesh.make(data=2, model=4) if jax.device_count() == 8 else mesh.make()
    parts = {}
    for name, config in (("target", TARGET), ("draft", DRAFT)):
        made = jax.tree.map(np.asarray, transformer.init_params(jax.random.key(len(name)), config))
        parts[name] = jax.device_put(made, transformer.shardings_of(config, Placement(on)))
    prompt = np.random.default_rng(0).integers(0, 256, (3, 9), np.int32)
    keys = jax.random.split(jax.random.key(5), 3)
    models = transformer.language_model(TARGET), parts["target"], model_draft(transformer.language_model(DRAFT), 3), parts["draft"]
    with jax.set_mesh(on):
        made = speculate.generate(keys, *models, verify.exact(), prompt, np.array([9, 4, 6]), max_new_tokens=24)
    tokens, length = jax.device_get((made.tokens, made.length))
    if hosts.is_first():
        np.savez(folder / f"tokens-{jax.process_count()}.npz", tokens=tokens, length=length)


if __name__ == "__main__":
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        hosts.join()
    globals()[sys.argv[1]](Path(sys.argv[2]))
    hosts.leave()
