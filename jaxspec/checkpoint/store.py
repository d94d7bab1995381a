"""A converted checkpoint on disk: one folder with a JSON that describes the model, its parameters (Orbax), and other files.

    DEST/jaxspec.json   DEST/params/   DEST/tokenizer.json ...

The folder appears whole or not at all. Parameters are written as they are read, a few rows at a time, so that a checkpoint may be
larger than the memory; they are restored in any type and onto any mesh.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from blake3 import blake3
from flax import traverse_util

from jaxspec.checkpoint.tensors import Tensor
from jaxspec.types import Params

DESCRIPTION = "jaxspec.json"
PARAMS = "params"
FORMAT = 1

_BLOCK_BYTES = 2**27  # larger tensors are written in blocks of rows, a file each
_BYTES_AT_A_TIME = 2**29  # so that some tensors are read while others are written
_PIECE_BYTES = 2**23  # what of a block is brought in order at a time
_STRIP = 16  # columns that are brought in order at a time, about a cache line
_WRITE_BYTES = 2**16  # of one call; with 4 MB a conversion takes half as long again (Linux 6.18, ext4)


@contextlib.contextmanager
def creating(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives the path of a new folder beside ``folder``, which takes its place when the block has succeeded, and else is removed.

    Raises:
        ValueError: ``folder`` exists, or what it should lie in does not.
        OSError: nothing can be written there.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"expected a new folder, but {folder} exists: remove it, or choose another name")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"expected a new folder within one that exists, but {folder.parent} does not: make it first")
    partial = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the JSON."""
    text = json.dumps({"format": FORMAT, **description}, indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads the JSON.

    Raises:
        ValueError: the folder is no converted checkpoint, or one of a later format.
    """
    try:
        description = json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))
        version = description.pop("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        came = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"expected a folder that `jaxspec convert` made at {folder}, but its {DESCRIPTION} cannot be read ({came})"
        ) from error
    if version != FORMAT:
        raise ValueError(f"expected {folder} in format {FORMAT}, came {version}: convert it again, or install a newer jaxspec")
    return description


class _Leaf:
    """A tensor as a leaf of a tree; a ``Tensor`` is a tuple, which trees would walk into."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype


class _Room:
    """Lets only so many bytes be in memory at a time."""

    def __init__(self, count: int):
        self._free, self._changed = count, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def holding(self, count: int) -> AsyncIterator[None]:
        """Waits until ``count`` bytes are free, and has them until the block ends."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            async with self._changed:
                self._free += count
                self._changed.notify_all()


def write_params(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Writes parameters by path ("layer_0/mlp/up/kernel") to ``folder``/params, and returns the digest of each.

    Raises:
        ValueError: numbers are NaN or infinite, or cannot be read; a line for each tensor.
        OSError: the disk is full, or cannot be written to.
    """
    import orbax.checkpoint as ocp  # slow to import

    digests: dict[str, str] = {}
    errors: list[Exception] = []
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (_Leaf, _handler(digests, errors)),
        (jax.Array, handlers.ArrayHandler()),  # without one, Orbax warns
    )
    tree = traverse_util.unflatten_dict({path: _Leaf(tensor) for path, tensor in tensors.items()}, sep="/")
    needed = sum(map(_bytes, tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        came = f"expected {needed / 1e9:.2f} GB free for {folder.parent}, came {free / 1e9:.2f} GB"
        raise OSError(f"{came}: make room, or choose another disk")
    # A file for each tensor, which several threads write; OCDBT's are written by one.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False, type_handler_registry=registry)
    try:
        with _without_warnings(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
    except Exception as error:  # Orbax raises errors of many kinds, also of the tensors that were left out for theirs
        errors = errors or [_unwritten(error)]
    if failed := next((error for error in errors if isinstance(error, OSError)), None):
        raise failed
    if errors:
        raise ValueError("\n".join(map(str, errors)))
    return {path: digests[path.replace("/", ".")] for path in tensors}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that it finds no files of OCDBT to merge, which it looks for in every checkpoint."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _handler(digests: dict[str, str], errors: list[Exception]) -> Any:
    """Writes leaves as Orbax's own handler of numpy arrays would, but reads them only then, and a few rows at a time."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    handlers = ocp.type_handlers

    async def write(leaf: _Leaf, info: Any) -> None:
        starts, step = _blocks(leaf.shape, leaf.dtype)
        block = (step, *leaf.shape[1:]) if leaf.shape else ()
        spec = handlers.get_json_tspec_write(
            info, info.is_ocdbt_checkpoint, leaf.shape, block, leaf.dtype, process_index=jax.process_index()
        )
        await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)  # writes what zarr says of an array
        digest = blake3()
        for index, start in enumerate(starts):
            file = Path(info.path, _chunk_name((index, *(0 for _ in leaf.shape[1:]))[: len(leaf.shape)]))
            try:
                await asyncio.to_thread(_write, file, leaf.tensor, start, step, digest)
            except (ValueError, OSError) as error:
                errors.append(_unwritten(error) if isinstance(error, OSError) else error)
                return
        digests[info.name] = f"blake3:{digest.hexdigest()}"

    class Lazy(handlers.NumpyHandler):
        async def serialize(self, values: Sequence[_Leaf], infos: Sequence[Any], args: Any = None) -> list[Any]:
            room = _Room(_BYTES_AT_A_TIME)

            async def write_in_turn(leaf: _Leaf, info: Any) -> None:
                async with room.holding(min(_bytes(leaf), _BLOCK_BYTES)):
                    if not any(isinstance(error, OSError) for error in errors):
                        await write(leaf, info)

            async def all_of_them() -> None:
                await infos[0].await_path_creation()
                leaves = sorted(zip(values, infos, strict=True), key=lambda pair: -_bytes(pair[0]))
                await asyncio.gather(*(write_in_turn(*pair) for pair in leaves))  # the largest, whose blocks queue, first

            return [ocp.future.CommitFutureAwaitingContractedSignals(all_of_them(), name="lazy_tensors")]

    return Lazy()


def _bytes(tensor: Tensor | _Leaf) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _blocks(shape: tuple[int, ...], dtype: np.dtype) -> tuple[range, int]:
    """Where the blocks of rows of a tensor begin, and how many rows each has."""
    count, size = shape[0] if shape else 1, math.prod(shape) * dtype.itemsize
    step = max(1, -(-count // max(1, -(-size // _BLOCK_BYTES))))
    return range(0, max(count, 1), step), step


def _chunk_name(at: Sequence[int]) -> str:
    """The file in which zarr keeps a chunk."""
    return ".".join(map(str, at)) or "0"


def _unwritten(error: Exception) -> OSError:
    return OSError(f"expected to write the parameters, but {str(error).splitlines()[0]}: make room, or choose another disk")


def _write(file: Path, tensor: Tensor, start: int, step: int, digest: blake3) -> None:
    """Writes a block of rows, told to ``digest``, as an uncompressed chunk of zarr: the numbers themselves, zeros after the last.

    Raises:
        ValueError: a number is NaN or infinite.
        OSError: the disk is full, or cannot be written to.
    """
    stop = min(start + step, tensor.shape[0]) if tensor.shape else 1
    with file.open("wb") as chunk:
        for piece in _pieces(tensor.read(start, stop)):
            for first in range(0, len(piece), count := max(1, _WRITE_BYTES // piece.itemsize)):
                numbers = piece[first : first + count]
                if not _finite(numbers):
                    raise ValueError(f"{tensor.name}: expected finite numbers, came NaN or infinity; download it again")
                digest.update(numbers.view(np.uint8))
                chunk.write(numbers.view(np.uint8))
        chunk.truncate(math.prod((step, *tensor.shape[1:])) * tensor.dtype.itemsize)
        os.fsync(chunk.fileno())


def _pieces(block: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of a block in the order of its rows, some rows at a time, each piece flat."""
    rows = np.atleast_1d(block).view(f"u{block.itemsize}")  # as numpy copies numbers of ml_dtypes one by one
    count = max(1, _PIECE_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), count):
        yield _in_order(rows[start : start + count]).reshape(-1).view(block.dtype)


def _in_order(array: np.ndarray) -> np.ndarray:
    """Row-major, as numpy would; a transposed matrix in strips, which is five times as quick as all at once."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    ordered = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[1], _STRIP):
        ordered[:, first : first + _STRIP] = array[:, first : first + _STRIP]
    return ordered


def _finite(numbers: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; those of two bytes are told by their bits, which is what numpy is quick at."""
    if numbers.dtype.itemsize != 2:
        return bool(np.isfinite(numbers).all())
    infinity = np.array(np.inf, numbers.dtype).view(np.int16)
    return not ((numbers.view(np.int16) & infinity) == infinity).any()


def read_params(
    folder: str | os.PathLike,
    dtype: str | None = None,
    sharding: Any = None,
    shared: Mapping[str, jax.Array] | None = None,
) -> Params:
    """Restores parameters.

    Args:
        folder: of a converted checkpoint.
        dtype: of floats, by default as written.
        sharding: where each parameter goes: one sharding for all, or a tree of them; by default the first device.
        shared: parameters by path that are on the device already and are used in place of those on disk.

    Raises:
        ValueError: the parameters are missing or damaged.
    """
    import orbax.checkpoint as ocp

    shared = dict(shared or {})
    path = (Path(folder) / PARAMS).absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata.tree
            flat = traverse_util.flatten_dict(metadata, sep="/")
            _check_whole(path, flat)
            placed = _shardings(sharding, flat)
            wanted = {
                name: ocp.ArrayRestoreArgs(dtype=_dtype(leaf.dtype, dtype), sharding=placed[name], global_shape=leaf.shape)
                for name, leaf in flat.items()
                if name not in shared
            }
            item = traverse_util.unflatten_dict({name: flat[name] for name in wanted}, sep="/")
            arguments = ocp.args.PyTreeRestore(
                item=item, restore_args=traverse_util.unflatten_dict(wanted, sep="/"), partial_restore=True
            )
            restored = traverse_util.flatten_dict(checkpointer.restore(path, args=arguments), sep="/")
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
        came = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected whole parameters at {path}, but {came}: convert the checkpoint again") from error
    return traverse_util.unflatten_dict({**restored, **shared}, sep="/")


def _check_whole(path: Path, flat: Mapping[str, Any]) -> None:
    """Raises ValueError where a file is missing or too short, for which zarr would give zeros."""
    for name, leaf in flat.items():
        folder = path / name.replace("/", ".")
        chunk = json.loads((folder / ".zarray").read_text(encoding="utf-8"))["chunks"]
        size = math.prod(chunk) * np.dtype(leaf.dtype).itemsize
        for at in itertools.product(*(range(-(-count // step)) for count, step in zip(leaf.shape, chunk, strict=True))):
            file = folder / _chunk_name(at)
            came = file.stat().st_size
            if came != size:
                raise ValueError(f"{file.name} of {name} has {came} bytes in place of {size}")


def _dtype(stored: Any, wanted: str | None) -> Any:
    return np.dtype(wanted) if wanted and jax.numpy.issubdtype(stored, jax.numpy.floating) else stored


def _shardings(sharding: Any, flat: Mapping[str, Any]) -> Mapping[str, Any]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(flat, sharding)
    return traverse_util.flatten_dict(sharding, sep="/")
