"""The training loop: AdamW, a moving average of the weights, checkpoints to resume from, a log and its plot.

The loop knows no model: it is given weights, a loss and batches. Any pytree of arrays can be trained. On a mesh the batch is
divided over the devices, and so is each large array: of the weights, of the optimizer and of the loss (FSDP, arXiv 2304.11277).
"""

import contextlib
import dataclasses
import logging
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.train import log as logs
from jaxspec.types import Array, Params

_WHOLE = 2**14  # elements of an array that is not divided
_DISK_FULL = ("No space left", "RESOURCE_EXHAUSTED", "File too large")

Metrics = Mapping[str, Any]  # numbers and lists of numbers by name
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
    evaluate_every: in steps; 0: never.
    accumulate: parts of a batch whose gradients are averaged one after the other.
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
    evaluate_every: int = 0
    accumulate: int = 1
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
    evaluate: Callable[[Params], Metrics] | None = None,
    draw: Callable[[Path], None] = logs.plot,
    mesh: Mesh | None = None,
) -> Params:
    """Trains, resuming from the newest checkpoint in ``directory``.

    A resumed run has the batches, keys and metrics of an uninterrupted one, and its log.

    Args:
        directory: for checkpoints, ``log.jsonl`` and the picture; created if it does not exist.
        params: the initial weights; donated, so that there is no copy of them.
        loss: the function to minimise; arrays of a ``jax.tree_util.Partial`` are arguments of the compiled program.
        batches: batches(step) yields batches without end, starting with that of ``step``, so that a resumed run sees new ones.
        config: steps and rates.
        progress: called with a line of text every ``log_every`` steps.
        evaluate: called with the moving average of the weights every ``evaluate_every`` steps and at the end; what it returns is
            logged.
        draw: draws the picture into ``directory``, after each checkpoint.
        mesh: with the axis "data", over which the rows of a batch and large arrays are divided; None: one device.

    Returns:
        the moving average of the weights.

    Raises:
        RuntimeError: the batches ended.
        ValueError: another process trains in the directory, or the mesh does not divide a batch.
        FloatingPointError: the loss became NaN or infinite; the checkpoint before that step is kept.
        OSError: the disk is full.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with logs.locked(directory), _manager(directory) as manager:
        state = _restore(manager, init_state(params, config))
        first, start = int(state.step), time.monotonic()
        logs.cut(directory, first)
        put = _put(mesh, config.accumulate)
        update, state, loss = update_step(config), _divide(state, mesh), _divide(_as_partial(loss), mesh)
        watch = _Finite(directory)
        with contextlib.closing(_prefetch(batches(first))) as source:
            for done in range(first + 1, config.steps + 1):
                state, metrics = update(loss, state, put(next(source)))
                watch.add(done, metrics["loss"])
                evaluating = evaluate is not None and _due(done, config.evaluate_every, config.steps)
                saving = _due(done, config.checkpoint_every, config.steps)
                reporting = done % config.log_every == 0 or evaluating
                if reporting or saving:
                    watch.check()
                if reporting:
                    found = evaluate(state.ema_params) if evaluate is not None and evaluating else {}
                    step_s = (time.monotonic() - start) / (done - first)
                    progress(logs.write(directory, done, config.steps, jax.device_get(metrics) | dict(found), step_s))
                if saving:
                    _save(manager, done, state)
                    draw(directory)
    return state.ema_params


def data_mesh() -> Mesh | None:
    """The devices of this machine along the axis "data"; None where there is one."""
    devices = jax.local_devices()
    if not jax.sharding.get_mesh().empty:
        return jax.sharding.get_mesh()
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices) if len(devices) > 1 else None


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
        return _restore(manager, jax.eval_shape(lambda: init_state(like, TrainConfig(1, 1.0)))).ema_params


def _due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)


class _Finite:
    """Looks at the losses, one step late, so that the device does not wait for the host."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.waiting: list[tuple[int, Array]] = []

    def add(self, step: int, value: Array) -> None:
        """Takes the loss of a step, and checks that of the step before."""
        self.check()
        self.waiting.append((step, value))

    def check(self) -> None:
        """Raises FloatingPointError where a loss is not finite."""
        for step, value in self.waiting:
            if not math.isfinite(number := float(jax.device_get(value))):
                raise FloatingPointError(
                    f"expected a finite loss, got {number} in step {step}: lower the learning rate; the last good checkpoint is "
                    f"kept in {self.directory}"
                )
        self.waiting = []


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Writes a checkpoint; the one before it is removed when this one is complete."""
    full = OSError(
        f"expected room for the checkpoint of step {step} in {manager.directory}, got a full disk: free some space and run it "
        "again; the checkpoint before is kept"
    )
    if shutil.disk_usage(str(manager.directory)).free < sum(leaf.nbytes for leaf in jax.tree.leaves(state)):
        raise full
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # Orbax logs the trace of an error that is raised here
    try:
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    except Exception as error:  # Orbax raises many kinds of errors
        if isinstance(error, OSError) or any(reason in str(error) for reason in _DISK_FULL):
            raise full from error
        raise
    finally:
        logger.setLevel(level)


def _as_partial(loss: Loss) -> Loss:
    return jax.tree_util.Partial(loss) if jax.tree_util.all_leaves([loss]) else loss


def _divide(tree: Any, mesh: Mesh | None) -> Any:
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Large arrays are divided over the axis "data" along the longest of their axes that it divides; the rest are replicated.

    Args:
        tree: arrays or their shapes.
        mesh: with the axis "data".
    """

    def of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["data"] == 0]
        if leaf.size <= _WHOLE or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "data"))

    return jax.tree.map(of, tree)


