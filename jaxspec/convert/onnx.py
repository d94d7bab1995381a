"""Reads the weights of an ONNX file, named after the modules of the network that was exported; nothing in it is executed.

An ONNX file is a protobuf message: nodes, and the tensors ("initializers") that they read. Exporters do not keep the names of all
tensors ("onnx::MatMul_2228" is a weight too), but the output of a node is named after its module:
"/blocks.0/attn/query/MatMul_output_0". Fields have their numbers in onnx.proto; those that are not needed are skipped.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxspec.checkpoint.tensors import Tensor, of_array
from jaxspec.convert.pickles import DTYPES, file_bytes, strided

_KINDS = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
_KINDS |= {11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}
_RAW = 9  # the field of a tensor's bytes; its values may also be in the field of its kind: floats, or numbers of variable length
_FLOATS, _NUMBERS = {"float32": 4, "float64": 10}, {"int64": 7, "uint32": 11, "uint64": 11}  # and 5 for all other kinds
_TEXT_BYTES, _AXES, _ITEMS = 2**12, 16, 2**18  # the most that a name, a shape and a graph have

# What the inputs of a node are to its module.
_INPUTS = {
    "Conv": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
}

_Span = tuple[int, int]  # the bytes [start, stop) of the file


class Node(NamedTuple):
    """An operation, its name, the names of what it reads and writes, and those of its attributes that are a float or a tensor."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, float | Tensor]


class Graph(NamedTuple):
    """The nodes, each after those whose outputs it reads, and the initializers by name."""

    nodes: tuple[Node, ...]
    initializers: dict[str, Tensor]


class _Stored(NamedTuple):
    """A tensor as the file describes it."""

    name: str
    kind: int
    shape: tuple[int, ...]
    held: tuple[tuple[int, _Span], ...]  # the values, by the number of their field
    external: Mapping[str, str] | None  # where the values are in another file


def read(path: str | Path) -> Graph:
    """The graph of a file. Values are read on request.

    Args:
        path: of the file. Tensors may be in other files, which must lie in its folder.

    Returns:
        The graph, without its subgraphs.

    Raises:
        ValueError: the file cannot be read or is damaged, a tensor's values do not fit its shape or are not numbers that numpy
            has, or they are in a file that is missing or outside the folder.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            graphs = [part for number, kind, _, part in _fields(data, (0, len(data))) if (number, kind) == (7, 2)]
            if len(graphs) != 1:
                raise ValueError(f"{len(graphs)} graphs")
            return _graph(path, data, graphs[0])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a complete ONNX file, got {error}: download or export it again") from error


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file, named and laid out as in the state dict of the exported module; other initializers as they are.

    A matrix [in out] of a MatMul is given as torch's [out in]. A norm also has "<module>.epsilon", a scalar. Constants of other
    nodes are left out.

    Args:
        path: of the file, see ``read``.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the file cannot be read, see ``read``, or a name would have two tensors.
    """
    graph = read(path)
    found: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        if found.setdefault(name, tensor).name != tensor.name:
            raise ValueError(f"{path}: expected one tensor as {name}, got {found[name].name} and {tensor.name}: export it again")

    values, used = dict(graph.initializers), set()
    norms = {_module(node) for node in graph.nodes if node.operator == "Sqrt"}
    for node in graph.nodes:
        constant = node.attributes.get("value")
        if node.operator == "Constant" and isinstance(constant, Tensor):
            values |= {name: constant._replace(name=name) for name in node.outputs}
        elif node.operator == "Identity" and node.inputs[:1] and node.inputs[0] in values:  # equal tensors are stored once
            values |= dict.fromkeys(node.outputs, values[node.inputs[0]])
        elif module := _module(node):
            for role, tensor in _roles(node, values, f"{module}.weight" in found, module in norms):
                used.add(tensor.name)
                put(f"{module}.{role}", tensor)
    for name, tensor in graph.initializers.items():
        if name not in used:
            put(name, tensor)
    return {name: tensor._replace(name=name) for name, tensor in found.items()}


def _module(node: Node) -> str:
    """The module that a node belongs to: "/a/a.0/linear/MatMul_output_0" -> "a.0.linear"; "" where it is not said.

    >>> _module(Node("Conv", "/layer1/layer1.0/conv1/Conv", (), ("output",), {}))
    'layer1.0.conv1'
    """
    path = next((name for name in (*node.outputs[:1], node.name) if "/" in name), "")
    scopes = [scope for scope in path.split("/")[:-1] if scope]
    return ".".join(scope for scope, inner in pairwise([*scopes, ""]) if not inner.startswith(f"{scope}."))


