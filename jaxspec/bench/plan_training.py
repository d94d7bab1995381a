"""Compiles a step of training a draft for TPUs that are not attached, from shapes alone: the memory of each device."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.bench import chips
from jaxspec.bench.collectives import KINDS
from jaxspec.bench.plan import compile_for_tpu, total_bytes
from jaxspec.bench.plan_shapes import Settings, group_size, pair_of, placed, readable
from jaxspec.bench.presets import Pair
from jaxspec.draft.family import Packed
from jaxspec.models import transformer
from jaxspec.sampling import Sampling
from jaxspec.train import drafts, loop, trainer
from jaxspec.train import recipe as recipes
from jaxspec.train.drafts import Frozen
from jaxspec.train.losses import ON_GROUPS, Membership


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What to plan for.

    Attributes:
        model: a benchmarked shape, or a folder that ``jaxspec convert`` made.
        topology: chips and their layout; all of them take part.
        recipe: a name, or a .toml file; its dtype is "bfloat16" where it leaves it open.
        length: T, tokens of a packed row, where the recipe leaves it open.
    """

    model: str
    topology: str
    recipe: str
    length: int = 512


def plan(settings: TrainingSettings) -> dict[str, Any]:
    """Compiles one optimizer step with the batch and the large arrays divided over all devices of a topology.

    Args:
        settings: what to plan for.

    Returns:
        The settings, the counts of parameters, "memory" in bytes for each device and "collectives" by kind.

    Raises:
        ValueError: the model, the recipe or the topology is unknown, the rows of the recipe are not a multiple of the devices, or
            the program does not fit.
        ImportError: libtpu is not installed.
    """
    recipe = recipes.read(settings.recipe)
    dtype: Any = recipe.dtype or "bfloat16"
    pair = pair_of(Settings(settings.model, settings.topology, draft="ngram", dtype=dtype))
    task = trainer.task_of(recipe, pair.target, Sampling())
    devices, chip = chips.devices(settings.topology), chips.chip_of(settings.topology).device()
    rows, length = recipe.rows, recipe.length or settings.length
    loop.check_rows(rows, len(devices), recipe.accumulate)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    config = trainer.config_of(recipe)
    params = transformer.stored_params(pair.target)
    own = jax.eval_shape(lambda params: drafts.own_params(jax.random.key(0), task, params), params)
    state = jax.eval_shape(lambda own: loop.init_state(own, config), own)
    loss = jax.tree_util.Partial(trainer.DraftLoss(task), Frozen(params, _membership(pair) if recipe.loss in ON_GROUPS else None))
    batch = jax.eval_shape(lambda: Packed(*(jnp.zeros((rows, length), kind) for kind in (jnp.int32, jnp.int32, jnp.bool_))))
    start = time.perf_counter()
    update = loop.update_step(config).lower(
        placed(loss, loop.shardings(loss, mesh)),
        placed(state, loop.shardings(state, mesh)),
        placed(batch, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("data")), batch)),
    )
    compiled = compile_for_tpu(update, smaller="fewer or shorter rows, or more chips")
    said = compiled.memory_analysis()
    total, text = total_bytes(said), compiled.as_text()
    return {
        **dataclasses.asdict(settings),
        "rows": rows,
        "row_length": length,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "compile_s": time.perf_counter() - start,
        "target_parameters": _count(params),
        "trained_parameters": _count(own),
        "memory": {
            "arguments": said.argument_size_in_bytes,
            "temporaries": said.temp_size_in_bytes,
            "total": total,
            "room": chip.memory_bytes,
            "fits": total <= chip.memory_bytes,
        },
        "collectives": {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS},
    }


def _membership(pair: Pair) -> Membership:
    """The shapes of groups as large as PCG's of LLaSA."""
    codes = pair.num_codes
    size = codes * group_size(pair)
    fields = (size, jnp.int32), (size, jnp.int32), (size, jnp.float32), (codes, jnp.int32)
    return jax.eval_shape(lambda: Membership(*(jnp.zeros(*field) for field in fields)))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def card(result: Mapping[str, Any]) -> str:
    """The plan, a line for each figure."""
    memory = result["memory"]
    size = {name: readable(count) for name, count in memory.items()}
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["collectives"].items() if count)
    return "\n".join(
        [
            f"{result['model']}, {result['target_parameters'] / 1e6:,.0f} M parameters, and a draft by {result['recipe']}, "
            f"{result['trained_parameters'] / 1e6:,.0f} M trained: {result['rows']} rows of {result['row_length']} tokens a step",
            f"on {result['devices']} devices of {result['topology']} ({result['device']}); compiled in "
            f"{result['compile_s']:.0f} s, not run",
            "memory of each device as compiled",
            f"  arguments {size['arguments']}, temporaries {size['temporaries']}",
            f"  total {size['total']} of {size['room']}: {'fits' if memory['fits'] else 'DOES NOT FIT'}",
            f"collectives of a step: {kinds or 'none'}",
        ]
    )
