"""What a plan is for, and what follows from shapes alone: the models, the arguments of the loop, and the memory of each part."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxspec import request
from jaxspec.bench import presets
from jaxspec.bench.presets import Pair
from jaxspec.checkpoint import descriptions
from jaxspec.groups import Groups
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis.load import NGRAM
from jaxspec.types import Params, Verify
from jaxspec.verify import coarse_grained


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to plan for."""

    model: str
    """A benchmarked shape (small, llasa-1b, llasa-8b, cosyvoice2), or a folder that `jaxspec convert` made."""
    topology: str
    """Chips and their layout, such as v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1; the plan is for one of them."""
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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of parameters and caches."""
    weights: Literal["float", "int8"] | None = None
    """int8: with int8 weights, in target and draft; by default as MODEL has them."""

    def check(self) -> None:
        """Checks every number.

        Raises:
            ValueError: one is out of its range.
        """
        for name, low in (("batch", 1), ("prompt_length", 1), ("draft_length", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"expected {name.replace('_', ' ')} of {low} or more, got {getattr(self, name)}")
        if self.capacity < 1:
            wanted = self.prompt_length + self.draft_length + 2
            raise ValueError(
                f"expected a cache length of at least {wanted}, for a prompt of {self.prompt_length}, one token, and slack of "
                f"{self.draft_length + 1}, got {self.cells}"
            )

    @property
    def capacity(self) -> int:
        """The tokens that a row may emit."""
        return self.cells - self.prompt_length - self.draft_length - 1


def pair_of(settings: Settings) -> Pair:
    """The shapes of target and draft.

    Raises:
        ValueError: the model is neither a preset nor a folder, or the draft does not fit it.
    """
    if settings.model in presets.PAIRS:
        pair = presets.pair(settings.model, settings.dtype)
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
    return Pair(dataclasses.replace(pair.target, **changes), draft and dataclasses.replace(draft, **changes), pair.stops)


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
    """The arguments of the compiled loop, as shapes."""

    target_params: Params
    draft_params: Params
    verify: Verify
    request: request.Request


def arguments(settings: Settings, pair: Pair) -> Arguments:
    """The shapes of the arguments of ``generate`` with the coarse-grained verifier.

    Args:
        settings: what to plan for.
        pair: of ``pair_of(settings)``.
    """

    def params(config: Config | None) -> Params:
        return () if config is None else transformer.stored_params(config)

    vocab, codes, size = pair.target.vocab, pair.target.vocab - pair.stops, group_size(pair)
    sizes = (vocab, size), vocab, codes * size + pair.stops, vocab, vocab
    groups = jax.eval_shape(lambda: Groups(*(jnp.zeros(shape, jnp.int32) for shape in sizes)))
    stops = tuple(range(codes, vocab))
    prompt = np.zeros((settings.batch, settings.prompt_length), np.int32)
    lengths = np.full(settings.batch, settings.prompt_length)

    def asked() -> request.Request:
        keys = jax.random.split(jax.random.key(0), settings.batch)
        return request.check(keys, prompt, lengths, settings.capacity, None, stops, Sampling())

    return Arguments(params(pair.target), params(pair.draft), coarse_grained(groups), jax.eval_shape(asked))


def group_size(pair: Pair) -> int:
    """The most tokens of a group, G: as PCG's groups of LLaSA."""
    return min(presets.GROUP_SIZE, pair.target.vocab - pair.stops)


def memory_parts(settings: Settings, pair: Pair, shapes: Arguments) -> dict[str, int]:
    """The bytes of each part by its shape, without the padding of tiles.

    Args:
        settings: what to plan for.
        pair: the shapes of the models.
        shapes: of the loop's arguments.

    Returns:
        Bytes by name. "shared" is part of both models' parameters: one copy serves both where the draft was cut from the target.
    """
    names = [name for name in shapes.draft_params if name.startswith(("head", "table_"))]
    tables = {name: shapes.draft_params[name] for name in names}
    cache = functools.partial(presets.cache_bytes, batch=settings.batch, cells=settings.cells)
    return {
        "target": nbytes(shapes.target_params),
        "draft": nbytes(shapes.draft_params),
        "shared": nbytes({name: leaf for name, leaf in tables.items() if shapes.target_params.get(name) == leaf}),
        "groups": nbytes(shapes.verify),
        "target_cache": cache(pair.target),
        "draft_cache": cache(pair.draft) if pair.draft else 0,
    }


def nbytes(tree: Any) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_room(settings: Settings, parts: dict[str, int], room: int) -> None:
    """Checks that the parts fit in the memory of a device.

    Args:
        settings: what to plan for.
        parts: of ``memory_parts``.
        room: bytes.

    Raises:
        ValueError: they do not. The message has the arithmetic, and the largest batch that fits.
    """
    fixed = parts["target"] + parts["draft"] + parts["groups"]
    row = (parts["target_cache"] + parts["draft_cache"]) // settings.batch
    total, most = fixed + settings.batch * row, (room - fixed) // row
    if most >= settings.batch:
        return
    wanted = f"a batch of at most {most}" if most > 0 else "a smaller model, or a shorter cache,"
    size = {name: readable(count) for name, count in parts.items()}
    raise ValueError(
        f"expected {wanted} on one device of {settings.topology}: target {size['target']} + draft {size['draft']} + groups "
        f"{size['groups']} + caches {settings.batch} x {readable(row)}, {settings.cells} cells each, = {readable(total)}, got "
        f"{readable(room)}"
    )


def readable(count: float) -> str:
    """Bytes for people.

    >>> readable(1_234_567)
    '1.235 MB'
    """
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or unit == 1e3)
    return f"{count / unit:,.4g} {name}"