def _roles(node: Node, values: Mapping[str, Tensor], has_weight: bool, is_norm: bool) -> Iterator[tuple[str, Tensor]]:
    """What the tensors that a node reads are to its module.

    Args:
        node: of the graph.
        values: the tensors by name.
        has_weight: whether the module has a weight already, so that an Add adds its bias.
        is_norm: whether the module is a layer norm of several nodes: a Mul by the weight, an Add of the bias, one of epsilon.
    """
    operands = {place: values[name] for place, name in enumerate(node.inputs) if name in values}
    scalars = [tensor for tensor in operands.values() if math.prod(tensor.shape) == 1]
    vectors = [tensor for tensor in operands.values() if len(tensor.shape) == 1 and tensor not in scalars]
    if node.operator in _INPUTS:
        for place, role in _INPUTS[node.operator].items():
            if place in operands:
                yield role, operands[place]
        if node.operator.endswith("Normalization"):
            epsilon = node.attributes.get("epsilon", 1e-5)
            yield "epsilon", of_array("epsilon", np.array(epsilon, np.float32))
    elif node.operator == "MatMul":
        yield from (("weight", _transposed(tensor)) for place, tensor in operands.items() if (place, len(tensor.shape)) == (1, 2))
    elif node.operator == "Mul" and is_norm:
        yield from (("weight", tensor) for tensor in vectors)
    elif node.operator == "Add" and (is_norm or has_weight):
        yield from (("bias", tensor) for tensor in vectors)
        yield from (("epsilon", tensor) for tensor in scalars if is_norm)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix._replace(shape=matrix.shape[::-1], read=lambda start, stop: matrix.all().T[start:stop])


def _graph(path: Path, data: mmap, span: _Span) -> Graph:
    nodes, initializers = [], {}
    for number, kind, _, part in _fields(data, span):
        if (number, kind) == (1, 2):
            nodes.append(_node(path, data, part))
        elif (number, kind) == (5, 2):
            stored = _stored(data, part)
            if not stored.name or stored.name in initializers:
                raise ValueError(f"two initializers named {stored.name!r}" if stored.name else "an initializer without a name")
            initializers[stored.name] = _tensor(path, stored)
        if len(nodes) + len(initializers) > _ITEMS:
            raise ValueError(f"more than {_ITEMS} nodes and initializers")
    return Graph(tuple(nodes), initializers)


def _node(path: Path, data: mmap, span: _Span) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    attributes: dict[str, float | Tensor] = {}
    for number, kind, _, part in _fields(data, span):
        if kind == 2 and number in texts:
            texts[number].append(_text(data, part))
        elif kind == 2 and number == 5:
            attributes |= _attribute(path, data, part)
    inputs, outputs, names, operators = texts.values()
    return Node("".join(operators[-1:]), "".join(names[-1:]), tuple(inputs), tuple(outputs), attributes)


def _attribute(path: Path, data: mmap, span: _Span) -> dict[str, float | Tensor]:
    """An attribute by name, {} where it is neither a float nor a tensor of numbers."""
    name, found = "", None
    for number, kind, _, part in _fields(data, span):
        match number, kind:
            case 1, 2:
                name = _text(data, part)
            case 2, 5:
                (found,) = struct.unpack("<f", data[slice(*part)])
            case 5, 2 if (stored := _stored(data, part)).kind in _KINDS:
                found = _tensor(path, stored)
    return {} if found is None else {name: found}


def _stored(data: mmap, span: _Span) -> _Stored:
    name, tensor_kind, shape, held, external = "", 0, [], [], None
    for number, kind, value, part in _fields(data, span):
        match number, kind:
            case 1, 0:
                shape.append(value)
            case 1, 2:
                shape += _packed(data, part)
            case 2, 0:
                tensor_kind = value
            case 8, 2:
                name = _text(data, part)
            case 4 | 5 | 7 | 9 | 10 | 11, 2 if part[0] < part[1]:
                held.append((number, part))
            case 13, 2:
                external = (external or {}) | _entry(data, part)
            case 14, 0 if value == 1:
                external = external or {}
        if len(shape) > _AXES:
            raise ValueError(f"a tensor of more than {_AXES} axes")
    return _Stored(name, tensor_kind, tuple(shape), tuple(held), external)


def _entry(data: mmap, span: _Span) -> dict[str, str]:
    texts = {number: _text(data, part) for number, kind, _, part in _fields(data, span) if kind == 2}
    return {texts.get(1, ""): texts.get(2, "")}