def check_rows(rows: int, devices: int, accumulate: int) -> None:
    """Raises ValueError where the rows of a batch cannot be divided over the devices, and those of each into parts."""
    if rows % (devices * accumulate):
        raise ValueError(
            f"expected rows that {devices} devices times {accumulate} parts divide, got {rows}: change rows or accumulate in the "
            "recipe"
        )


def _put(mesh: Mesh | None, accumulate: int) -> Callable[[Any], Any]:
    """Puts batches on the devices, their rows divided among them."""
    parts = 1 if mesh is None else mesh.shape["data"]

    def put(batch: Any) -> Any:
        for leaf in jax.tree.leaves(batch) if parts * accumulate > 1 else ():
            check_rows(len(leaf), parts, accumulate)
        return jax.device_put(batch, None if mesh is None else NamedSharding(mesh, PartitionSpec("data")))

    return put


def _manager(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=1))


def _restore(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """The newest checkpoint, or ``like`` where there is none."""
    if (newest := manager.latest_step()) is None:
        return like
    restored: Any = manager.restore(newest, args=ocp.args.StandardRestore(jax.eval_shape(lambda: like)))
    return restored


def init_state(params: Params, config: TrainConfig) -> TrainState:
    """The state before the first step; ``params`` become part of it."""
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


def update_step(config: TrainConfig) -> Callable[[Loss, TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One jitted optimizer step; the state is donated."""
    optimizer = _optimizer(config)

    def update(loss: Loss, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        metrics, gradient = _gradient(loss, state.params, batch, key, config.accumulate)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        # The average has a short memory early on, so that the random initial weights are forgotten.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda a, p: (a * decay + p * (1 - decay)).astype(a.dtype), state.ema_params, params)
        return TrainState(params, ema, optimizer_state, state.step + 1), metrics

    return jax.jit(update, donate_argnums=1)


def _gradient(loss: Loss, params: Params, batch: Any, key: Array, accumulate: int) -> tuple[dict[str, Array], Params]:
    """The metrics with the loss, and the gradient: of the whole batch, or the means over its parts."""

    def once(part: Any, key: Array) -> tuple[dict[str, Array], Params]:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, part, key)
        return {"loss": value, **metrics}, gradient

    if accumulate == 1:
        return once(batch, key)
    # Every accumulate-th row, so that each device keeps its own rows.
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        found = once(part[0], jax.random.fold_in(key, part[1]))
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(once, jax.tree.map(lambda leaf: leaf[0], parts), key)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(accumulate, dtype=jnp.int32)))
    return jax.tree.map(lambda leaf: leaf / accumulate, total)


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
