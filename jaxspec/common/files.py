"""Atomic writes of single files."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a temporary file that replaces ``path`` when the block succeeds.

    On an error the temporary file is removed and ``path`` is unchanged.

    Args:
        path: to write; the temporary file is in its folder and has its suffix.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
