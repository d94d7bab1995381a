"""The training loop: AdamW, a moving average of the weights, checkpoints to resume from, a log and its plot.

The loop knows no model: it is given weights, a loss and batches. Any pytree of arrays can be trained.
"""

import contextlib
import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from jaxspec.common.files import replacing
from jaxspec.types import Array, Params

Loss = Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]  # (params, batch, key) -> (loss, metrics)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Steps and rates. The learning rate warms up linearly, stays constant, and decays along a cosine to 2 % at the end.

    steps: optimizer steps in all.
    learning_rate: the constant one.
    warmup_steps: steps of the linear warm-up.
    decay_fraction: the fraction of the steps, the last ones, in which the rate decays.
    ema_decay: of the moving average of the weights.
    weight_decay: of AdamW.
    checkpoint_every, log_every: in steps.
    seed: of the keys that the loss receives, one for each step.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 200
    decay_fraction: float = 0.4
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    params: Params
    ema_params: Params
    optimizer: Any  # optax's state
    step: Array  # int32 []


def fit(
    directory: Path,
    params: Params,
    loss: Loss,
    batches: Callable[[int], Iterator[Any]],
    config: TrainConfig,
    progress: Callable[[str], None] = print,
) -> Params:
    """Trains, resuming from the newest checkpoint in ``directory``.

    Args:
        directory: for checkpoints, ``log.jsonl`` and ``loss.png``; created if it does not exist.
        params: the initial weights.
        loss: the function to minimise.
        batches: batches(step) yields batches without end, starting with that of ``step``, so that a resumed run sees new ones.
        config: steps and rates.
        progress: called with a line of text every ``log_every`` steps.

    Returns:
        the moving average of the weights.

    Raises:
        RuntimeError: the batches ended.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with _manager(directory) as manager:
        state = _restore(manager, _init(params, config))
        update, first, start = _update(loss, config), int(state.step), time.monotonic()
        with contextlib.closing(_prefetch(batches(first))) as source:
            for done in range(first + 1, config.steps + 1):
                state, metrics = update(state, next(source))
                if done % config.log_every == 0:
                    progress(_log(directory, done, config.steps, metrics, (time.monotonic() - start) / (done - first)))
                if done % config.checkpoint_every == 0 or done == config.steps:
                    manager.save(done, args=ocp.args.StandardSave(state))
                    plot(directory)
    return state.ema_params


def load_ema(directory: Path, like: Params) -> Params:
    """Reads the moving average of the weights from the newest checkpoint.

    Args:
        directory: that of ``fit``.
        like: weights of the same structure, shapes and types.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    with _manager(directory.resolve()) as manager:
        if manager.latest_step() is None:
            raise FileNotFoundError(f"expected a checkpoint in {directory}, got none: run that stage first")
        return _restore(manager, jax.eval_shape(lambda: _init(like, TrainConfig(1, 1.0)))).ema_params


def plot(directory: Path) -> None:
    """Draws ``loss.png`` from ``log.jsonl``, a panel for each metric. A log without rows gives no picture."""
    from matplotlib.figure import Figure

    log = directory / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not rows:
        return
    names = [name for name in rows[0] if name not in ("step", "step_s")]
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    with replacing(directory / "loss.png") as partial:
        figure.savefig(partial, format="png", dpi=110)


def _manager(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=1))


def _restore(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """The newest checkpoint, or ``like`` where there is none."""
    if (newest := manager.latest_step()) is None:
        return like
    restored: Any = manager.restore(newest, args=ocp.args.StandardRestore(jax.eval_shape(lambda: like)))
    return restored


def _init(params: Params, config: TrainConfig) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # the state is donated, the caller's weights are not
    return TrainState(params, jax.tree.map(jnp.copy, params), _optimizer(config).init(params), jnp.int32(0))


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    decay_steps = max(int(config.decay_fraction * config.steps), 1)
    parts = [
        optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
        optax.constant_schedule(config.learning_rate),
        optax.cosine_decay_schedule(config.learning_rate, decay_steps, alpha=0.02),
    ]
    rate = optax.join_schedules(parts, [config.warmup_steps, config.steps - decay_steps])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.98, weight_decay=config.weight_decay))


def _update(loss: Loss, config: TrainConfig) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One jitted optimizer step; the state is donated."""
    optimizer = _optimizer(config)

    def update(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        # The average has a short memory early on, so that the random initial weights are forgotten.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda a, p: (a * decay + p * (1 - decay)).astype(a.dtype), state.ema_params, params)
        return TrainState(params, ema, optimizer_state, state.step + 1), {"loss": value, **metrics}

    return jax.jit(update, donate_argnums=0)


def _prefetch(source: Iterator[Any], depth: int = 8) -> Generator[Any, None, None]:
    """The same batches, made by a thread in advance; errors of the thread are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.2)

    def fill() -> None:
        try:
            for batch in source:
                put(batch)
                if closed.is_set():
                    return
            put(RuntimeError("expected batches without end, got the last one: make the source repeat"))
        except Exception as error:  # of any kind, as it is raised again by the consumer
            put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            batch = ready.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        closed.set()


def _log(directory: Path, done: int, steps: int, metrics: dict[str, Array], step_s: float) -> str:
    """Appends a row to ``log.jsonl``; the same as a line for people."""
    row = {"step": done, "step_s": round(step_s, 4), **{name: round(float(value), 5) for name, value in metrics.items()}}
    with (directory / "log.jsonl").open("a") as log:
        print(json.dumps(row), file=log)
    text = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in ("step", "step_s"))
    return f"step {done}/{steps}  {text}  {step_s:.2f} s per step, {(steps - done) * step_s / 60:.0f} min left"
