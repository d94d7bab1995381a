"""Compiles the flow and the vocoder of CosyVoice for a TPU that is not attached, from shapes alone: memory and cycles."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.acoustic import cosyvoice, flow, hift, noise
from jaxspec.bench import chips, hlo
from jaxspec.bench.plan import compile_for_tpu, total_bytes
from jaxspec.bench.plan_shapes import placed, readable
from jaxspec.codec import s3
from jaxspec.models.placement import one_device

VERSIONS = {"cosyvoice2": (flow.Config(), hift.V2), "cosyvoice3": (flow.V3, hift.V3)}
PROMPT_S = 3.2  # of the reference


@dataclasses.dataclass(frozen=True)
class SoundSettings:
    """What to plan for.

    Attributes:
        model: one of ``VERSIONS``.
        topology: chips and their layout; the plan is for one of them.
        batch: rows.
        seconds: of speech in each row.
        dtype: of the networks.

    Raises:
        ValueError: another model, or a batch or a duration that is not positive.
    """

    model: str
    topology: str
    batch: int = 1
    seconds: float = 10.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.model not in VERSIONS:
            raise ValueError(f"expected a model among {', '.join(VERSIONS)} for --sound, got {self.model}: choose one of these")
        if self.batch < 1 or not self.seconds >= 1 / s3.CODE_RATE_HZ:
            raise ValueError(f"expected a batch and seconds of speech above 0, got {self.batch} and {self.seconds}: raise them")


def plan(settings: SoundSettings) -> dict[str, Any]:
    """Compiles the two stages.

    Args:
        settings: what to plan for.

    Returns:
        The settings, and for "flow" and "vocoder": "memory" in bytes, "cycles" as scheduled and "cycles_s".

    Raises:
        ValueError: the topology is unknown, or a stage does not fit.
        ImportError: libtpu is not installed.
    """
    devices, chip = chips.devices(settings.topology), chips.chip_of(settings.topology).device()
    made, vocoder = VERSIONS[settings.model]
    made, vocoder = dataclasses.replace(made, dtype=settings.dtype), dataclasses.replace(vocoder, dtype=settings.dtype)
    config = cosyvoice.Config(made, vocoder, cosyvoice.FMAX_HZ[made.version])
    codes, prompt, rows = round(settings.seconds * s3.CODE_RATE_HZ), round(PROMPT_S * s3.CODE_RATE_HZ), settings.batch

    def arguments() -> tuple[Any, ...]:
        length = jnp.zeros(rows, jnp.int32)
        frames = jnp.zeros((rows, flow.FRAMES_PER_CODE * prompt, noise.BINS))
        speaker = jnp.zeros((rows, flow.SPEAKER_WIDTH))
        condition = {"codes": jnp.zeros((rows, prompt), jnp.int32), "length": length, "mel": frames, "speaker": speaker}
        return jnp.zeros((rows, codes, 1), jnp.int32), length, condition, jax.random.split(jax.random.key(0), rows)

    sharding = one_device(devices[0]).sharding()
    on_chip = lambda shapes: placed(shapes, jax.tree.map(lambda _: sharding, shapes))  # noqa: E731
    params, (x, *others) = cosyvoice.abstract_params(config), jax.eval_shape(arguments)
    stages: dict[str, Any] = {}
    for name, stage in cosyvoice.codec(config).stages:
        start = time.perf_counter()
        given = on_chip(params), on_chip(x), *on_chip(tuple(others))
        compiled = compile_for_tpu(stage.lower(*given), smaller="a smaller batch or less speech")
        x, said, program = jax.eval_shape(stage, *given), compiled.memory_analysis(), hlo.parse(compiled.as_text())
        cycles, total = hlo.scheduled_cycles(program, program.entry), total_bytes(said)
        memory = {"arguments": said.argument_size_in_bytes, "temporaries": said.temp_size_in_bytes, "total": total}
        stages[name] = {
            "memory": memory | {"room": chip.memory_bytes, "fits": total <= chip.memory_bytes},
            "cycles": cycles,
            "cycles_s": cycles / chip.clock_hz if chip.clock_hz else None,
            "compile_s": time.perf_counter() - start,
        }
    return {**dataclasses.asdict(settings), "prompt_s": PROMPT_S, "device": devices[0].device_kind, **stages}


def card(result: Mapping[str, Any]) -> str:
    """The plan, a line for each figure."""
    lines = [
        f"{result['model']}, flow and vocoder in {result['dtype']}: {result['batch']} x {result['seconds']:g} s of speech after "
        f"a prompt of {result['prompt_s']:g} s, on one device of {result['topology']} ({result['device']}); not run"
    ]
    for name in ("flow", "vocoder"):
        stage = result[name]
        size = {part: readable(count) for part, count in stage["memory"].items()}
        seconds = "" if stage["cycles_s"] is None else f" = {stage['cycles_s'] * 1e3:.3g} ms"
        lines += [
            f"{name}, compiled in {stage['compile_s']:.0f} s",
            f"  arguments {size['arguments']}, temporaries {size['temporaries']}, total {size['total']} of {size['room']}: "
            f"{'fits' if stage['memory']['fits'] else 'DOES NOT FIT'}",
            f"  {stage['cycles']:,} cycles scheduled{seconds}",
        ]
    return "\n".join(lines)
