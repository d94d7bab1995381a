"""What a plan is for, and what follows from shapes alone: the models, the arguments of the loop, and the memory of each part."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxspec import mesh, request
from jaxspec.bench import chips, presets
from jaxspec.bench.presets import Pair
from jaxspec.checkpoint import descriptions
from jaxspec.groups import Groups
from jaxspec.models import placement as placements
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.models.placement import Placement
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis.load import NGRAM
from jaxspec.types import Params, Verify
from jaxspec.verify import coarse_grained


class DoesNotFitError(ValueError):
    """What is planned takes more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to plan for."""

    model: str
    """A benchmarked shape (small, llasa-1b, llasa-3b, llasa-8b, cosyvoice2), or a folder that `jaxspec convert` made."""
    topology: str
    """Chips and their layout, such as v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1."""
    mesh: str = "data=1,model=1"
    """data=D,model=M: rows divided over D, and weights over M, of the topology's devices; or auto; by default for one of them."""
    draft: str | None = None
    """ngram, a folder, or a number of the target's layers; by default the draft that is benchmarked with MODEL."""
    batch: int = 1
    """Rows (B)."""
    cells: Annotated[int, tyro.conf.arg(name="cache-length")] = 2048
    """Capacity of each row's KV caches: prompt, emitted tokens, and draft length + 1 of slack."""
    prompt_length: int = 256
    """Length of the longest prompt (P)."""
    draft_length: int = 3
    """Codes to draft in a round (K)."""
    layers: int | None = None
    """Only so many of the target's layers, which compile sooner; by default all."""
    collective_us: float = 2.0
    """Microseconds that a collective waits beside the time of its bytes on the links: a guess."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of parameters and caches."""
    weights: Literal["float", "int8"] | None = None
    """int8: with int8 weights, in target and draft; by default as MODEL has them."""

    def check(self) -> None:
        """Checks every number.

        Raises:
            ValueError: one is out of its range.
        """
        for name, low in (("batch", 1), ("prompt_length", 1), ("draft_length", 0), ("collective_us", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"expected {name.replace('_', ' ')} of {low} or more, got {getattr(self, name)}")
        if self.capacity < 1:
            wanted = self.prompt_length + self.draft_length + 2
            raise ValueError(
                f"expected a cache length of at least {wanted}, for a prompt of {self.prompt_length}, one token, and slack of "
                f"{self.draft_length + 1}, got {self.cells}"
            )

        data, _ = self.axes
        if self.batch % data:
            raise ValueError(
                f"expected a batch that {data} devices divide, the data axis, got {self.batch}: change it or the mesh"
            )

    @property
    def axes(self) -> tuple[int, int]:
        """The sizes of the mesh's axes "data" and "model".

        Raises:
            ValueError: they are not written so.
        """
        return mesh.parse(self.mesh)

    @property
    def capacity(self) -> int:
        """The tokens that a row may emit."""
        return self.cells - self.prompt_length - self.draft_length - 1


def resolved(settings: Settings) -> Settings:
    """The settings with a mesh of all devices in place of "auto", less parts of the batch that would have no row.

    Raises:
        ValueError: as ``pair_of``, or the chips are not built in that layout.
        ImportError: libtpu is not installed.
    """
    if settings.mesh != mesh.AUTO:
        return settings
    target = pair_of(dataclasses.replace(settings, mesh="model=1")).target
    made = presets.automatic_mesh(target, settings.model in presets.PAIRS, chips.devices(settings.topology)).shape
    return dataclasses.replace(settings, mesh=f"data={math.gcd(made['data'], settings.batch)},model={made['model']}")


def abstract_placement(settings: Settings) -> Placement:
    """The placement on the mesh without its devices, for shapes."""
    return placements.abstract(*settings.axes)


def pair_of(settings: Settings) -> Pair:
    """The shapes of target and draft.

    Raises:
        ValueError: the model is neither a preset nor a folder, or the draft does not fit it.
    """
    if settings.model in presets.PAIRS:
        pair = presets.pair(settings.model, settings.dtype, parts=settings.axes[1])
    elif Path(settings.model).is_dir():
        model = descriptions.read_as(settings.model, Model)
        if settings.draft is None:
            raise ValueError(
                f"expected --draft with {settings.model}, got none: give ngram, a folder, or a number of the target's layers"
            )
        pair = Pair(model.shape, None, len(model.stop_ids))
    else:
        raise ValueError(
            f"expected a preset among {', '.join(presets.PAIRS)}, or a folder that `jaxspec convert` made, got "
            f"{settings.model!r}: choose one of these"
        )
    draft = _draft_of(settings, pair)
    changes = {"dtype": settings.dtype} | ({"weights": settings.weights} if settings.weights else {})
    target = dataclasses.replace(_cut(pair.target, settings.layers), **changes)
    return Pair(target, draft and dataclasses.replace(draft, **changes), pair.stops)


def _cut(target: Config, layers: int | None) -> Config:
    """The target with so many layers."""
    if layers is not None and not 1 <= layers <= target.layers:
        raise ValueError(f"expected 1 to {target.layers} layers, those of the target, got {layers}: change --layers")
    return dataclasses.replace(target, layers=layers or target.layers)


def _draft_of(settings: Settings, pair: Pair) -> Config | None:
    """The shape of the draft; None for the n-gram draft."""
    if settings.draft is None:
        return pair.draft
    if settings.draft == NGRAM:
        return None
    if settings.draft.isdecimal():
        if not 1 <= int(settings.draft) <= pair.target.layers:
            raise ValueError(f"expected 1 to {pair.target.layers} of the target's layers, got {settings.draft}")
        return dataclasses.replace(pair.target, layers=int(settings.draft))
    shape = descriptions.read_as(settings.draft, Model).shape
    if shape.vocab != pair.target.vocab:
        raise ValueError(
            f"expected a draft of the target's {pair.target.vocab} ids, got one of {shape.vocab}: draft with a model of the "
            "same family"
        )
    return shape


class Arguments(NamedTuple):
    """What the compiled programs are given, as shapes."""

    target_params: Params
    draft_params: Params
    verify: Verify | None
    request: request.Request


def arguments(settings: Settings, pair: Pair, placement: Placement) -> Arguments:
    """The shapes of what the loops are given with the coarse-grained verifier, with their shardings.

    Args:
        settings: what to plan for.
        pair: of ``pair_of(settings)``.
        placement: where they are.

    Raises:
        ValueError: the mesh does not divide the weights.
    """

    def params(config: Config | None) -> Params:
        return () if config is None else placed(transformer.stored_params(config), transformer.shardings_of(config, placement))

    vocab, codes, size = pair.target.vocab, pair.num_codes, group_size(pair)
    sizes = (vocab, size), vocab, codes * size + vocab - codes, vocab, vocab
    groups = jax.eval_shape(lambda: Groups(*(jnp.zeros(shape, jnp.int32) for shape in sizes)))
    verify = coarse_grained(placed(groups, jax.tree.map(lambda leaf: placement.sharding(), groups)))
    stops = tuple(range(codes, codes + pair.stops))
    prompt = np.zeros((settings.batch, settings.prompt_length), np.int32)
    lengths = np.full(settings.batch, settings.prompt_length)

    def asked() -> request.Request:
        keys = jax.random.split(jax.random.key(0), settings.batch)
        return request.check(keys, prompt, lengths, settings.capacity, None, stops, Sampling())

    shapes = jax.eval_shape(asked)
    return Arguments(params(pair.target), params(pair.draft), verify, placed(shapes, placement.state(shapes)))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, trees of the same structure."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)


def caches(config: Config, settings: Settings, placement: Placement) -> Any:
    """The shapes of the KV caches of a model, with their shardings."""
    made = jax.eval_shape(lambda: transformer.language_model(config).init_cache(settings.batch, settings.cells))
    return placed(made, placement.state(made))


def group_size(pair: Pair) -> int:
    """The most tokens of a group, G: as PCG's groups of LLaSA."""
    return min(presets.GROUP_SIZE, pair.num_codes)


def memory_parts(settings: Settings, pair: Pair, shapes: Arguments, placement: Placement) -> dict[str, int]:
    """The bytes of each part on one device by its shape, without the padding of tiles.

    Args:
        settings: what to plan for.
        pair: the shapes of the models.
        shapes: of the loop's arguments.
        placement: where they are.

    Returns:
        Bytes by name. "shared" is part of both models' parameters: one copy serves both where the draft was cut from the target.
    """
    names = [name for name in shapes.draft_params if name.startswith(("head", "table_"))]
    tables = {name: shapes.draft_params[name] for name in names}
    return {
        "target": nbytes(shapes.target_params),
        "draft": nbytes(shapes.draft_params),
        "shared": nbytes({name: leaf for name, leaf in tables.items() if shapes.target_params.get(name) == leaf}),
        "groups": nbytes(shapes.verify),
        "target_cache": nbytes(caches(pair.target, settings, placement)),
        "draft_cache": nbytes(caches(pair.draft, settings, placement)) if pair.draft else 0,
    }


def bytes_needed(config: Config, params: Params, cache_bytes: int) -> float:
    """What a device must read for one step: every weight but the input tables, and the caches.

    Args:
        config: the shape of the model.
        params: its parameters' shapes.
        cache_bytes: of the model's caches on the device.
    """
    weights = {name: leaf for name, leaf in params.items() if not name.startswith("table_")}
    tied = nbytes(params["table_0"]) * config.vocab / config.input_tables[0] if config.tied else 0
    return nbytes(weights) + tied + cache_bytes


def local_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of the part of an array that one device has."""
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape


def nbytes(tree: Any) -> int:
    """The bytes of a tree of shapes on one device."""
    return sum(math.prod(local_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_room(settings: Settings, parts: dict[str, int], room: int) -> None:
    """Checks that the parts fit in the memory of a device.

    Args:
        settings: what to plan for.
        parts: of ``memory_parts``.
        room: bytes.

    Raises:
        DoesNotFitError: they do not. The message has the arithmetic, and the largest batch that fits.
    """
    fixed = parts["target"] + parts["draft"] + parts["groups"]
    data, _ = settings.axes
    rows = settings.batch // data
    row = (parts["target_cache"] + parts["draft_cache"]) // rows
    total, most = fixed + rows * row, (room - fixed) // row * data
    if most >= settings.batch:
        return
    wanted = f"a batch of at most {most}" if most > 0 else "a smaller model, or a shorter cache,"
    size = {name: readable(count) for name, count in parts.items()}
    raise DoesNotFitError(
        f"expected {wanted} on one device of {settings.topology}: target {size['target']} + draft {size['draft']} + groups "
        f"{size['groups']} + caches {rows} x {readable(row)}, {settings.cells} cells each, = {readable(total)}, got "
        f"{readable(room)}"
    )


def readable(count: float) -> str:
    """Bytes for people.

    >>> readable(1_234_567)
    '1.235 MB'
    """
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or unit == 1e3)
    return f"{count / unit:,.4g} {name}"