def _tensor(path: Path, stored: _Stored) -> Tensor:
    if stored.kind not in _KINDS:
        raise ValueError(f"{stored.name!r:.200} of data type {stored.kind}, which is not of numbers")
    kind, shape = _KINDS[stored.kind], stored.shape
    dtype, count = DTYPES[kind], math.prod(shape)
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"{stored.name!r:.200} of shape {shape}")
    try:
        fetch = _fetch(path, stored, kind, count * dtype.itemsize)
    except ValueError as error:
        raise ValueError(f"{stored.name!r:.200} of {kind} {list(shape)} with {error}") from error
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return strided(stored.name, dtype, shape, strides, fetch)


def _fetch(path: Path, stored: _Stored, kind: str, size: int) -> Callable[[int, int], np.ndarray]:
    """A function that reads bytes (start, count) of a tensor of ``size`` bytes, all of which are there."""
    if stored.external is not None:
        file, position, length = _external(path.parent, stored.external)
        if length != size:
            raise ValueError(f"{length} bytes in {file.name}")
        return partial(file_bytes, file, position)
    if len(stored.held) != (size > 0):
        raise ValueError(f"{len(stored.held)} fields of values")
    (field, (start, stop)) = (*stored.held, (_RAW, (0, 0)))[0]
    if field in (_RAW, _FLOATS.get(kind)):
        if stop - start != size:
            raise ValueError(f"{stop - start} bytes")
        return partial(file_bytes, path, start)
    if field != _NUMBERS.get(kind, 5) or kind in _FLOATS:
        raise ValueError(f"values in field {field}")
    return lambda first, many: _unpack(file_bytes(path, start, 0, stop - start), DTYPES[kind], size)[first : first + many]


def _external(folder: Path, entries: Mapping[str, str]) -> tuple[Path, int, int]:
    """The file, position and length of values outside the file."""
    location, numbers = entries.get("location", ""), [entries.get(key, "0") for key in ("offset", "length")]
    if not re.fullmatch(r"[^\\\0]+", location) or not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
        raise ValueError(f"values at {dict(entries)!r:.300}")
    file = folder / location
    if ".." in file.parts or not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"values outside the folder of the file, in {location!r:.200}")
    if not file.is_file():
        raise ValueError(f"values in {location!r:.200}, which is not there")
    position, length = map(int, numbers)
    rest = file.stat().st_size - position
    if "length" in entries and length > rest:
        raise ValueError(f"values beyond the end of {location!r:.200}")
    return file, position, length if "length" in entries else rest


def _unpack(data: np.ndarray, dtype: np.dtype, size: int) -> np.ndarray:
    """Numbers of 7 bits in each byte, the last of a number below 128, as the bytes of an array."""
    ends = np.flatnonzero(data < 128)
    begins = np.concatenate([[0], ends[:-1] + 1])
    if len(ends) * dtype.itemsize != size or ends[-1] + 1 != len(data) or (ends - begins).max() > 9:
        raise ValueError(f"expected {size // dtype.itemsize} numbers, got {len(ends)} or damaged ones: export it again")
    place = np.arange(len(data)) - np.repeat(begins, ends - begins + 1)
    numbers = np.add.reduceat((data & 127).astype(np.uint64) << (7 * place).astype(np.uint64), begins)
    if dtype.kind in "iub":
        return numbers.astype(dtype).view(np.uint8)
    return numbers.astype(np.uint16).view(np.uint8)  # the bits of float16 and bfloat16


def _text(data: mmap, span: _Span) -> str:
    if span[1] - span[0] > _TEXT_BYTES:
        raise ValueError(f"a name of {span[1] - span[0]} bytes")
    return data[slice(*span)].decode()


def _packed(data: mmap, span: _Span) -> list[int]:
    at, found = span[0], []
    while at < span[1] and len(found) <= _AXES:
        number, at = _varint(data, at, span[1])
        found.append(number)
    return found


def _fields(data: mmap, span: _Span) -> Iterator[tuple[int, int, int, _Span]]:
    """The number, the wire type, the integer (of type 0) and the bytes (of types 1, 2 and 5) of each field of a message."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at, end)
            yield number, kind, value, (at, at)
            continue
        if kind == 2:
            size, at = _varint(data, at, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if number == 0 or size > end - at:
            raise ValueError(f"field {number} of {size} bytes where {end - at} are left")
        yield number, kind, 0, (at, at + size)
        at += size


def _varint(data: mmap, at: int, end: int) -> tuple[int, int]:
    """The integer at a place, 7 bits in each byte and as two's complement, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at + shift // 7 >= end:
            raise ValueError("a number that is cut off")
        byte = data[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at + shift // 7 + 1
    raise ValueError("a number of more than 10 bytes")
