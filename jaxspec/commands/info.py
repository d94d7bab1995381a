"""The command `info`: what a converted checkpoint is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from jaxspec.checkpoint import store


@dataclasses.dataclass(frozen=True)
class Info:
    """Prints what a converted checkpoint is."""

    folder: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    json: bool = False
    """Print it as one JSON object."""

    def run(self) -> None:
        """Prints."""
        print(describe(self.folder, self.json))


def describe(folder: Path, as_json: bool) -> str:
    """What a converted checkpoint says of itself.

    Raises:
        ValueError: the folder holds none.
    """
    description = store.read_description(folder)
    if as_json:
        return json.dumps(description)
    return "\n".join(f"{name:44}{_brief(value)}" for name, value in _flat(description))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in values.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 100 else f"{text[:60]} ... {text[-30:]}"
