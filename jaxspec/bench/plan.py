"""Compiles the real prefill and the real loops for a TPU that is not attached, from shapes alone: memory, time, and checks.

Three programs: ``speculate.init``, ``speculate.generate_request`` with the whole loop in it, and
``speculate.autoregressive_request``, for the time of a plain step.

Limits of the figures. XLA's cost analysis counts the body of a loop once, counts traffic within the chip as HBM traffic, and
subtracts one second for each custom call. Cycles are those of the compiler's schedule, which leaves most waiting for HBM out:
loops of known length in full, others once, and the cheapest branch of a conditional. No figure is a measurement.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxspec import speculate
from jaxspec.bench import chips, hlo, roofline
from jaxspec.bench.hlo import Program
from jaxspec.bench.plan_shapes import Arguments, Settings, arguments, check_room, group_size, memory_parts, pair_of
from jaxspec.bench.presets import Pair
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.models import transformer
from jaxspec.models.placement import Placement, one_device
from jaxspec.models.transformer import Config
from jaxspec.types import Draft, Params

_NARROW = 64  # a table with so few rows may have the shape of a batch's activations
# At default precision a TPU multiplies in bfloat16, and XLA may keep a float32 cache in that type in the loop.
_CACHE_KINDS = {"bfloat16": ("bf16",), "float32": ("f32", "bf16")}


def plan(settings: Settings, placement: Placement | None = None) -> dict[str, Any]:
    """Compiles the three programs for a device of a topology.

    Args:
        settings: what to plan for.
        placement: on one device of the topology; by default the first.

    Returns:
        The settings, and "memory", "prefill", "step", "round" and "checks", see ``plan_report.card``. Keys that end in _s are
        seconds, those of "memory" are bytes.

    Raises:
        ValueError: a setting is out of its range, the model or the topology is unknown, the parts do not fit in the chip, or the
            placement is not on one of its devices.
        ImportError: libtpu is not installed.
    """
    settings.check()
    pair, chip = pair_of(settings), chips.chip_of(settings.topology)
    shapes, device = arguments(settings, pair), chip.device()
    parts = memory_parts(settings, pair, shapes)
    check_room(settings, parts, device.memory_bytes)
    devices = chips.devices(settings.topology)
    placement = placement or one_device(devices[0])
    if placement.mesh.size != 1 or placement.mesh.devices.flat[0] not in devices:
        raise ValueError(f"expected a placement on one device of {settings.topology}, got {placement.mesh}: use one_device")
    prefill, loop, plain, compile_s = _compile_all(settings, pair, _placed(shapes, pair, placement))
    program = hlo.parse(loop.as_text())
    read = {
        name: roofline.model_pass(config, settings.batch, 1, settings.cells).bytes if config else 0
        for name, config in (("target", pair.target), ("draft", pair.draft))
    }
    caches = _caches(settings, pair)
    return {
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)},
        "weights": pair.target.weights,
        "target_layers": pair.target.layers,
        "draft_layers": pair.draft.layers if pair.draft else None,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "devices_per_chip": chip.devices,
        "compile_s": compile_s,
        "memory": parts | _memory(loop, program, caches, device.memory_bytes),
        "prefill": _counts(prefill, device) | _entry(hlo.parse(prefill.as_text()), device),
        "step": _body(hlo.parse(plain.as_text()), device, read["target"]),
        "round": _body(program, device, read["target"] + settings.draft_length * read["draft"])
        | _counts(loop, device, prefill)
        | {"cycles_of_draft_steps": hlo.longest_loop_cycles(program) if pair.draft else None},
        "checks": hlo.checks(
            program, settings.batch, pair.target.vocab, caches, _matrices(shapes), group_size(pair), _int8_as_floats(shapes)
        ),
    }


def _compile_all(settings: Settings, pair: Pair, placed: Arguments) -> tuple[Any, Any, Any, float]:
    """Prefill, speculative loop and plain loop, compiled, and the seconds that it took."""
    start = time.perf_counter()
    target, draft = transformer.language_model(pair.target), _draft(settings, pair)
    models = target, placed.target_params, draft, placed.draft_params
    prefill = compile_for_tpu(speculate.init.lower(*models, placed.request, settings.cells))
    loop = compile_for_tpu(speculate.generate_request.lower(target, draft, settings.capacity, *placed))
    plain = compile_for_tpu(
        speculate.autoregressive_request.lower(target, settings.capacity, placed.target_params, placed.request)
    )
    return prefill, loop, plain, time.perf_counter() - start


def _draft(settings: Settings, pair: Pair) -> Draft:
    if pair.draft is None:
        return ngram_draft(settings.draft_length, pair.target.vocab)
    return model_draft(transformer.language_model(pair.draft), settings.draft_length)


def _placed(shapes: Arguments, pair: Pair, placement: Placement) -> Arguments:
    """The shapes with the shardings of a placement."""

    def params(config: Config | None, leaves: Params) -> Params:
        return () if config is None else placed(leaves, transformer.shardings_of(config, placement))

    return Arguments(
        params(pair.target, shapes.target_params),
        params(pair.draft, shapes.draft_params),
        placed(shapes.verify, jax.tree.map(lambda leaf: placement.sharding(), shapes.verify)),
        placed(shapes.request, placement.state(shapes.request)),
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, trees of the same structure."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)


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
        ValueError: it does not fit, as the compiler finds.
    """
    try:
        with _no_persistent_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise ValueError(f"expected {smaller}, got a program that does not fit, as the compiler finds ({said})") from error


