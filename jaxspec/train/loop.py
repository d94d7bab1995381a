"""The training loop that every stage shares: AdamW, a moving average of the weights, checkpoints to resume from, a loss curve."""

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from jaxspec.types import Array, Params

Loss = Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]  # (params, batch, key) -> (loss, measures)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. The rate warms up, stays, and in the last part of the steps falls along a cosine."""

    steps: int
    learning_rate: float
    warmup: int = 200
    fall: float = 0.4  # of the steps
    average: float = 0.999
    save_every: int = 500
    report_every: int = 50
    weight_decay: float = 0.01
    seed: int = 0


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    params: Params
    average: Params
    optimizer: Any
    step: Array


def _optimizer(schedule: Schedule) -> optax.GradientTransformation:
    fall = max(int(schedule.fall * schedule.steps), 1)
    parts = [
        optax.linear_schedule(0.0, schedule.learning_rate, schedule.warmup),
        optax.constant_schedule(schedule.learning_rate),
        optax.cosine_decay_schedule(schedule.learning_rate, fall, alpha=0.02),
    ]
    rate = optax.join_schedules(parts, [schedule.warmup, schedule.steps - fall])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.98, weight_decay=schedule.weight_decay))


def _step(loss: Loss, schedule: Schedule) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    optimizer = _optimizer(schedule)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(schedule.seed), state.step)
        (value, measures), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows closely, so that the random start is forgotten.
        rate = jnp.minimum(schedule.average, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a * rate + p * (1 - rate), state.average, params)
        return TrainState(params, average, optimizer_state, state.step + 1), {"loss": value, **measures}

    return jax.jit(step, donate_argnums=0)


def fit(directory: Path, params: Params, loss: Loss, batches: Callable[[int], Iterator[Any]], schedule: Schedule) -> Params:
    """Trains, or goes on from the newest checkpoint in ``directory``, and returns the averaged weights.

    Args:
        directory: for checkpoints, ``log.jsonl`` and ``loss.png``.
        params: the weights to start from.
        loss: what to lower.
        batches: batches(step) yields the batches from that step on, so that a resumed run does not see the first ones again.
        schedule: steps and rates.
    """
    directory = directory.resolve()
    state = _fresh(params, schedule)
    with ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        if (newest := manager.latest_step()) is not None:
            state = manager.restore(newest, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
        step, first = _step(loss, schedule), int(state.step)
        source, began, log = _ahead(batches(first)), time.monotonic(), (directory / "log.jsonl").open("a")
        for index in range(first, schedule.steps):
            state, measures = step(state, next(source))
            done = index + 1
            if done % schedule.report_every == 0:
                _report(log, done, schedule.steps, measures, (time.monotonic() - began) / (done - first))
            if done % schedule.save_every == 0 or done == schedule.steps:
                manager.save(done, args=ocp.args.StandardSave(state))
                plot(directory)
    return state.average


def _ahead(source: Iterator[Any], depth: int = 8) -> Iterator[Any]:
    """The same batches, made by a thread while the last ones are learnt from; what goes wrong there is raised here."""
    ready: queue.Queue = queue.Queue(depth)

    def fill() -> None:
        try:
            for batch in source:
                ready.put(batch)
            ready.put(RuntimeError("training ran out of batches: the source should have no end"))
        except Exception as error:  # whatever it is, the one who waits must hear of it
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        batch = ready.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _fresh(params: Params, schedule: Schedule) -> TrainState:
    return TrainState(params, jax.tree.map(jnp.copy, params), _optimizer(schedule).init(params), jnp.int32(0))


def averaged(directory: Path, like: Params) -> Params:
    """The averaged weights of the newest checkpoint in ``directory``, in the shape of ``like``.

    Raises:
        FileNotFoundError: when the stage has not been run.
    """
    with ocp.CheckpointManager(directory.resolve() / "checkpoints") as manager:
        if manager.latest_step() is None:
            raise FileNotFoundError(f"expected a checkpoint in {directory}: run that stage first")
        state = jax.eval_shape(lambda: _fresh(like, Schedule(1000, 1.0)))  # the schedule leaves no trace in the shapes
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state)).average


def _report(log: Any, done: int, steps: int, measures: dict[str, Array], step_s: float) -> None:
    row = {"step": done, "step_s": round(step_s, 4), **{name: round(float(value), 5) for name, value in measures.items()}}
    print(json.dumps(row), file=log, flush=True)
    text = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in ("step", "step_s"))
    print(f"step {done}/{steps}  {text}  {step_s:.2f} s a step, {(steps - done) * step_s / 60:.0f} min left", flush=True)


def plot(directory: Path) -> None:
    """Draws ``loss.png`` from ``log.jsonl``."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name not in ("step", "step_s")] if rows else []
    figure = Figure(figsize=(3.2 * max(len(names), 1), 3), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(directory / "loss.png", dpi=110)
