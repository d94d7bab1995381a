"""Nested dicts of arrays in one safetensors file, with a JSON description in its header."""

import json
import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxspec.common.files import replacing
from jaxspec.common.trees import flatten, unflatten


def save(path: str | os.PathLike, tree: Any, description: dict[str, Any]) -> None:
    """Writes arrays atomically, floats as float16.

    Args:
        path: of the file.
        tree: a nested dict of arrays.
        description: JSON values.

    Raises:
        OSError: the file cannot be written.
    """
    flat = flatten(tree)
    arrays = {name: np.ascontiguousarray(_half(np.asarray(value))) for name, value in flat.items()}
    with replacing(path) as partial:
        save_file(arrays, partial, {"description": json.dumps(description)})


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16) if np.issubdtype(array.dtype, np.floating) else array


def load(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """Reads what ``save`` wrote, floats as float32.

    Args:
        path: of the file.

    Returns:
        The nested dict of arrays, and the description.

    Raises:
        ValueError: the file is missing, damaged, or not written by ``save``, or a value is NaN or infinite.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads(file.metadata()["description"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"expected a file of weights at {path}, got {error}: install jaxspec again") from error
    floats = {name: value.astype(np.float32) for name, value in arrays.items() if np.issubdtype(value.dtype, np.floating)}
    for name, value in floats.items():
        if not np.isfinite(value).all():
            raise ValueError(f"expected finite weights in {path}, got NaN or infinity in {name}: install jaxspec again")
    return unflatten({**arrays, **floats}), description
