"""Reads the tensors of torch's ``.pt``, ``.pth`` and ``.bin`` files without torch and without running code from the file.

Such a file is a zip archive: ``root/data.pkl`` is a pickle that describes the tensors, ``root/data/<key>`` holds their values. A
pickle is a program. The interpreter here executes only the instructions that describe dicts of tensors, and treats the few
globals that it accepts as names: nothing is imported, and no function that the file names is called.
"""

import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxspec.checkpoint.tensors import Tensor

_PLAIN = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64".split()
DTYPES = {name: np.dtype(name) for name in _PLAIN} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

_KINDS = "Bool Byte Char Short Int Long Half BFloat16 Float Double ComplexFloat".split()
_KINDS_DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64".split()
_STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in zip(_KINDS, _KINDS_DTYPES, strict=True)}
_STORAGES["torch.storage.UntypedStorage"] = "uint8"
_CALLS = ["collections.OrderedDict", "torch.Size", "torch.device", "torch._utils._rebuild_parameter"]
_CALLS += ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"]
_DTYPE = re.compile(r"torch\.((?:bfloat|float|u?int|bool|complex|bits)[0-9a-z_]*)")  # float8 too, for errors to name it

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES".split()

_PICKLE_BYTES = 2**24  # of data.pkl: about 100,000 tensors
_INFLATED_BYTES = 2**30  # of a compressed member; torch compresses none
_RESAVE = "re-save its state dict with torch.save, or as safetensors"
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, OSError, OverflowError)


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int  # elements


class _Stored(NamedTuple):
    """A tensor as the pickle describes it; offset and strides count elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a dict that has one under "state_dict" or "model".

    Only the description is read; values are read on request. Entries that are not tensors (numbers, strings, None) are skipped,
    and so are those beside "state_dict" or "model". Checksums are not verified, as that would read the whole file.

    Args:
        path: of the file.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the file is not a zip archive, is damaged, describes more than tensors and plain values, or a tensor does not
            lie within its storage; one line per problem.
    """
    return _open(path, _state_dict)


def _open(path: str | Path, choose: Callable[[Any], dict[str, _Stored]]) -> dict[str, Tensor]:
    """The tensors that ``choose`` finds in what the file describes."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head != b"PK\x03\x04":
                got = "the format of torch before 1.6" if head[:1] == b"\x80" else f"a file that begins with {head!r}"
                raise ValueError(f"expected a zip file of torch.save, got {got}: {_RESAVE}")
            with zipfile.ZipFile(file) as archive:
                return _tensors(path, file, archive, choose)
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected a complete zip file of torch.save, got {error}: download or save it again") from error
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from error


def nested(path: str | Path) -> dict[str, Tensor]:
    """The tensors of dicts within a dict by "outer/inner"; what is no tensor is skipped. Else as ``tensors``."""
    return _open(path, _two_levels)


def some(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.200}" for name in names[:3]) + more


def unsupported(dtypes: dict[str, str]) -> list[str]:
    """An error line for each dtype that is not supported.

    Args:
        dtypes: of all tensors, by name.
    """
    return [
        f"{some(name for name in dtypes if dtypes[name] == dtype)}: expected a supported dtype, got {dtype}: save as bfloat16"
        for dtype in sorted(set(dtypes.values()) - set(DTYPES))
    ]


def strided(name: str, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...], fetch: Callable) -> Tensor:
    """A tensor over raw bytes.

    Args:
        name: of the tensor.
        dtype: of its values.
        shape: of the tensor.
        strides: in elements, one per axis.
        fetch: fetch(start, count) -> uint8 [count]; called for the bytes that the rows span.
    """
    strides = tuple(step if length > 1 else 0 for length, step in zip(shape, strides, strict=True))

    def read(start: int, stop: int) -> np.ndarray:
        part, first = shape, 0
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            part, first = (max(stop - start, 0), *shape[1:]), start * strides[0]
        if 0 in part:
            return np.empty(part, dtype)
        numbers = fetch(first * dtype.itemsize, _span(part, strides) * dtype.itemsize).view(dtype)
        return np.lib.stride_tricks.as_strided(numbers, part, [step * dtype.itemsize for step in strides])

    return Tensor(name, shape, dtype, read)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last of a tensor."""
    return 0 if 0 in shape else 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))


def file_bytes(path: Path, position: int, start: int, count: int) -> np.ndarray:
    """Bytes of a file, memory-mapped.

    Args:
        path: of the file.
        position, start: their sum is the offset of the first byte.
        count: number of bytes.

    Returns:
        uint8 [count].

    Raises:
        ValueError: the file was removed or truncated since it was opened.
    """
    try:
        got = max(path.stat().st_size - position - start, 0)
        if got >= count:
            return np.asarray(np.memmap(path, np.uint8, "r", position + start, (count,)))
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error}: leave it in place") from error
    raise ValueError(f"{path}: expected {count} bytes at {position + start}, got {got}: download it again")


