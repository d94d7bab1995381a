"""The command `info`: what a converted checkpoint is."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxspec.checkpoint import descriptions
from jaxspec.checkpoint.descriptions import Description, DraftDescription
from jaxspec.models.card import Model
from jaxspec.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Info:
    """Prints what a folder holds: a language model, a draft or a codec."""

    folder: tyro.conf.Positional[Path]
    """A folder that `jaxspec convert` made."""
    json: bool = False
    """Print the description as one JSON object."""

    def run(self) -> None:
        """Prints the description."""
        description = descriptions.read(self.folder)
        print(json.dumps(descriptions.to_json(description)) if self.json else card(description))


def card(description: Description) -> str:
    """The description as text, a line for each property that is set."""
    if isinstance(description, Model):
        rows = {"language model": description.family, **_model(description)}
    elif isinstance(description, DraftDescription):
        shared = ", ".join(f"{ours} (the target's {theirs})" for ours, theirs in description.shared.items())
        settings = _fields(description.settings)
        rows = {"draft": description.family, "settings": settings, "target": description.target, "shared": shared}
        rows["tuned"] = _fields(description.tuned)
    else:
        rows = {"codec": description.family, "shape": _fields(description.shape)}
    rows["parameters"] = f"{description.parameters:,}" if description.parameters else ""
    rows["source"] = description.source + (f" ({_some(description.files)})" if description.files else "")
    rows |= {"licence": description.licence, "digest": description.digest}
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items() if value)


def _model(model: Model) -> dict[str, str]:
    slots = f" in each of {model.slots} slots of a frame" if model.slots > 1 else ""
    limits = {
        "tokens of prompt and codes": model.max_tokens,
        "codes": model.max_new_tokens,
        "codes per token of the text": model.max_codes_per_token,
    }
    off = dataclasses.asdict(Sampling())
    sampling = {name: value for name, value in dataclasses.asdict(model.sampling).items() if value != off[name]}
    prompt = (part if isinstance(part, str) else f"[{part}]" for part in model.prompt)
    return {
        "transformer": _fields(dataclasses.asdict(model.shape)),
        "head": {"all": "the checkpoint's vocabulary", "speech": "codes and stop ids only"}.get(model.head, model.head),
        "codes": f"{model.num_codes:,}{slots}, from id {model.codes_first}",
        "stop ids": _some(model.stop_ids),
        "prompt": " ".join(prompt).replace("\n", "\\n"),
        "text": f"phonemes of espeak's {model.phonemes}" if model.phonemes else "",
        "voices": ", ".join(model.voices),
        "reference": "a recording" if model.clones else "",
        "instruction": model.instruct,
        "sampling": ", ".join(f"{name} {value}" for name, value in sampling.items()) or "temperature 1.0",
        "limits": ", ".join(f"{limit:,} {of}" for of, limit in limits.items() if limit),
        "codec": model.codec or "none (codes only)",
    }


def _fields(values: Mapping[str, Any]) -> str:
    """The fields of a configuration in one line; those that are off are left out."""
    parts = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            parts.append(f"{name} ({_fields(value)})")
        elif isinstance(value, tuple | list):
            parts.append(f"{name} ({', '.join(map(str, value))})")
        elif value:
            parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)


def _some(values: Sequence[object]) -> str:
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(map(str, values[:3])) + more
