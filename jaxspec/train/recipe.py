"""Recipes of drafts: TOML files with the family, its settings relative to the target, the loss, and steps and rates."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxspec.common import records
from jaxspec.draft.families import FAMILIES
from jaxspec.draft.family import float_shape
from jaxspec.models import transformer
from jaxspec.train.losses import LOSSES

FOLDER = Path(str(resources.files("jaxspec"))) / "train" / "recipes"
_SHAPE = ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Attributes:
        family: a name in ``jaxspec.draft.families.FAMILIES``.
        draft: the fields of the family's Config, see ``config``.
        loss: a name in ``jaxspec.train.losses.LOSSES``.
        threshold: of the groups of a loss on groups; 0: the synthesizer's default.
        block: K, the tokens that are scored after each anchor.
        gamma: slot k of a block has the weight exp(-k / gamma); 0: equal weights.
        anchors: random positions of each row from which the draft proposes; 0: all.
        rows: packed rows of a step.
        length: T, tokens of a row; 0: such that the longest sample fits.
        accumulate: parts of a batch whose gradients are added up one after the other.
        steps: optimizer steps.
        learning_rate: the constant one.
        warmup: the fraction of the steps in which the rate rises.
        decay: the fraction of the steps in which it falls along a cosine.
        weight_decay: of AdamW.
        ema: decay of the moving average of the weights.
        dtype: to compute in, "bfloat16" or "float32"; "": float32 on a CPU and the checkpoint's elsewhere. Weights are float32.
        memory: megabytes of the logits of some anchors that are computed at once.
        seed: of the initial weights, the order of the samples and the anchors.
    """

    family: str
    draft: Mapping[str, Any]
    loss: str
    threshold: float = 0.0
    block: int = 1
    gamma: float = 0.0
    anchors: int = 0
    rows: int = 8
    length: int = 0
    accumulate: int = 1
    steps: int = 2000
    learning_rate: float = 1e-3
    warmup: float = 0.04
    decay: float = 0.9
    weight_decay: float = 0.0
    ema: float = 0.998
    dtype: str = ""
    memory: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("family", self.family, FAMILIES), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise ValueError(f"expected a {name} among {', '.join(known)}, got {value!r}: choose one of these")
        for name in ("block", "rows", "accumulate", "steps", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of 1 or more, got {getattr(self, name)}: leave it out for the recipe's own")
        if self.rows % self.accumulate:
            raise ValueError(f"expected rows that accumulate={self.accumulate} divides, got {self.rows}: change one of them")
        if self.dtype not in ("", "bfloat16", "float32"):
            raise ValueError(f'expected the dtype "bfloat16" or "float32", got {self.dtype!r}: choose one of them')


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(recipe: str, **changes: Any) -> Recipe:
    """A recipe by name or file.

    Args:
        recipe: one of ``names``, or a .toml file.
        changes: fields to replace.

    Raises:
        ValueError: there is no such recipe, or it is not one.
    """
    path = FOLDER / f"{recipe}.toml" if recipe in names() else Path(recipe)
    if path.suffix != ".toml" or not path.is_file():
        raise ValueError(f"expected a recipe among {', '.join(names())} or a .toml file, got {recipe!r}: choose one of these")
    try:
        return records.from_json(Recipe, tomllib.loads(path.read_text(encoding="utf-8")) | changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a recipe in {path}: {error}") from error


def config(recipe: Recipe, target: transformer.Config) -> Any:
    """The family's Config for a target.

    In the family "model", ``layers`` are layers of the target: a list, in which -1 is the last, or a number of layers that are
    spread evenly from the first to the last. Without it the settings are those of a shape of its own (width, layers, heads,
    kv_heads, head_dim, mlp_width) in the table ``shape``, the others being the target's. ``trained`` may name "head" where head
    and embeddings are one.

    In the families that read the target's features, ``reads`` is a list of hidden states, in which -1 is the output of the final
    norm, or a number of layers that are spread as DFlash does. Dimensions that are left out are the target's.

    Raises:
        ValueError: the settings are not those of the family, or do not fit the target.
    """
    family, settings = FAMILIES[recipe.family], dict(recipe.draft)
    target = dataclasses.replace(target, feature_layers=())
    settings = _of_model(settings, target) if recipe.family == "model" else _on_features(family.Config, settings, target)
    try:
        return family.Config(target=target, **{name: _hashable(value) for name, value in settings.items()})
    except TypeError as error:
        raise ValueError(f"expected the settings of the family {recipe.family} in its recipe: {error}") from error


def _of_model(settings: dict[str, Any], target: transformer.Config) -> dict[str, Any]:
    if "layers" in settings:
        settings["layers"] = layers = resolve_layers(settings["layers"], target.layers)
        if len(layers) == target.layers:
            raise ValueError(
                f"expected a target of more than {target.layers} layers, as the draft keeps {len(layers)}: choose another recipe"
            )
    if "shape" in settings:
        settings["shape"] = _shape(settings["shape"], target)
    if "trained" in settings and target.tied:
        settings["trained"] = tuple("table_0" if path == "head" else path for path in settings["trained"])
    return settings


def _on_features(kind: Any, settings: dict[str, Any], target: transformer.Config) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    shape = {name: getattr(target, name) for name in _SHAPE if name in fields}
    if "reads" in fields and "reads" in settings:
        settings["reads"] = resolve_reads(settings["reads"], target.layers)
    return shape | settings


def resolve_reads(reads: list[int] | int, depth: int) -> tuple[int, ...]:
    """The hidden states of a target that a recipe names, see ``transformer.Config.feature_layers``.

    Args:
        reads: a list, -1 being the output of the final norm, or how many layers, from the second to the third last.
        depth: layers of the target.

    Raises:
        ValueError: the target has no such hidden states.

    >>> resolve_reads(5, 36), resolve_reads(5, 24), resolve_reads([0, -1], 6)
    ((1, 9, 17, 25, 33), (1, 6, 11, 16, 21), (0, 6))
    """
    if isinstance(reads, int):
        if not 1 <= reads <= depth:
            raise ValueError(f"expected 1 to {depth} hidden states of the target, got {reads}: change the recipe")
        first, last = min(1, depth - 1), max(depth - 3, min(1, depth - 1))
        return tuple(sorted({int(first + i * (last - first) / max(reads - 1, 1) + 0.5) for i in range(reads)}))
    if any(not -depth - 1 <= i <= depth for i in reads):
        raise ValueError(f"expected hidden states from {-depth - 1} to {depth}, got {reads}: change the recipe")
    return tuple(sorted({i % (depth + 1) for i in reads}))


def _shape(values: Mapping[str, Any], target: transformer.Config) -> transformer.Config:
    if unknown := values.keys() - set(_SHAPE):
        raise ValueError(f"expected a shape of {', '.join(_SHAPE)}, got {', '.join(sorted(unknown))}: remove it")
    return dataclasses.replace(float_shape(target), **values)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def resolve_layers(layers: list[int] | int, depth: int) -> tuple[int, ...]:
    """The layers of a target that a recipe names, in order, each once.

    Args:
        layers: a list, -1 being the last, or how many, from the first to the last.
        depth: layers of the target.

    Raises:
        ValueError: the target has no such layers.

    >>> resolve_layers([0, 1, -2, -1], 16), resolve_layers(3, 16)
    ((0, 1, 14, 15), (0, 8, 15))
    """
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"expected 1 to {depth} layers of the target, got {layers}: change the recipe")
        return tuple(int(i * (depth - 1) / max(layers - 1, 1) + 0.5) for i in range(layers))
    if any(not -depth <= i < depth for i in layers):
        raise ValueError(f"expected layers from {-depth} to {depth - 1}, got {layers}: change the recipe")
    return tuple(sorted({i % depth for i in layers}))
