"""Compiles the real prefill and the real loops for a TPU that is not there, from shapes alone: memory, time, and what is checked.

Three programs: ``speculate.init``, ``speculate._generate`` with the whole loop in it, and ``speculate._autoregressive``, of which
the time of a step is taken. For now all arguments lie on the first device of the topology; to spread them is to give ``_placed``
another sharding for each, see ``transformer.logical_axes``.

How far the figures go. XLA's cost analysis counts the body of a loop once, traffic within the chip as if it were HBM's, and
minus one second for each custom call. Cycles are those of the schedule that the compiler made, most waiting for HBM left out:
loops of known length in full, others once, and of a conditional (of the laws that no row uses) the cheapest branch.
No figure is a measurement.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import request, speculate
from jaxspec.bench import chips, hlo, presets, roofline
from jaxspec.bench.hlo import Program
from jaxspec.bench.presets import Pair
from jaxspec.checkpoint import descriptions
from jaxspec.draft import model_draft
from jaxspec.groups import Groups
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.verify import coarse_grained

_NARROW = 64  # a table of so few rows may have the shape of a batch's activations
_KINDS = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to plan for.

    model: a preset of ``presets.PAIRS``, or a folder that ``jaxspec convert`` made.
    draft: a folder, or how many of the target's layers; by default the preset's.
    cells: of each row's caches: prompt, emitted tokens, and draft_length + 1 of slack.
    """

    model: str
    topology: str
    draft: str | None = None
    batch: int = 1
    cells: int = 2048
    prompt_length: int = 256
    draft_length: int = 3
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, low in (("batch", 1), ("prompt_length", 1), ("draft_length", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"expected {name.replace('_', ' ')} of {low} or more, got {getattr(self, name)}")
        if self.capacity < 1:
            wanted = self.prompt_length + self.draft_length + 2
            raise ValueError(
                f"expected at least {wanted} cells, for a prompt of {self.prompt_length}, one token, and slack of "
                f"{self.draft_length + 1}, got {self.cells}"
            )

    @property
    def capacity(self) -> int:
        """The tokens that a row may emit."""
        return self.cells - self.prompt_length - self.draft_length - 1


class Arguments(NamedTuple):
    """What the compiled loop takes, as shapes."""

    target_params: Any
    draft_params: Any
    verify: Any
    request: Any


def plan(settings: Settings) -> dict[str, Any]:
    """Compiles the three programs and says what they need.

    Raises:
        ValueError: an unknown model or topology, or more than the chip holds.
        ImportError: libtpu is not installed.
    """
    pair = pair_of(settings)
    chip = chips.chip_of(settings.topology)
    shapes = arguments(settings, pair)
    parts = memory_parts(settings, pair, shapes)
    device = chip.device()
    check_room(settings, parts, device.memory_bytes)

    devices = chips.devices(settings.topology)
    placed = _placed(shapes, jax.sharding.SingleDeviceSharding(devices[0]))
    target = transformer.language_model(pair.target)
    draft = model_draft(transformer.language_model(pair.draft), settings.draft_length)
    prefill, prefill_s = _compile(
        jax.jit(speculate.init, static_argnums=(0, 2, 5)).lower(
            target, placed.target_params, draft, placed.draft_params, placed.request, settings.cells
        )
    )
    loop, loop_s = _compile(speculate._generate.lower(target, draft, settings.capacity, *placed))
    before, program = hlo.parse(prefill.as_text()), hlo.parse(loop.as_text())
    plain, plain_s = _compile(speculate._autoregressive.lower(target, settings.capacity, placed.target_params, placed.request))
    reads = {
        name: roofline.model_pass(config, settings.batch, 1, settings.cells).bytes
        for name, config in (("target", pair.target), ("draft", pair.draft))
    }
    caches = {hlo.identity(_KINDS[c.dtype], (settings.batch, settings.cells, c.kv_heads, c.head_dim)) for c in pair[:2]}
    tables = [leaf.shape for leaf in jax.tree.leaves(shapes[:2]) if leaf.ndim == 2 and min(leaf.shape) > _NARROW]
    matrices = {hlo.identity("f32", shape) for shape in tables}
    return {
        **dataclasses.asdict(settings),
        "target_layers": pair.target.layers,
        "draft_layers": pair.draft.layers,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "devices_per_chip": chip.devices,
        "memory": parts | _memory(loop, program, caches, device.memory_bytes),
        "prefill": _counts(prefill, device) | _schedule(before, before.entry, device) | {"compile_s": prefill_s},
        "step": _turn(hlo.parse(plain.as_text()), device, reads["target"]) | {"compile_s": plain_s},
        "round": _turn(program, device, reads["target"] + settings.draft_length * reads["draft"])
        | _counts(loop, device, prefill)
        | {"cycles_of_draft_steps": hlo.longest_loop_cycles(program), "compile_s": loop_s},
        "checks": hlo.checks(program, settings.batch, pair.target.vocab, caches, matrices),
    }


def pair_of(settings: Settings) -> Pair:
    """The shapes of target and draft.

    Raises:
        ValueError: neither a preset nor a folder, or a draft that does not fit.
    """
    if settings.model in presets.PAIRS:
        pair = presets.pair(settings.model, settings.dtype)
    elif Path(settings.model).is_dir():
        model = _described(settings.model)
        if settings.draft is None:
            raise ValueError("expected --draft with a folder: another folder, or how many of the target's layers")
        pair = Pair(model.shape, model.shape, len(model.stop_ids))
    else:
        raise ValueError(
            f"expected a preset among {', '.join(presets.PAIRS)}, or a folder that `jaxspec convert` made, got {settings.model!r}"
        )
    draft = pair.draft
    if settings.draft is not None and settings.draft.isdecimal():
        if not 1 <= int(settings.draft) <= pair.target.layers:
            raise ValueError(f"expected 1 to {pair.target.layers} of the target's layers, got {settings.draft}")
        draft = dataclasses.replace(pair.target, layers=int(settings.draft))
    elif settings.draft is not None:
        draft = _described(settings.draft).shape
    if draft.vocab != pair.target.vocab:
        raise ValueError(f"expected a draft of the target's {pair.target.vocab} ids, got one of {draft.vocab}")
    target, draft = (dataclasses.replace(config, dtype=settings.dtype) for config in (pair.target, draft))
    return Pair(target, draft, pair.stops)


def _described(folder: str) -> Model:
    return descriptions.read_as(folder, Model)


def arguments(settings: Settings, pair: Pair) -> Arguments:
    """The shapes that a call of ``generate`` with groups of ``presets.GROUP_SIZE`` would have."""

    def params(config: Config) -> Any:
        leaves = transformer.abstract_params(config)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype)), leaves)

    vocab, whole = pair.target.vocab, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    codes = vocab - pair.stops
    size = min(presets.GROUP_SIZE, codes)
    groups = Groups(whole((vocab, size)), whole((vocab,)), whole((codes * size + pair.stops,)), whole((vocab,)), whole((vocab,)))
    prompt = np.zeros((settings.batch, settings.prompt_length), np.int32)
    lengths = np.full(settings.batch, settings.prompt_length)
    stops = tuple(range(codes, vocab))
    asked = jax.eval_shape(lambda: request.check(jax.random.key(0), prompt, lengths, settings.capacity, None, stops, Sampling()))
    return Arguments(params(pair.target), params(pair.draft), coarse_grained(groups), asked)


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_parts(settings: Settings, pair: Pair, shapes: Arguments) -> dict[str, int]:
    """The bytes of each part by its shape, before the chip's padding.

    ``shared`` is in both models' parameters, one copy of which serves both where the draft was cut from the target.
    """
    names = [name for name in shapes.draft_params if name == "head" or name.startswith("table_")]
    tables = {name: shapes.draft_params[name] for name in names}
    return {
        "target": _bytes(shapes.target_params),
        "draft": _bytes(shapes.draft_params),
        "shared": _bytes({name: leaf for name, leaf in tables.items() if shapes.target_params.get(name) == leaf}),
        "groups": _bytes(shapes.verify),
        "target_cache": presets.cache_bytes(pair.target, settings.batch, settings.cells),
        "draft_cache": presets.cache_bytes(pair.draft, settings.batch, settings.cells),
    }


