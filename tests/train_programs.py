"""Programs that the tests of training run in processes of their own: python train_programs.py NAME FOLDER."""

import functools
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.bench.presets import pair
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.train import drafts, packing
from jaxspec.train import recipe as recipes
from jaxspec.train import samples as samples_lib
from jaxspec.train.drafts import Frozen, Task
from jaxspec.train.loop import TrainConfig, data_mesh, fit

STEPS = 40


def loss(params, batch, key):
    """A regression with noise from the key."""
    error = batch["x"] @ params["w"] - batch["y"] + 0.01 * jax.random.normal(key, batch["y"].shape, jnp.float32)
    return jnp.square(error).mean(), {"largest": jnp.abs(error).max()}


def batches(step):
    while True:
        rng = np.random.default_rng(step)
        x = rng.normal(size=(8, 3)).astype(np.float32)
        yield {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}
        step += 1


def train(folder, every=3, size=3, **more):
    config = TrainConfig(
        STEPS, 1e-2, warmup_steps=2, checkpoint_every=every, log_every=1, evaluate_every=5, **more.pop("config", {})
    )
    start = {"w": jnp.zeros(size, jnp.float32)}
    evaluate = lambda params: {"weights": params["w"]}  # noqa: E731
    return fit(folder, start, more.pop("loss", loss), batches, config, lambda line: None, evaluate, lambda folder: None, **more)


def devices(folder):
    """The same training on one device and on two, where rows and large arrays are divided."""
    assert len(jax.local_devices()) == 2
    mesh = data_mesh()
    one = train(folder / "one")
    for name, accumulate in (("two", 1), ("parts", 2)):
        other = train(folder / name, mesh=mesh, config={"accumulate": accumulate})
        if accumulate == 1:
            np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5)
    start = lambda: {"w": jnp.ones((3, 8192), jnp.float32)}  # noqa: E731
    config = TrainConfig(STEPS, 1e-2)
    whole, divided = (fit(folder / str(on), start(), wide_loss, batches, config, mesh=on)["w"] for on in (None, mesh))
    np.testing.assert_allclose(whole, divided, rtol=1e-4, atol=1e-6)
    assert [shard.data.shape for shard in divided.addressable_shards] == [(3, 4096)] * 2


def full_disk(folder):
    """The disk fills up in the middle of the second checkpoint."""

    def limited(params):
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        return {}

    config = TrainConfig(STEPS, 1e-2, checkpoint_every=3, log_every=100, evaluate_every=5)
    try:
        fit(
            folder,
            {"w": jnp.ones((3, 4000), jnp.float32)},
            wide_loss,
            batches,
            config,
            evaluate=limited,
            draw=lambda folder: None,
        )
    except OSError as error:
        print(error)


def llasa_1b(folder):
    """Two steps of the draft of PCG for random weights of LLaSA-1B's shape; prints the peak of this process in GB."""
    shape = pair("llasa-1b", "bfloat16").target
    target = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), transformer.init_params(jax.random.key(0), shape))
    recipe = recipes.read("pcg")
    task = Task("model", recipes.config(recipe, shape), Sampling(0.8), recipe.loss, 1, 0.0, 0, recipe.memory << 20)
    rng = np.random.default_rng(0)
    made = [np.concatenate([rng.integers(65_537, 190_000, 40), rng.integers(65_537, size=200)]) for _ in range(4)]
    samples = samples_lib.of_rows(made, [40] * 4, ["x"] * 4)
    loss = jax.tree_util.Partial(functools.partial(drafts.loss, task), Frozen(target, None))
    own = drafts.own_params(jax.random.key(0), task, target)
    rows = lambda step: packing.batches(samples, 1, 512, 0, step)  # noqa: E731
    fit(folder, own, loss, rows, TrainConfig(2, 1e-4, warmup_steps=1, checkpoint_every=0, log_every=1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def wide_loss(params, batch, key):
    return jnp.square(batch["x"] @ params["w"]).mean(), {}


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
