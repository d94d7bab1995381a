"""Programs that the tests of several hosts run on each of them: python host_programs.py NAME FOLDER."""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import train_programs
from jax.experimental import multihost_utils

from jaxspec import mesh, speculate, verify
from jaxspec.bench.presets import pair
from jaxspec.checkpoint import store
from jaxspec.checkpoint.tensors import Tensor
from jaxspec.common import hosts
from jaxspec.common.trees import flatten
from jaxspec.draft import model_draft
from jaxspec.models import transformer
from jaxspec.models.placement import Placement
from jaxspec.models.transformer import Config
from jaxspec.train.loop import TrainConfig, data_mesh, fit

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
    models = (
        transformer.language_model(TARGET),
        parts["target"],
        model_draft(transformer.language_model(DRAFT), 3),
        parts["draft"],
    )
    with jax.set_mesh(on):
        made = speculate.generate(keys, *models, verify.exact(), prompt, np.array([9, 4, 6]), max_new_tokens=24)
    tokens, length = jax.device_get((made.tokens, made.length))
    if hosts.is_first():
        np.savez(folder / f"tokens-{jax.process_count()}.npz", tokens=tokens, length=length)


def collect(folder):
    """A sum over all devices, without end: what a host is in when another one fails."""
    everywhere = mesh.make(data=jax.device_count())
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(everywhere, jax.P()))
    rows = jax.NamedSharding(everywhere, jax.P("data"))
    while True:
        numbers = np.arange(8, dtype=np.float32)
        assert float(total(jax.make_array_from_callback((8,), rows, lambda at: numbers[at]))) == 28  # noqa: B023
        (folder / f"alive-{jax.process_index()}").touch()


def raises(folder):
    """The second host fails while the first one is in a call that needs both."""
    if not hosts.is_first():
        raise ValueError("expected a good host, got a bad one: repair it")
    collect(folder)


def raises_through_a_call(folder):
    """The second host fails, which the first one sees as an error of a call."""
    if hosts.is_first():
        raise jax.errors.JaxRuntimeError("connection closed by peer")
    raise ValueError("expected a good host, got a bad one: repair it")


def waits(folder):
    """All hosts wait for one that never comes."""
    (folder / f"alive-{jax.process_index()}").touch()
    hosts.wait("never" if hosts.is_first() else "ever")


def train(folder, stop_after=None):
    """Four steps of a regression with large weights, divided over all devices; the weights are written at the end."""

    def progress(line):
        if stop_after and line.startswith(f"step {stop_after}/"):
            raise ValueError(f"expected to be stopped after {stop_after} steps")

    config = TrainConfig(4, 1e-2, warmup_steps=1, checkpoint_every=2, log_every=1)
    start = {"w": jnp.ones((3, 8192), jnp.float32)}
    seen = fit(folder / "run", start, train_programs.wide_loss, train_programs.batches, config, progress, mesh=data_mesh())
    whole = multihost_utils.process_allgather(seen["w"], tiled=True) if hosts.several() else jax.device_get(seen["w"])
    if hosts.is_first():
        np.save(folder / "weights.npy", whole)


def train_until_stopped(folder):
    """The same, stopped after three steps: the checkpoint is that of the second."""
    train(folder, 3)


def llasa_8b():
    """LLaSA-8B's shape with 2 of its 32 layers, and without the table of texts: 2 GB."""
    return dataclasses.replace(pair("llasa-8b", "bfloat16").target, layers=2, input_tables=(66_560,), vocab=66_560)


def write(folder):
    """Writes random parameters of ``llasa_8b``."""

    def random(name, shape):
        def read(start, stop):
            rows = min(stop, shape[0]) - start
            return np.random.default_rng(start).standard_normal((rows, *shape[1:]), np.float32).astype(jnp.bfloat16)

        return Tensor(name, shape, np.dtype(jnp.bfloat16), read)

    shapes = flatten(transformer.abstract_params(llasa_8b()))
    store.write_params(folder, {name: random(name, leaf.shape) for name, leaf in shapes.items()})


def load(folder):
    """Loads them with the model axis over all devices of all hosts; each host writes what it holds and its peak."""
    config = llasa_8b()
    places = transformer.shardings_of(config, Placement(mesh.make(model=jax.device_count())))
    before, read, start = of_process("status", "VmRSS"), of_process("io", "rchar"), time.perf_counter()
    params = jax.block_until_ready(store.read_params(folder, sharding=places))
    took = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    figures = {"host": jax.process_index(), "shards": held, "all": sum(leaf.nbytes for leaf in leaves), "seconds": took}
    figures |= {"peak": of_process("status", "VmHWM") - before, "read": of_process("io", "rchar") - read}
    (folder / f"memory-{jax.process_index()}.json").write_text(json.dumps(figures))


def of_process(file, name):
    """A number that Linux keeps of this process, in bytes."""
    number, unit = re.search(rf"{name}:\s+(\d+)( kB)?", Path("/proc/self", file).read_text()).groups()
    return int(number) * (1024 if unit else 1)


if __name__ == "__main__":
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        hosts.join()
    try:
        globals()[sys.argv[1]](Path(sys.argv[2]))
    except KeyboardInterrupt:
        hosts.end("interrupted", 130)
    except (ValueError, RuntimeError) as error:
        hosts.end(hosts.reason(error), 2)
    hosts.leave()