def _caches(settings: Settings, pair: Pair) -> set[tuple]:
    """The identities of the KV caches."""
    return {
        hlo.identity(kind, (settings.batch, settings.cells, config.kv_heads, config.head_dim))
        for config in (pair.target, pair.draft)
        if config is not None
        for kind in _CACHE_KINDS[settings.dtype]
    }


def _matrices(shapes: Arguments) -> set[tuple]:
    """The identities of the float32 products of the matrices of parameters."""
    leaves = jax.tree.leaves((shapes.target_params, shapes.draft_params))
    return {hlo.identity("f32", leaf.shape) for leaf in leaves if leaf.ndim == 2 and min(leaf.shape) > _NARROW}


def _int8_as_floats(shapes: Arguments) -> set[tuple]:
    """The identities that copies of int8 matrices would have as floats."""
    leaves = jax.tree.leaves((shapes.target_params, shapes.draft_params))
    matrices = [leaf.shape for leaf in leaves if leaf.dtype == "int8" and min(leaf.shape) > _NARROW]
    return {hlo.identity(kind, shape) for shape in matrices for kind in ("bf16", "f32")}


def _memory(loop: Any, program: Program, caches: set[tuple], room: int) -> dict[str, Any]:
    """What the compiler says of the loop's program; its temporaries hold the caches."""
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


def _body(program: Program, chip: chips.Chip, needed: float) -> dict[str, Any]:
    """One iteration of a loop: what it must read, and its schedule."""
    bound = {"bytes_needed": needed, "bandwidth_bound_s": needed / chip.bytes_per_s}
    return bound | _schedule(program, program.body, chip)


def _schedule(program: Program, name: str, chip: chips.Chip) -> dict[str, Any]:
    cycles = hlo.scheduled_cycles(program, name)
    return {"cycles": cycles, "cycles_s": cycles / chip.clock_hz if chip.clock_hz else None}


def _counts(compiled: Any, chip: chips.Chip, without: Any = None) -> dict[str, Any]:
    """What XLA counts in a program, less what it counts in another."""
    operations, moved, optimal_s = (
        of_program - of_other
        for of_program, of_other in zip(_cost(compiled, chip), _cost(without, chip) if without else (0, 0, 0), strict=True)
    )
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
