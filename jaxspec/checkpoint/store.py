"""A checkpoint on disk: one folder with a JSON description, the parameters (Orbax), and other files.

    FOLDER/jaxspec.json   FOLDER/params/   FOLDER/tokenizer.json ...

A folder is written atomically. Parameters are written as they are read, a few rows at a time, so that a checkpoint may be larger
than the host's memory; they are restored in any dtype and onto any mesh.
"""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from blake3 import blake3

from jaxspec.checkpoint.tensors import Tensor
from jaxspec.common.files import write_json
from jaxspec.common.trees import flatten, unflatten
from jaxspec.models.int8 import SUFFIX
from jaxspec.types import Params

DESCRIPTION = "jaxspec.json"
PARAMS = "params"
FORMAT = 1

_REMOTE = "gs:/"  # a ``Path`` of gs://bucket has one slash

_BLOCK_BYTES = 2**27  # larger tensors are written in blocks of rows
# A block of a matrix is cut between columns into files of at least so many bytes, at most so many: a host of several then reads
# little more than the columns that its chips need.
_PART_BYTES, _MOST_PARTS = 2**22, 16
_BYTES_AT_A_TIME = 2**29  # in memory at once, so that some tensors are read while others are written
_PIECE_BYTES = 2**23  # of a block, made row-major at once
_STRIP = 16  # columns of a transposed matrix that are copied together, about a cache line
_WRITE_BYTES = 2**16  # of one call; with 4 MB a conversion takes 1.5 times as long (Linux 6.18, ext4)


def located(folder: str | os.PathLike) -> Path:
    """The folder as a path to read from; for gs:// one of ``etils.epath``.

    Raises:
        ImportError: gcsfs, which reads gs://, is not installed.
    """
    if not (text := str(folder)).startswith(_REMOTE):
        return Path(folder)
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"expected the package gcsfs to read {folder}, got none: pip install gcsfs")
    from etils import epath

    path: Any = epath.Path(f"gs://{text.removeprefix(_REMOTE).lstrip('/')}")
    return path


def check_new(folder: str | os.PathLike) -> None:
    """Raises ValueError where ``folder`` exists, or the folder that it lies in does not."""
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"expected a new folder, got {folder}, which exists: remove it, or choose another name")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"expected a new folder in one that exists, got {folder}: make {folder.parent} first")


