"""What the commands convert, info and groups print."""

import json
import re
from pathlib import Path
from typing import Any

from jaxspec import checkpoint, pretrained
from jaxspec import groups as asg
from jaxspec.convert.pipeline import Converted
from jaxspec.say import check_writable
from jaxspec.speaker import pretrained as speakers


def layers(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,18-23".

    Raises:
        ValueError: something else.

    >>> layers("0,1,18-20")
    (0, 1, 18, 19, 20)
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"expected layers such as 0,1,18-23, got {text!r}")
    spans = [[*map(int, part.split("-"))] for part in text.split(",")]
    return tuple(i for span in spans for i in range(span[0], span[-1] + 1))


def card(converted: Converted, dest: Path) -> str:
    """What a conversion made, a line each, with what is worth knowing."""
    dropped = f"left out by name: {len(converted.dropped)}" + (f", such as {converted.dropped[0]}" if converted.dropped else "")
    lines = [
        f"{converted.family}: {converted.parameters / 1e6:,.1f} M parameters, {converted.bytes / 1e9:.2f} GB in {dest}",
        dropped,
        *(f"note: {note}" for note in converted.notes),
    ]
    return "\n".join(lines)


def info(folder: Path, as_json: bool) -> str:
    """What a converted checkpoint says of itself.

    Raises:
        ValueError: the folder holds none.
    """
    description = checkpoint.read_description(folder)
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


def groups(folder: Path, threshold: float, plot: Path | None, as_json: bool) -> str:
    """Builds the groups of a model, or takes those that its folder holds, and says what they look like.

    Raises:
        ValueError: the folder holds no language model, or the threshold is no cosine.
    """
    from rich.progress import Progress

    if plot:
        check_writable(plot)
    target = pretrained.load(folder)
    with Progress(transient=True) as progress:
        task = progress.add_task("groups")
        made = speakers.groups(target, threshold, lambda done, of: progress.update(task, completed=done, total=of))
    report = asg.report(made) | {"threshold": threshold, "file": str(speakers.groups_path(target, threshold))}
    if plot:
        asg.plot(made, plot)
    return json.dumps(report) if as_json else "\n".join(f"{name:24}{value}" for name, value in report.items())
