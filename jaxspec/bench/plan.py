"""Compiles the real prefill and the real loops for a TPU that is not attached, from shapes alone: memory, time, and checks.

Three programs: ``speculate.init``, and ``speculate.advance`` with a draft and without, for the time of a round and of a plain
step. On a mesh all devices run the same program, and every figure is one device's.

Limits of the figures. XLA's cost analysis counts the body of a loop once, counts traffic within the chip as HBM traffic, and
subtracts one second for each custom call. Cycles are those of the compiler's schedule, which leaves most waiting for HBM out:
loops of known length in full, others once, and the cheapest branch of a conditional. No figure is a measurement.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jaxspec import mesh, speculate
from jaxspec.bench import chips, collectives, hlo, plan_shapes
from jaxspec.bench.hlo import Program
from jaxspec.bench.plan_shapes import (
    Arguments,
    DoesNotFitError,
    Settings,
    abstract_placement,
    arguments,
    bytes_needed,
    check_room,
    group_size,
    memory_parts,
    pair_of,
    placed,
    resolved,
)
from jaxspec.bench.presets import Pair
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.models import transformer
from jaxspec.models.placement import Placement
from jaxspec.request import Request
from jaxspec.state import State
from jaxspec.types import Array, Draft, LanguageModel, Params, Verify

_NARROW = 64  # a table with so few rows may have the shape of a batch's activations
# At default precision a TPU multiplies in bfloat16, and XLA may keep a float32 cache in that type in the loop.
_CACHE_KINDS = {"bfloat16": ("bf16",), "float32": ("f32", "bf16")}


def plan(settings: Settings, prefill: bool = True) -> dict[str, Any]:
    """Compiles the three programs for a mesh of devices of a topology.

    Args:
        settings: what to plan for.
        prefill: whether to compile the prefill by itself too.

    Returns:
        The settings, and "memory", "prefill", "step", "round" and "checks", see ``plan_report.card``. Keys that end in _s are
        seconds, those of "memory" are bytes; all are of one device. Without ``prefill`` its figures are left out.

    Raises:
        ValueError: a setting is out of its range, the model or the topology is unknown, the topology has fewer devices than the
            mesh, or the mesh does not divide the model.
        DoesNotFitError: the parts do not fit in the chip, or the program does not, as the compiler finds.
        ImportError: libtpu is not installed.
    """
    settings = resolved(settings)
    pair, shapes, parts = check_memory(settings)
    chip = chips.chip_of(settings.topology)
    device, devices = chip.device(), chips.devices(settings.topology)
    compiled, compile_s = _compile_all(settings, pair, _mesh(settings, devices), prefill)
    loop, plain = (hlo.parse(compiled[name].as_text()) for name in ("loop", "plain"))
    reads = {
        "target": bytes_needed(pair.target, shapes.target_params, parts["target_cache"]),
        "draft": bytes_needed(pair.draft, shapes.draft_params, parts["draft_cache"]) if pair.draft else 0,
    }
    steps = {"cycles_of_draft_steps": hlo.longest_loop_cycles(loop) if pair.draft else None}
    needed, caches = reads["target"] + settings.draft_length * reads["draft"], _caches(settings, pair)
    result = {
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)},
        "weights": pair.target.weights,
        "target_layers": pair.target.layers,
        "draft_layers": pair.draft.layers if pair.draft else None,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "devices_per_chip": chip.devices,
        "compile_s": compile_s,
        "memory": parts | _memory(compiled["loop"], loop, caches, device.memory_bytes),
        "step": _body(settings, plain, device, reads["target"]),
        "round": _body(settings, loop, device, needed) | _counts(compiled["loop"], device) | steps,
        "checks": _checks(settings, pair, loop, caches, shapes),
    }
    if prefill:
        result["prefill"] = _counts(compiled["prefill"], device) | _entry(hlo.parse(compiled["prefill"].as_text()), device)
    return result


def check_memory(settings: Settings) -> tuple[Pair, Arguments, dict[str, int]]:
    """The shapes of the models, of the arguments of the loop, and the bytes of each part on one device.

    Raises:
        ValueError: as ``plan``.
    """
    settings.check()
    pair, chip, placement = pair_of(settings), chips.chip_of(settings.topology), abstract_placement(settings)
    shapes = arguments(settings, pair, placement)
    parts = memory_parts(settings, pair, shapes, placement)
    check_room(settings, parts, chip.device().memory_bytes)
    return pair, shapes, parts


def _mesh(settings: Settings, devices: list[Any]) -> Mesh:
    """The mesh on devices of the topology."""
    data, model = settings.axes
    if data * model > len(devices):
        raise ValueError(
            f"expected a mesh of at most {len(devices)} devices, those of {settings.topology}, got {settings.mesh}: choose a "
            "larger topology or a smaller mesh"
        )
    return mesh.make(data, model, devices)


def _compile_all(settings: Settings, pair: Pair, grid: Mesh, prefill: bool) -> tuple[dict[str, Any], float]:
    """The speculative "loop", the "plain" loop and perhaps the "prefill", compiled, and the seconds that it took."""
    start, placement = time.perf_counter(), Placement(grid)
    given = arguments(settings, pair, placement)
    target, draft = transformer.language_model(pair.target), _draft(settings, pair)
    made = {}
    with jax.set_mesh(grid):
        if prefill:
            models = target, given.target_params, draft, given.draft_params
            made["prefill"] = compile_for_tpu(speculate.init.lower(*models, given.request, settings.cells))
        made["loop"] = compile_for_tpu(_loop(target, draft, given, placement, settings.cells))
        made["plain"] = compile_for_tpu(
            _loop(target, None, given._replace(draft_params=(), verify=None), placement, settings.cells)
        )
    return made, time.perf_counter() - start


def _loop(target: LanguageModel, draft: Draft | None, given: Arguments, placement: Placement, cells: int) -> Any:
    """The lowered program of ``speculate.advance``, which runs rounds, or plain steps without a draft."""

    def init(target_params: Params, draft_params: Params, request: Request) -> State:
        return speculate.init(target, target_params, draft, draft_params, request, cells)

    def advance(target_params: Params, draft_params: Params, verify: Verify | None, state: State, rounds: Array) -> State:
        return speculate.advance(target, target_params, draft, draft_params, verify, state, rounds)

    shapes = jax.eval_shape(init, given.target_params, given.draft_params, given.request)
    state, rounds = placed(shapes, placement.state(shapes)), jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.sharding())
    return jax.jit(advance, donate_argnums=3).lower(given.target_params, given.draft_params, given.verify, state, rounds)


def _draft(settings: Settings, pair: Pair) -> Draft:
    if pair.draft is None:
        return ngram_draft(settings.draft_length, pair.target.vocab)
    return model_draft(transformer.language_model(pair.draft), settings.draft_length)


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Keeps a program for another machine out of the persistent cache, from which it cannot be read back."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether the cache is used is decided once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def compile_for_tpu(lowered: Any, smaller: str = "a smaller batch or a shorter cache") -> Any:
    """Compiles a lowered program.

    Args:
        lowered: the program.
        smaller: what would fit, for the error.

    Raises:
        DoesNotFitError: it does not fit, as the compiler finds.
    """
    try:
        with _no_persistent_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise DoesNotFitError(f"expected {smaller}, got a program that does not fit, as the compiler finds ({said})") from error


def _caches(settings: Settings, pair: Pair) -> set[tuple]:
    """The identities of the KV caches as one device has them."""
    placement = abstract_placement(settings)
    shapes = [plan_shapes.caches(config, settings, placement) for config in (pair.target, pair.draft) if config is not None]
    return {
        hlo.identity(kind, plan_shapes.local_shape(leaf))
        for leaf in jax.tree.leaves(shapes)
        for kind in _CACHE_KINDS[settings.dtype]
    }


def _matrices(shapes: Arguments) -> set[tuple]:
    """The identities of the float32 products of the matrices of parameters as one device has them."""
    leaves = jax.tree.leaves((shapes.target_params, shapes.draft_params))
    sizes = [plan_shapes.local_shape(leaf) for leaf in leaves if leaf.ndim == 2]
    return {hlo.identity("f32", size) for size in sizes if min(size) > _NARROW}


def _checks(settings: Settings, pair: Pair, program: Program, identities: set[tuple], shapes: Arguments) -> dict[str, Any]:
    """The checks of the loop, and on a mesh those of its collectives."""
    data, model = settings.axes
    sizes = settings.batch // data, pair.target.vocab // model
    found = hlo.checks(program, *sizes, identities, _matrices(shapes), group_size(pair), _int8_as_floats(shapes))
    if data * model == 1:
        return found
    return found | collectives.checks(program, min(4 * pair.target.vocab, *(hlo.identity_bytes(cache) for cache in identities)))


def _int8_as_floats(shapes: Arguments) -> set[tuple]:
    """The identities that copies of int8 matrices would have as floats."""
    leaves = jax.tree.leaves((shapes.target_params, shapes.draft_params))
    matrices = [plan_shapes.local_shape(leaf) for leaf in leaves if leaf.dtype == "int8"]
    return {hlo.identity(kind, shape) for shape in matrices if min(shape) > _NARROW for kind in ("bf16", "f32")}


def _memory(loop: Any, program: Program, caches: set[tuple], room: int) -> dict[str, Any]:
    """What the compiler says of the loop's program; its arguments hold the caches."""
    said = loop.memory_analysis()
    carried = hlo.arrays(program.loop.shape) if program.loop else []
    total = total_bytes(said)
    return {
        "arguments": said.argument_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "code": said.generated_code_size_in_bytes,
        "caches_as_laid_out": sum(hlo.laid_out_bytes(array) for array in carried if array.identity in caches),
        "parameters_laid_out_anew": sum(hlo.laid_out_bytes(array) for array in hlo.laid_out_anew(program, caches)),
        "total": total,
        "room": room,
        "fits": total <= room,
    }


