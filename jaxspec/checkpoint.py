"""A converted checkpoint on disk: one folder with a JSON that describes the model, its parameters (Orbax), and other files.

    DEST/jaxspec.json   DEST/params/   DEST/tokenizer.json ...

The folder appears whole or not at all. Parameters are written as they are read, a few rows at a time, so that a checkpoint may be
larger than the memory; they are restored in any type and onto any mesh.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxspec.tensors import Tensor
from jaxspec.types import Params

DESCRIPTION = "jaxspec.json"
PARAMS = "params"
FORMAT = 1

_WHOLE_BYTES = 2**29  # larger tensors are written in blocks of rows
_BLOCK_BYTES = 2**27


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
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        came = f"expected {needed / 1e9:.2f} GB free for {folder.parent}, came {free / 1e9:.2f} GB"
        raise OSError(f"{came}: make room, or choose another disk")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
    except Exception as error:  # Orbax raises errors of many kinds, also of the tensors that were left out for theirs
        errors = errors or [_unwritten(error)]
    if failed := next((error for error in errors if isinstance(error, OSError)), None):
        raise failed
    if errors:
        raise ValueError("\n".join(map(str, errors)))
    return {path: digests[path.replace("/", ".")] for path in tensors}


def _handler(digests: dict[str, str], errors: list[Exception]) -> Any:
    """Writes leaves as Orbax's own handler of numpy arrays would, but reads them only then, and a few rows at a time."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    handlers = ocp.type_handlers

    async def write(leaf: _Leaf, info: Any, turn: asyncio.Semaphore) -> None:
        starts, step = _blocks(leaf.shape, leaf.dtype)
        block = (step, *leaf.shape[1:]) if leaf.shape else ()
        spec = handlers.get_json_tspec_write(
            info, info.is_ocdbt_checkpoint, leaf.shape, block, leaf.dtype, process_index=jax.process_index()
        )
        store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
        sha = hashlib.sha256()
        for start in starts:
            async with turn:
                if any(isinstance(error, OSError) for error in errors):
                    return
                stop = min(start + step, leaf.shape[0]) if leaf.shape else 1
                try:
                    numbers = await asyncio.to_thread(_read, leaf.tensor, start, stop, sha)
                    await asyncio.to_thread(_write, store[start:stop] if leaf.shape else store, numbers)
                except (ValueError, OSError) as error:
                    errors.append(error)
                    return
                del numbers  # before the next are read
        digests[info.name] = f"sha256:{sha.hexdigest()}"

    class Lazy(handlers.TypeHandler):
        def typestr(self) -> str:
            return "np.ndarray"

        async def serialize(self, values: Sequence[_Leaf], infos: Sequence[Any], args: Any = None) -> list[Any]:
            async def two_at_a_time() -> None:
                await infos[0].await_path_creation()
                turn = asyncio.Semaphore(2)  # one is read while the other is written
                await asyncio.gather(*(write(leaf, info, turn) for leaf, info in zip(values, infos, strict=True)))

            return [ocp.future.CommitFutureAwaitingContractedSignals(two_at_a_time(), name="lazy_tensors")]

        async def metadata(self, infos: Sequence[Any]) -> Any:
            raise NotImplementedError("lazy tensors are written alone")

        async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
            raise NotImplementedError("lazy tensors are written alone")

    return Lazy()


def _blocks(shape: tuple[int, ...], dtype: np.dtype) -> tuple[range, int]:
    """Where the blocks of rows of a tensor begin, and how many rows each has."""
    count, size = shape[0] if shape else 1, math.prod(shape) * dtype.itemsize
    blocks = 1 if size <= _WHOLE_BYTES else -(-size // _BLOCK_BYTES)
    step = max(1, -(-count // blocks))
    return range(0, max(count, 1), step), step


def _write(store: Any, numbers: np.ndarray) -> None:
    try:
        store.write(numbers, can_reference_source_data_indefinitely=True).result()
    except Exception as error:  # tensorstore raises errors of many kinds
        raise _unwritten(error) from error


def _unwritten(error: Exception) -> OSError:
    return OSError(f"expected to write the parameters, but {str(error).splitlines()[0]}: make room, or choose another disk")


def _read(tensor: Tensor, start: int, stop: int, sha: Any) -> np.ndarray:
    """Some rows, told to ``sha``, in pieces that fit a processor's cache.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    numbers = tensor.read(start, stop)
    flat = np.ascontiguousarray(numbers).reshape(-1)
    for first in range(0, len(flat), 2**18):
        piece = flat[first : first + 2**18]
        if not _finite(piece):
            raise ValueError(f"{tensor.name}: expected finite numbers, came NaN or infinity; download it again")
        sha.update(piece.view(np.uint8))
    return flat.reshape(numbers.shape)


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


def _dtype(stored: Any, wanted: str | None) -> Any:
    return np.dtype(wanted) if wanted and jax.numpy.issubdtype(stored, jax.numpy.floating) else stored


def _shardings(sharding: Any, flat: Mapping[str, Any]) -> Mapping[str, Any]:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(flat, sharding)
    return traverse_util.flatten_dict(sharding, sep="/")