def _inflate(path: Path, member: str, start: int, count: int) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            file.seek(start)
            return np.frombuffer(_exactly(file, count), np.uint8)
    except (*_DAMAGE, ValueError) as error:
        raise ValueError(f"{path}: expected a complete member {member!r}, got {error}: download it again") from error


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError(f"expected {count} bytes, got {len(data)}: download or save it again")
    return data


def _tensors(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile, choose: Callable[[Any], dict[str, _Stored]]
) -> dict[str, Tensor]:
    members = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1 or len(members) != len(archive.infolist()):
        raise ValueError(f"expected one member */data.pkl and unique names, got {some(members)}: {_RESAVE}")
    if order := members.get(f"{roots[0]}byteorder"):
        with archive.open(order) as record:
            if (got := record.read(16)) != b"little":
                raise ValueError(f"expected little-endian numbers, got byte order {got!r}: save it on a little-endian machine")
    pickle = _readable(members[f"{roots[0]}data.pkl"], _PICKLE_BYTES)
    with archive.open(pickle) as record:
        stored = choose(_unpickle(_exactly(record, pickle.file_size)))
    found, problems = {}, unsupported({name: value.dtype for name, value in stored.items()})
    for name, value in stored.items():
        if value.dtype in DTYPES:
            try:
                fetch = _fetch(path, file, members.get(f"{roots[0]}data/{value.storage.key}"), value)
                found[name] = strided(name, DTYPES[value.dtype], value.shape, value.strides, fetch)
            except ValueError as error:
                problems.append(f"{some([name])}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _readable(info: zipfile.ZipInfo, limit: int) -> zipfile.ZipInfo:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > limit:
        got = f"{info.file_size} bytes (compression {info.compress_type}, flags {info.flag_bits})"
        raise ValueError(f"expected at most {limit} bytes in {info.filename!r}, stored or deflated, got {got}: {_RESAVE}")
    return info


def _fetch(path: Path, file: IO[bytes], info: zipfile.ZipInfo | None, value: _Stored) -> Callable[[int, int], np.ndarray]:
    """A function that reads a tensor's bytes; checks that the tensor lies within its storage and the storage within the file."""
    size, claimed = DTYPES[value.dtype].itemsize, value.storage.size * DTYPES[value.storage.dtype].itemsize
    end = (value.offset + _span(value.shape, value.strides)) * size
    if end > claimed or math.prod(max(length, 1) for length in value.shape) * size >= 2**63:
        raise ValueError(
            f"expected it within a storage of {claimed} bytes, got shape {value.shape} that ends at {end}: {_RESAVE}"
        )
    if info is None or info.file_size < claimed:
        got = "none" if info is None else f"{info.file_size} bytes"
        raise ValueError(
            f"expected {claimed} bytes in the zip's data/ as {value.storage.key!r:.200}, got {got}: download it again"
        )
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
        read = partial(file_bytes, path, _position(file, info))
    else:
        read = partial(_inflate, path, _readable(info, _INFLATED_BYTES).filename)
    return lambda start, count: read(value.offset * size + start, count)


def _position(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """The offset of a stored member's first byte: after its local header, whose length varies."""
    file.seek(info.header_offset)
    header = _exactly(file, 30)
    position = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    end = file.seek(0, 2)
    if header[:4] != b"PK\x03\x04" or position + info.file_size > end:
        got = f"{info.file_size} bytes at {position} of {end}"
        raise ValueError(f"expected member {info.filename!r} within the file, got {got}: download it again")
    return position


def _state_dict(value: Any) -> dict[str, _Stored]:
    inner = [key for key in ("state_dict", "model") if _named(value) is not None and _named(value.get(key))]
    state = value[inner[0]] if len(inner) == 1 else value
    found = _named(state)
    if not found or any(_named(item) for item in state.values()):
        got = f"a dict of {some(map(str, value))}" if isinstance(value, dict) else f"a {_kind(value)}"
        raise ValueError(f"expected one dict of tensors by name, at the top or as 'state_dict' or 'model', got {got}: {_RESAVE}")
    return found


def _two_levels(value: Any) -> dict[str, _Stored]:
    inner = {key: _named(item) for key, item in value.items()} if isinstance(value, dict) else {}
    found = {f"{key}/{name}": item for key, items in inner.items() if items for name, item in items.items()}
    if not found:
        raise ValueError(f"expected dicts of tensors in a dict, got a {_kind(value)}: {_RESAVE}")
    return found


def _named(value: Any) -> dict[str, _Stored] | None:
    """The tensors of a dict by name; None where ``value`` is not a dict."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, _Stored)}


def _kind(value: Any) -> str:
    return {_Stored: "tensor", _Storage: "storage", _Global: "global"}.get(type(value), type(value).__name__)


def _unpickle(data: bytes) -> Any:
    """The value that a pickle describes; anything that a state dict does not need is refused."""
    stack, marks, memo = [], [], {}
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, arg, stack, marks, memo)
        raise ValueError("no end")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"expected a pickle of tensors and plain values only, got {error}: {_RESAVE}") from error


def _step(name: str, arg: Any, stack: list, marks: list[int], memo: dict[int, Any]) -> None:
    """Executes one instruction of a pickle."""

    def cut(count: int | None = None) -> list:  # without a count, all items above the last mark
        start = marks.pop() if count is None else len(stack) - count
        items = stack[start:]
        del stack[start:]
        return items

    def top(kind: type) -> Any:
        if type(stack[-1]) is not kind:
            raise ValueError(f"a {_kind(stack[-1])} where {name} needs a {kind.__name__}")
        return stack[-1]

    match name:
        case "PROTO" | "FRAME":
            pass
        case _ if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        case _ if name in _LITERALS:
            stack.append(arg)
        case "EMPTY_DICT" | "EMPTY_LIST":
            stack.append({} if name == "EMPTY_DICT" else [])
        case "MARK":
            marks.append(len(stack))
        case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(cut() if name == "TUPLE" else cut(int(name[-1]))))
        case "APPEND" | "APPENDS":
            items = cut() if name == "APPENDS" else cut(1)
            top(list).extend(items)
        case "SETITEM" | "SETITEMS":
            items = cut() if name == "SETITEMS" else cut(2)
            _fill(top(dict), items)
        case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[arg])
        case "GLOBAL" | "STACK_GLOBAL":
            stack.append(_global(*(cut(2) if arg is None else arg.split(" ", 1))))
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case "REDUCE":
            stack.append(_reduce(*cut(2)))
        case "BUILD":  # the ``_metadata`` of a module's state dict
            stack.pop()
            top(dict)
        case _:
            raise ValueError(f"the instruction {name} {arg!r:.100}, which torch.save does not write for tensors")


def _fill(target: dict, items: list) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, float, bool, type(None)):  # the hash of a deep tuple would overflow the stack
            raise ValueError(f"a key that is a {_kind(key)}")
        if key in target:
            raise ValueError(f"the key {key!r:.200} twice")
        target[key] = value


def _global(module: Any, name: Any) -> _Global:
    full = f"{module}.{name}" if type(module) is type(name) is str else "?"
    if full not in _STORAGES and full not in _CALLS and not _DTYPE.fullmatch(full):
        raise ValueError(f"the global {full!r:.200}, which is not loaded")
    return _Global(full)


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Global(kind), str(key), _, size) if kind in _STORAGES and _sizes((size,)):
            return _Storage(key, _STORAGES[kind], size)
    raise ValueError("a reference to no storage")


def _reduce(function: Any, args: Any) -> Any:
    """The result of calling a known global: an empty dict, the description of a tensor, or None where it is not needed."""
    match function, args:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch.Size" | "torch.device"), _:
            return None
        case _Global("torch._utils._rebuild_parameter"), (_Stored() as tensor, _, _):
            return tensor
        case _Global("torch._utils._rebuild_tensor_v2"), (_Storage(), offset, shape, strides, _, _, *metadata):
            return _rebuilt(args[0], args[0].dtype, offset, shape, strides, metadata)
        case _Global("torch._utils._rebuild_tensor_v3"), (_Storage(), offset, shape, strides, _, _, _Global(dtype), *metadata):
            return _rebuilt(args[0], dtype.removeprefix("torch."), offset, shape, strides, metadata)
    raise ValueError(f"a call of a {_kind(function)} {getattr(function, 'name', '')!r} with arguments that torch does not use")


def _rebuilt(storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: list) -> _Stored:
    if not (_sizes((offset,)) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides)):
        raise ValueError("a tensor whose offset, shape or strides are not whole numbers from 0")
    if any(metadata):  # marked as conjugated or negated, although the values are not
        raise ValueError("a tensor with metadata")
    return _Stored(storage, dtype, offset, shape, strides)


def _sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 64 and all(type(item) is int and 0 <= item < 2**63 for item in value)
