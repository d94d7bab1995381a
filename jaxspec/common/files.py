"""Atomic writes of single files."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxspec.common import hosts


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a temporary file that replaces ``path`` when the block succeeds.

    On an error the temporary file is removed and ``path`` is unchanged. Of several hosts only the first one writes: on the others
    the file is removed in the end.

    Args:
        path: to write; the temporary file is in its folder and has its suffix.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    folder = path.parent if hosts.is_first() else None
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        if not hosts.is_first():
            return os.unlink(name)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def claim(path: Path, asked: Mapping[str, Any], advice: str) -> None:
    """Keeps what the work in a folder is begun with in a JSON file there, or refuses to go on with something else.

    Args:
        path: of the file.
        asked: JSON values by name.
        advice: what to do, for the error.

    Raises:
        ValueError: a value differs from the one that was kept; the message names the first.
        OSError: the file cannot be written.
    """
    if not path.exists():
        return write_json(path, asked)
    before, asked = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(asked))
    for name in {**before, **asked}:
        if before.get(name) != asked.get(name):
            raise ValueError(
                f"expected the {name} {before.get(name)} that {path.parent} was begun with, got {asked.get(name)}: {advice}"
            )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
