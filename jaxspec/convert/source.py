"""Finds a checkpoint's weight files in a directory or on the hub, and opens them without reading the values."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from jaxspec.checkpoint.tensors import Tensor
from jaxspec.convert import pickles
from jaxspec.convert.pickles import DTYPES, some

# Names of a directory's weights. The first line that any file matches must be matched by exactly one.
PATTERNS = (
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "model.safetensors",
    "*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.index.json",
    "llm.pt",
    "*.pt *.pth *.bin",
)
HUB_PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.pt",
    "*.bin",
    "*.model",
    "*.jinja",
    "*merges.txt",
    "*vocab.txt",
    "speech_tokenizer_v?.onnx",
    "campplus.onnx",
]

_SAFETENSORS_DTYPES = {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}
_SAFETENSORS_DTYPES |= {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_SAFETENSORS_DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}


class Source(NamedTuple):
    """An opened checkpoint."""

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]  # config.json, {} if there is none
    files: tuple[Path, ...]  # the weight files
    origin: str  # as the user gave it, with the revision for a hub repository


def open_source(source: str | Path, revision: str | None = None) -> Source:
    """Opens a directory, a weight file (or the index of its shards), or a repository ``owner/name`` of the Hugging Face hub.

    Args:
        source: a path that exists, or a hub id.
        revision: branch, tag or commit of the hub repository.

    Returns:
        The opened checkpoint.

    Raises:
        ValueError: there are no weights or several, the hub cannot be reached, or the checkpoint is damaged (one line per
            problem).
    """
    path, origin = Path(source), str(source)
    if not os.path.exists(path):  # unlike Path.exists, False for an invalid path
        path = _download(origin, revision)
        origin = f"{origin}@{path.name}"
    elif revision is not None:
        raise ValueError(f"expected a hub id for revision {revision!r}, got the path {path}: leave the revision out")
    folder = path if path.is_dir() else path.parent
    problems: list[str] = []
    chosen = _choose(folder) if path.is_dir() else path
    config = _attempt(problems, read_json, folder / "config.json") if (folder / "config.json").exists() else {}
    if chosen.name.endswith(".index.json"):
        tensors, files = _open_shards(problems, chosen)
    else:
        tensors, files = _attempt(problems, _open_file, chosen), (chosen,)
    if problems or tensors is None or config is None:
        raise ValueError(
            "\n".join([f"expected a complete checkpoint at {origin}, got one with problems (download it again):", *problems])
        )
    return Source(folder, tensors, config, files, origin)


def _attempt(problems: list[str], read: Callable[..., dict], *args: Any) -> dict | None:
    """The result of ``read``, or None with its errors in ``problems``."""
    try:
        return read(*args)
    except ValueError as error:
        problems.extend(str(error).split("\n"))
        return None


def _download(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"expected a directory, a weight file or a hub id owner/name, got {name!r}, which does not exist: check the spelling"
        )
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the network, the hub and its cache raise many kinds of errors
        at = f" at revision {revision}" if revision else ""
        got = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"expected the path or the hub repository {name}{at}, got no such path and {got}: offline, run "
            f"`hf download {name}{f' --revision {revision}' if revision else ''} --local-dir DIR` elsewhere and pass DIR"
        ) from error


def _choose(folder: Path) -> Path:
    """The weight file of a directory, or the index of its shards."""
    for patterns in PATTERNS:
        found = sorted(path for pattern in patterns.split() for path in folder.glob(pattern) if path.name[0] != ".")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(
                f"expected one file of weights in {folder}, got {names}: name one of them, or add the index of the shards"
            )
        if found:
            return found[0]
    raise ValueError(f"expected weights in {folder} ({', '.join(' '.join(PATTERNS).split())}), got none: name the file")


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got none: download it again")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return pickles.tensors(path)
    raise ValueError(
        f"{path}: expected .safetensors, .pt, .pth, .bin or .index.json, got {path.suffix!r}: save it as one of these"
    )


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, after the safetensors library has checked its header.

    Bytes are memory-mapped piece by piece: the library would map the whole file and keep each page that was read.
    """
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = _parse_json(path, file.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}: download it again") from error
    header.pop("__metadata__", None)
    dtypes = {name: str(_SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])) for name, entry in header.items()}
    if problems := pickles.unsupported(dtypes):
        raise ValueError("\n".join(f"{path}: {line}" for line in problems))
    found = {}
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        fetch = partial(pickles.file_bytes, path, 8 + size + entry["data_offsets"][0])
        found[name] = pickles.strided(name, DTYPES[dtypes[name]], shape, strides, fetch)
    return found


def _open_shards(problems: list[str], index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of all shards that an index names, and the paths of the shards."""
    weight_map = _attempt(problems, _weight_map, index) or {}
    files = sorted(set(weight_map.values()))
    shards = {file: _attempt(problems, _open_shard, index.parent, file) for file in files}
    opened = {file: shard for file, shard in shards.items() if shard is not None}
    for file, shard in opened.items():
        listed = {name for name in weight_map if weight_map[name] == file}
        for names, what in (
            (listed - set(shard), "by the index, got a shard without"),
            (set(shard) - set(weight_map), "in the index, got an index without"),
            (set(shard) & set(weight_map) - listed, "in one shard only, got an index that names another"),
        ):
            if names:
                problems.append(f"{index.parent / file}: expected {some(names)} {what}: download shards and index again")
    return {name: tensor for shard in opened.values() for name, tensor in shard.items()}, tuple(
        index.parent / file for file in files
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: expected weight_map to name a shard for each tensor, got another value: download it again")
    return weight_map


def _open_shard(folder: Path, name: str) -> dict[str, Tensor]:
    """Opens a shard within the folder; a snapshot in the hub's cache may link to the blobs of its own repository."""
    path, root = folder / name, folder.resolve()
    root = next((up.parent for up in root.parents if up.name == "snapshots" and up.parent.name.startswith("models--")), root)
    if not re.fullmatch(r"[^/\\\0]+", name) or not Path(os.path.realpath(path)).is_relative_to(root) or name in (".", ".."):
        raise ValueError(f"{folder}: expected shards in the directory itself, got {name!r:.200}: download shards and index again")
    return _open_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: the file cannot be read or holds another value.
    """
    try:
        return _parse_json(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}: download it again") from error


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Parses a JSON object in which no name occurs twice."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}: download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}: download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"{some(name for name in counts if counts[name] > 1)} twice")
    return dict(pairs)