@contextlib.contextmanager
def creating(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a temporary folder, which is renamed to ``folder`` when the block succeeds, and removed otherwise.

    Raises:
        ValueError: ``folder`` exists, or the folder that it lies in does not.
        OSError: the folder cannot be written.
    """
    check_new(folder)
    folder = Path(folder)
    partial = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the JSON of a folder, atomically."""
    write_json(folder / DESCRIPTION, {"format": FORMAT, **description})


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads the JSON of a folder.

    Raises:
        ValueError: the folder is not a checkpoint of jaxspec, or has a later format.
    """
    place = located(folder)
    try:
        description = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
        version = description.pop("format")
    except Exception as error:  # the packages that read gs:// raise many kinds of errors
        if str(folder).startswith(_REMOTE):
            raise ValueError(
                f"expected to read {place / DESCRIPTION}, got {type(error).__name__} ({error}): log in by `gcloud auth "
                "application-default login`, or check the path"
            ) from error
        missing = "no such folder" if not place.is_dir() else f"one without {DESCRIPTION}"
        got = missing if isinstance(error, FileNotFoundError) else f"{type(error).__name__} ({error}) for its {DESCRIPTION}"
        raise ValueError(
            f"expected a folder that `jaxspec convert` made at {folder}, got {got}: convert a checkpoint to it, or check the path"
        ) from error
    if version != FORMAT:
        raise ValueError(f"expected format {FORMAT} of {folder}, got {version!r}: convert it again, or install a newer jaxspec")
    return description


class _Leaf:
    """A tensor as a leaf of a pytree; a ``Tensor`` is a tuple, which is not a leaf."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype


class _Budget:
    """Limits the bytes that are in memory at once."""

    def __init__(self, count: int):
        self._free, self._changed = count, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def holding(self, count: int) -> AsyncIterator[None]:
        """Waits until ``count`` bytes are free, and holds them until the block ends."""
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
    """Writes parameters to ``folder``/params.

    Args:
        folder: of the checkpoint.
        tensors: by path ("layer_0/mlp/up/kernel").

    Returns:
        The digest of each tensor, by path.

    Raises:
        ValueError: values are NaN or infinite, or cannot be read; a line for each tensor.
        OSError: the disk is full or cannot be written.
    """
    import orbax.checkpoint as ocp  # slow to import

    digests: dict[str, str] = {}
    errors: list[Exception] = []
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (_Leaf, _handler(digests, errors)),
        (jax.Array, handlers.ArrayHandler()),  # without one, Orbax warns
    )
    tree = unflatten({path: _Leaf(tensor) for path, tensor in tensors.items()})
    needed = sum(map(_bytes, tensors.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        got = f"expected {needed / 1e9:.2f} GB free for {folder.parent}, got {free / 1e9:.2f} GB"
        raise OSError(f"{got}: free some space, or choose another disk")
    # One file per tensor, so that several threads write at once; OCDBT has one writer.
    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()}, f"host {jax.process_index()}")
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
    )
    try:
        with _without_warnings(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
    except Exception as error:  # Orbax raises many kinds of errors, also for the tensors that failed before
        errors = errors or [_unwritten(error)]
    if failed := next((error for error in errors if isinstance(error, OSError)), None):
        raise failed
    if errors:
        raise ValueError("\n".join(map(str, errors)))
    return {path: digests[path.replace("/", ".")] for path in tensors}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides Orbax's warning that there are no OCDBT files to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _handler(digests: dict[str, str], errors: list[Exception]) -> Any:
    """A handler that writes leaves as Orbax's handler of numpy arrays does, but reads them a few rows at a time."""
    import orbax.checkpoint as ocp
    import tensorstore as ts
    from orbax.checkpoint import future

    handlers = ocp.type_handlers

    async def write(leaf: _Leaf, info: Any) -> None:
        starts, step = _blocks(leaf.shape, leaf.dtype)
        block = (step, *leaf.shape[1:]) if leaf.shape else ()
        parts = _parts(block, leaf.dtype)
        block = (step, leaf.shape[1] // parts) if parts > 1 else block
        spec = handlers.get_json_tspec_write(
            info, info.is_ocdbt_checkpoint, leaf.shape, block, leaf.dtype, process_index=jax.process_index()
        )
        spec["dtype"] = leaf.dtype.name  # which Orbax before 0.12.8 leaves to its callers
        await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)  # writes zarr's metadata
        digest = blake3()
        for index, start in enumerate(starts):
            places = ((index, part, *(0 for _ in leaf.shape[2:]))[: len(leaf.shape)] for part in range(parts))
            files = [Path(info.path, _chunk_name(place)) for place in places]
            try:
                await asyncio.to_thread(_write, files, leaf.tensor, start, step, digest)
            except (ValueError, OSError) as error:
                errors.append(_unwritten(error) if isinstance(error, OSError) else error)
                return
        digests[info.name] = f"blake3:{digest.hexdigest()}"

    class Lazy(handlers.NumpyHandler):
        async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
            budget = _Budget(_BYTES_AT_A_TIME)

            async def write_in_turn(leaf: _Leaf, info: Any) -> None:
                async with budget.holding(min(_bytes(leaf), _BLOCK_BYTES)):
                    if not any(isinstance(error, OSError) for error in errors):
                        await write(leaf, info)

            async def all_of_them() -> None:
                await infos[0].await_path_creation()
                leaves = sorted(zip(values, infos, strict=True), key=lambda pair: -_bytes(pair[0]))
                await asyncio.gather(*(write_in_turn(*pair) for pair in leaves))  # largest first

            return [future.CommitFutureAwaitingContractedSignals(all_of_them(), name="lazy_tensors")]

    return Lazy()


def _bytes(tensor: Tensor | _Leaf) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _blocks(shape: tuple[int, ...], dtype: np.dtype) -> tuple[range, int]:
    """The first row of each block of a tensor, and how many rows a block has."""
    count, size = shape[0] if shape else 1, math.prod(shape) * dtype.itemsize
    step = max(1, -(-count // max(1, -(-size // _BLOCK_BYTES))))
    return range(0, max(count, 1), step), step


def _parts(block: tuple[int, ...], dtype: np.dtype) -> int:
    """Into how many files a block of rows is cut between columns, a power of 2: those of a matrix only.

    >>> _parts((4096, 14336), np.dtype(np.float16)), _parts((64, 64), np.dtype(np.float16))
    (16, 1)
    """
    parts = 1
    while len(block) == 2 and parts < _MOST_PARTS and block[1] % (2 * parts) == 0:
        if math.prod(block) * dtype.itemsize // (2 * parts) < _PART_BYTES:
            break
        parts *= 2
    return parts


def _chunk_name(at: Sequence[int]) -> str:
    """The file in which zarr keeps a chunk."""
    return ".".join(map(str, at)) or "0"


def _unwritten(error: Exception) -> OSError:
    return OSError(f"expected to write the parameters, got {str(error).splitlines()[0]}: free some space, or choose another disk")


def _write(files: Sequence[Path], tensor: Tensor, start: int, step: int, digest: blake3) -> None:
    """Writes a block of rows as uncompressed zarr chunks (raw values, padded with zeros), and adds it to ``digest``.

    Each of the files takes as many columns. The digest is that of the values in row-major order, whatever the files.

    Raises:
        ValueError: a value is NaN or infinite.
        OSError: the disk is full or cannot be written.
    """
    stop = min(start + step, tensor.shape[0]) if tensor.shape else 1
    with contextlib.ExitStack() as stack:
        chunks = [stack.enter_context(file.open("wb")) for file in files]
        for piece in _pieces(tensor.read(start, stop)):
            for numbers in _runs(piece):
                if not _finite(numbers):
                    raise ValueError(f"{tensor.name}: expected finite values, got NaN or infinity: download it again")
                digest.update(numbers.view(np.uint8).data)
            whole = piece.view(np.uint8).reshape(-1, len(chunks), piece.nbytes // max(1, len(piece) * len(chunks)))
            for part, chunk in enumerate(chunks):
                for numbers in _runs(np.ascontiguousarray(whole[:, part])):
                    chunk.write(numbers.data)
        for chunk in chunks:
            chunk.truncate(math.prod((step, *tensor.shape[1:])) * tensor.dtype.itemsize // len(chunks))
            os.fsync(chunk.fileno())


def _runs(piece: np.ndarray) -> Iterator[np.ndarray]:
    """The values of a row-major array, a few at a time, each run flat."""
    flat, count = piece.reshape(-1), max(1, _WRITE_BYTES // piece.itemsize)
    yield from (flat[first : first + count] for first in range(0, len(flat), count))


def _pieces(block: np.ndarray) -> Iterator[np.ndarray]:
    """A block, a few rows at a time [rows columns], each piece row-major."""
    rows = np.atleast_1d(block).view(f"u{block.itemsize}")  # numpy copies ml_dtypes one element at a time
    count = max(1, _PIECE_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), count):
        piece = _row_major(rows[start : start + count])
        yield piece.reshape(len(piece), -1).view(block.dtype)


def _row_major(array: np.ndarray) -> np.ndarray:
    """``np.ascontiguousarray``, but a transposed matrix is copied in strips, which is five times as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    ordered = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[1], _STRIP):
        ordered[:, first : first + _STRIP] = array[:, first : first + _STRIP]
    return ordered


def _finite(numbers: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; 16-bit floats are checked by their bits, which is faster."""
    if not jax.numpy.issubdtype(numbers.dtype, jax.numpy.floating):
        return True
    if numbers.dtype.itemsize != 2:
        return bool(np.isfinite(numbers).all())
    infinity = np.array(np.inf, numbers.dtype).view(np.int16)
    return not ((numbers.view(np.int16) & infinity) == infinity).any()


def read_params(
    folder: str | os.PathLike,
    dtype: str | None = None,
    sharding: Any = None,
    shared: Mapping[str, jax.Array] | None = None,
    without: str | None = None,
) -> Params:
    """Restores parameters.

    Args:
        folder: of a checkpoint.
        dtype: of floats other than the scales of int8 weights; by default as written.
        sharding: where each parameter goes: one sharding for all, a tree of them, or a function that gives a dict of them by path
            for the shapes by path; by default the first device.
        shared: arrays by path that are on the device already; they are used in place of those in the folder, if any.
        without: a branch of the tree that is not read, such as "encoder".

    Returns:
        A nested dict of arrays.

    Raises:
        ValueError: the parameters are missing or damaged.
    """
    import orbax.checkpoint as ocp

    shared = dict(shared or {})
    path = located(folder) / PARAMS
    path = path if str(folder).startswith(_REMOTE) else path.absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata.tree
            flat = {name: leaf for name, leaf in flatten(metadata).items() if name.split("/")[0] != without}
            _check_complete(path, flat)
            placed = _shardings(sharding, flat)
            wanted = {
                name: ocp.ArrayRestoreArgs(dtype=_dtype(name, leaf.dtype, dtype), sharding=placed[name], global_shape=leaf.shape)
                for name, leaf in flat.items()
                if name not in shared
            }
            item = unflatten({name: flat[name] for name in wanted})
            arguments = ocp.args.PyTreeRestore(item=item, restore_args=unflatten(wanted), partial_restore=True)
            restored = flatten(checkpointer.restore(path, args=arguments))
    except Exception as error:  # orbax and tensorstore raise many kinds of errors
        got = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected complete parameters at {path}, got {got}: convert the checkpoint again") from error
    return unflatten({**restored, **shared})


def _check_complete(path: Path, flat: Mapping[str, Any]) -> None:
    """Raises ValueError where a file is missing or too short, which zarr would read as zeros."""
    for name, leaf in flat.items():
        folder = path / name.replace("/", ".")
        chunk = json.loads((folder / ".zarray").read_text(encoding="utf-8"))["chunks"]
        size = math.prod(chunk) * np.dtype(leaf.dtype).itemsize
        for at in itertools.product(*(range(-(-count // step)) for count, step in zip(leaf.shape, chunk, strict=True))):
            file = folder / _chunk_name(at)
            found: Any = file.stat()
            got = found.length if hasattr(found, "length") else found.st_size
            if got != size:
                raise ValueError(f"{file.name} of {name} with {got} bytes in place of {size}")


def _dtype(name: str, stored: Any, wanted: str | None) -> Any:
    """The type to read a parameter in; integers and the scales of int8 weights are read as they are."""
    cast = wanted and jax.numpy.issubdtype(stored, jax.numpy.floating) and not name.endswith(SUFFIX)
    return np.dtype(wanted) if cast else stored


def _shardings(sharding: Any, flat: Mapping[str, Any]) -> Mapping[str, Any]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(flat, sharding)
    return sharding(flat) if isinstance(sharding, Callable) else flatten(sharding)
