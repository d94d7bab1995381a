"""The conversion engine: a table of rules maps the tensors of a checkpoint to the parameters of a model.

Each tensor is used once or dropped by name, each parameter is filled once with its shape, and all errors are reported together.
Nothing is read here: a parameter is again a ``Tensor``, which reads and transforms its source on request.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxspec.checkpoint.tensors import Tensor, rows, stacked

Shapes = Mapping[str, tuple[int, ...]]


def same(array: np.ndarray) -> np.ndarray:
    """The identity; such a tensor is copied a few rows at a time, whatever its size."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """A linear layer of torch [out in] -> a kernel [in out]."""
    return array.T


def conv(array: np.ndarray) -> np.ndarray:
    """A convolution of torch [out in taps] -> a kernel [taps in out]."""
    return array.transpose(2, 1, 0)


def pointwise(array: np.ndarray) -> np.ndarray:
    """A convolution of torch with one tap [out in 1] -> a kernel [in out]."""
    return array[:, :, 0].T


def depthwise(array: np.ndarray) -> np.ndarray:
    """A convolution of torch for each channel by itself, or from one channel, [C 1 taps] -> a kernel [taps C]."""
    return array[:, 0].T


def is_count(value: object) -> bool:
    """Whether a setting of a config.json is an integer from 1 to 10**7 - 1."""
    return type(value) is int and 1 <= value < 10**7


class Rule(NamedTuple):
    """Where the tensors whose full name matches ``source`` go.

    Attributes:
        source: a regular expression.
        target: the parameter's path, in which {0}, {1} ... are the groups of ``source``; several paths split the rows of the
            tensor equally, in this order; None drops the tensor. A path that ends in [i] is entry i of a parameter that has one
            for each layer.
        change: the transformation of the values.
    """

    source: str
    target: str | tuple[str, ...] | None
    change: Callable[[np.ndarray], np.ndarray] = same


def affine(source: str, target: str, change: Callable[[np.ndarray], np.ndarray] = transpose) -> tuple[Rule, Rule]:
    """The rules of a weight and a bias: {source}.weight and {source}.bias to {target}/kernel and {target}/bias."""
    return Rule(rf"{source}\.weight", f"{target}/kernel", change), Rule(rf"{source}\.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a norm: {source}.weight and {source}.bias to {target}/scale and {target}/bias."""
    return Rule(rf"{source}\.weight", f"{target}/scale"), Rule(rf"{source}\.bias", f"{target}/bias")


def within(target: str, rules: Iterable[Rule], entry: str = "") -> Iterator[Rule]:
    """The rules of a part, with their targets under ``target``; ``entry``: which entry they fill, "[{0}]" or the like."""
    for rule in rules:
        yield rule._replace(target=f"{target}/{rule.target}{entry}")


# Weight norm as torch names it, before and since parametrizations: the magnitude, then the direction.
_WEIGHT_NORM = re.compile(r"(.*)(?:weight_([gv])|parametrizations\.weight\.original([01]))")


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces each pair of weight norm by its weight g v / |v|, the norm over all axes but the first.

    Args:
        tensors: by name, in either naming of torch.

    Returns:
        The tensors by name, pairs as "...weight".

    Raises:
        ValueError: a magnitude g without its direction v, or the other way round.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _WEIGHT_NORM.fullmatch(name):
            parts.setdefault(f"{match[1]}weight", {})["g" if "g" in match.groups() or "0" in match.groups() else "v"] = tensor
    if halves := sorted(name for name, pair in parts.items() if len(pair) < 2):
        raise ValueError(f"expected magnitude and direction of {halves[0]}, got one of them: download the checkpoint again")
    plain = {name: tensor for name, tensor in tensors.items() if not _WEIGHT_NORM.fullmatch(name)}
    return plain | {name: _folded(name, **pair) for name, pair in parts.items()}


def _folded(name: str, g: Tensor, v: Tensor) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        direction = v.read(start, stop).astype(np.float32)
        norm = np.sqrt((direction**2).sum(tuple(range(1, direction.ndim)), keepdims=True))
        return g.read(start, stop).reshape(norm.shape).astype(np.float32) * direction / norm

    return Tensor(name, v.shape, np.dtype(np.float32), read)


def plan(tensors: Mapping[str, Tensor], rules: Iterable[Rule], expected: Shapes) -> tuple[dict[str, Tensor], list[str]]:
    """Applies a table of rules.

    Args:
        tensors: of the checkpoint, by name, weight norm folded.
        rules: see ``Rule``; a name that several rules match is an error.
        expected: the shape of every parameter, by path.

    Returns:
        The parameters by path, and the names of the tensors that were dropped.

    Raises:
        ValueError: a line for each tensor that no rule or several rules match, and for each parameter that is filled twice, not
            filled, or filled with another shape.
    """
    patterns = [(re.compile(rule.source), rule) for rule in rules]
    filled: dict[str, Tensor] = {}
    dropped: list[str] = []
    problems: list[str] = []
    for name, tensor in tensors.items():
        matches = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(name))]
        if len(matches) != 1:
            problems.append(f"{name}: expected one matching rule, got {len(matches)}: check the family and the files")
            continue
        match, rule = matches[0]
        if rule.target is None:
            dropped.append(tensor.name)
        try:
            parts = list(_parts(tensor, match, rule))
        except (ValueError, IndexError):  # a transformation of axes that do not exist
            problems.append(f"{name}: expected other axes, got shape {tensor.shape}: check the family and the files")
            continue
        for path, part in parts:
            if path in filled:
                problems.append(f"{name}: expected one tensor for {path}, got also {filled[path].name}: remove one of them")
            else:
                filled[path] = part
    stacks = {path: shape for path, shape in expected.items() if f"{path}[0]" in filled}
    wanted = expected
    expected = {path: shape for path, shape in expected.items() if path not in stacks}
    expected |= {f"{path}[{i}]": shape[1:] for path, shape in stacks.items() for i in range(shape[0])}
    problems += [f"{path}: expected a tensor, got none: give all files" for path in expected if path not in filled]
    for path, part in filled.items():
        if path not in expected:
            problems.append(f"{part.name}: expected no {path} by the config, got one: give the config.json of these weights")
        elif tuple(expected[path]) != part.shape:
            problems.append(
                f"{part.name}: expected shape {tuple(expected[path])} of {path} by the config, got {part.shape}: "
                "give the config.json of these weights"
            )
    if problems:
        raise ValueError("\n".join(problems))
    filled |= {path: stacked([filled[f"{path}[{i}]"] for i in range(shape[0])]) for path, shape in stacks.items()}
    return {path: filled[path] for path in wanted}, dropped


def _parts(tensor: Tensor, match: re.Match, rule: Rule) -> Iterable[tuple[str, Tensor]]:
    """Each parameter that a tensor fills."""
    targets = (rule.target,) if isinstance(rule.target, str) else rule.target or ()
    for index, target in enumerate(targets):
        count = tensor.shape[0] if tensor.shape else 1
        first, last = (count * i // len(targets) for i in (index, index + 1))
        part = tensor if len(targets) == 1 else rows(tensor, first, last)
        yield target.format(*match.groups()), part if rule.change is same else _changed(part, rule.change)


def _changed(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    shape = change(np.zeros(tensor.shape, bool)).shape
    return tensor._replace(shape=shape, read=lambda start, stop: change(tensor.all())[start:stop])