def total_bytes(said: Any) -> int:
    """The memory of a device that a program needs, from its ``memory_analysis``."""
    total = said.argument_size_in_bytes + said.output_size_in_bytes + said.temp_size_in_bytes + said.generated_code_size_in_bytes
    return total - said.alias_size_in_bytes


def _entry(program: Program, chip: chips.Chip) -> dict[str, Any]:
    """The schedule of a whole program."""
    return _schedule(program, program.entry, chip)


def _body(settings: Settings, program: Program, chip: chips.Chip, needed: float) -> dict[str, Any]:
    """One iteration of a loop: what it must read, its schedule, its collectives, and the estimate that follows from these."""
    counted = collectives.summary(program, program.body)
    total = collectives.total(counted)
    figures = {
        "bytes_needed": needed,
        "bandwidth_bound_s": needed / chip.bytes_per_s,
        **_schedule(program, program.body, chip),
        "collectives": counted,
        "collectives_s": total["count"] * settings.collective_us * 1e-6,
        "links_s": total["bytes"] / chip.link_bytes_per_s,
    }
    return figures | {"estimate_s": estimate_s(figures)}


def estimate_s(figures: Mapping[str, Any]) -> float:
    """The time of an iteration: the larger of the least time to read and the schedule, and after it the collectives."""
    return max(figures["bandwidth_bound_s"], figures["cycles_s"] or 0.0) + figures["collectives_s"] + figures["links_s"]


def _schedule(program: Program, name: str, chip: chips.Chip) -> dict[str, Any]:
    cycles = hlo.scheduled_cycles(program, name)
    return {"cycles": cycles, "cycles_s": cycles / chip.clock_hz if chip.clock_hz else None}


def _counts(compiled: Any, chip: chips.Chip) -> dict[str, Any]:
    """What XLA counts in a program."""
    operations, moved, optimal_s = _cost(compiled, chip)
    return {
        "operations": operations,
        "compute_bound_s": operations / chip.bf16_per_s,
        "bytes": moved,
        "optimal_s": optimal_s,
    }


def _cost(compiled: Any, chip: chips.Chip) -> tuple[float, float, float]:
    """Operations, bytes, and XLA's own estimate without the whole seconds that it subtracts for custom calls."""
    cost = compiled.cost_analysis()
    least = 0.5 * cost["flops"] / chip.bf16_per_s
    return cost["flops"], cost["bytes accessed"], least + (cost["optimal_seconds"] - least) % 1.0