def check_room(settings: Settings, parts: dict[str, int], room: int) -> None:
    """Raises ValueError, with the arithmetic, where the parts alone pass the memory of a device."""
    fixed = parts["target"] + parts["draft"] + parts["groups"]
    row = (parts["target_cache"] + parts["draft_cache"]) // settings.batch
    total, most = fixed + settings.batch * row, (room - fixed) // row
    if most >= settings.batch:
        return
    wanted = f"a batch of at most {most}" if most > 0 else "a smaller model, or fewer cells"
    size = {name: _size(count) for name, count in parts.items()}
    raise ValueError(
        f"expected {wanted} on one device of {settings.topology}: target {size['target']} + draft {size['draft']} + groups "
        f"{size['groups']} + caches {settings.batch} x {_size(row)}, {settings.cells} cells each, = {_size(total)}, but it has "
        f"{_size(room)}"
    )


def _compile(lowered: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    try:
        return lowered.compile(), time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise ValueError(
            f"expected a smaller batch or fewer cells: the compiler finds that the program does not fit ({said})"
        ) from error


def _memory(loop: Any, program: Program, caches: set[tuple], room: int) -> dict[str, Any]:
    """What the compiler says of the loop's program; its temporaries hold the caches."""
    said = loop.memory_analysis()
    carried = hlo.arrays(program.loop.shape)
    total = said.argument_size_in_bytes + said.output_size_in_bytes + said.temp_size_in_bytes + said.generated_code_size_in_bytes
    total -= said.alias_size_in_bytes
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


def _schedule(program: Program, name: str, chip: chips.Chip) -> dict[str, Any]:
    """The cycles that a computation is scheduled to take."""
    cycles = hlo.scheduled_cycles(program, name)
    return {"cycles": cycles, "cycles_s": cycles / chip.clock_hz if chip.clock_hz else None}


def _turn(program: Program, chip: chips.Chip, needed: int) -> dict[str, Any]:
    """One turn of a loop: what it must read, and its schedule."""
    bound = {"bytes_needed": needed, "bandwidth_bound_s": needed / chip.bytes_per_s}
    return bound | _schedule(program, program.body, chip)


def _counts(compiled: Any, chip: chips.Chip, without: Any = None) -> dict[str, Any]:
    """What XLA counts in a program, or what that has more than another."""
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
    """Operations, bytes, and XLA's own estimate without the whole seconds that it takes off for custom calls."""
    cost = compiled.cost_analysis()
    least = 0.5 * cost["flops"] / chip.bf16_per_s
    return cost["flops"], cost["bytes accessed"], least + (cost["optimal_seconds"] - least) % 1.0


def _size(count: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or unit == 1e3)
    return f"{count / unit:,.4g} {name}"


def card(result: dict[str, Any]) -> str:
    """The plan for people."""
    memory, prefill, step, turn = result["memory"], result["prefill"], result["step"], result["round"]
    size = {name: _size(count) for name, count in memory.items()}
    device = "one chip" if result["devices_per_chip"] == 1 else f"one of the {result['devices_per_chip']} devices of a chip"
    lines = [
        f"{result['model']}, {result['target_layers']} layers, and a draft of {result['draft_layers']}, in {result['dtype']}: "
        f"batch {result['batch']}, {result['cells']} cells, prompt of {result['prompt_length']}, K = {result['draft_length']}",
        f"on {device} of {result['topology']} ({result['device']}); nothing was run, and compiling took "
        f"{prefill['compile_s'] + step['compile_s'] + turn['compile_s']:.0f} s",
        "memory by shape",
        f"  target {size['target']}, draft {size['draft']} ({size['shared']} of both are tables that may be the same)",
        f"  groups {size['groups']}, caches {size['target_cache']} + {size['draft_cache']}",
        "memory as compiled",
        f"  arguments {size['arguments']}, outputs {size['outputs']}, program {size['code']}, temporaries {size['temporaries']}",
        f"  of the temporaries: caches as laid out in HBM {size['caches_as_laid_out']}, parameters in another layout "
        f"{size['parameters_laid_out_anew']}",
        f"  in all {size['total']} of {size['room']}: {'fits' if memory['fits'] else 'DOES NOT FIT'}",
        "prefill",
        *_counted(prefill),
        _scheduled(prefill),
        "one step of the plain loop, for one token a row",
        _bound(step),
        _scheduled(step),
        "one round, for 1 to K + 1 tokens a row",
        *_counted(turn),
        _bound(turn),
        _scheduled(turn),
        f"  of these cycles {turn['cycles_of_draft_steps']:,} in the draft's steps after its first",
        f"  a round is {turn['cycles'] / step['cycles']:.2f} steps as scheduled, "
        f"{turn['bytes_needed'] / step['bytes_needed']:.2f} by what is read: with more tokens a round it pays",
        "checks of the compiled program",
    ]
    for check in result["checks"].values():
        lines.append(f"  {'holds' if check['holds'] else 'FAILS'}: {check['what']}")
        if not check["holds"]:
            lines += [f"    by {check['count']} instructions, such as", *(f"      {op}" for op in check["found"])]
    return "\n".join(lines)


def _counted(figures: dict[str, Any]) -> list[str]:
    return [
        f"  {figures['operations'] / 1e9:,.4g} G operations: at peak {figures['compute_bound_s'] * 1e3:.3g} ms",
        f"  {_size(figures['bytes'])} moved as XLA counts: its optimal time {figures['optimal_s'] * 1e3:.3g} ms",
    ]


def _bound(figures: dict[str, Any]) -> str:
    needed = _size(figures["bytes_needed"])
    return f"  {needed} of parameters and caches to be read: at full bandwidth {figures['bandwidth_bound_s'] * 1e3:.3g} ms"


def _scheduled(figures: dict[str, Any]) -> str:
    seconds = "" if figures["cycles_s"] is None else f" = {figures['cycles_s'] * 1e3:.3g} ms"
    return f"  {figures['cycles']:,} cycles scheduled{seconds}"
