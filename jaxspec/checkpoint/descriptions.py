"""The JSON descriptions of the three kinds of folders: language model ("model"), draft ("draft") and codec ("codec")."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxspec.checkpoint import store
from jaxspec.common import records
from jaxspec.models.card import Model
from jaxspec.verify.rules import RULES


@dataclasses.dataclass(frozen=True)
class Tuned:
    """How a draft is used best, as `jaxspec tune` measured it: the defaults of what decodes with it.

    Attributes:
        verify: the rule, or "autoregressive" where the draft does not pay.
        draft_length: K.
        threshold: of the groups; None for a rule without groups.
        max_quality_loss: that was asked for. quality_loss: that was measured, see ``bench.tuning``.
        tokens_per_round, speed_up: that were measured.
        batch: the rows that were decoded together.
        device, version: what it was measured on, and by which jaxspec.

    Raises:
        ValueError: an unknown rule, or a K below 1.
    """

    verify: str
    draft_length: int
    threshold: float | None
    max_quality_loss: float
    quality_loss: float
    tokens_per_round: float
    speed_up: float
    batch: int
    device: str
    version: str

    def __post_init__(self) -> None:
        if self.verify not in (*RULES, "autoregressive") or self.draft_length < 1:
            raise ValueError(f"verify {self.verify!r} with draft_length {self.draft_length!r}")


@dataclasses.dataclass(frozen=True)
class DraftDescription:
    """A draft that was trained for one target.

    Attributes:
        family: a name in ``jaxspec.draft.families.FAMILIES``.
        settings: the fields of the family's ``Config``, as JSON values.
        target: the digest of the target's parameters, ``Model.digest``.
        shared: the draft's parameters that are arrays of the target, {path in the draft: path in the target}; not stored.
        licence: of the weights.
        source, files: where they come from.
        digest: of the stored parameters. parameters: how many numbers are stored.
        tuned: the fields of ``Tuned``, as JSON values; empty before `jaxspec tune`.
    """

    family: str
    settings: Mapping[str, Any]
    target: str
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str = ""
    source: str = ""
    files: tuple[str, ...] = ()
    digest: str = ""
    parameters: int = 0
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CodecDescription:
    """A codec.

    Attributes:
        family: a name in ``pretrained.CODECS``.
        shape: the fields of the codec's ``Config``, as JSON values.
        licence: of the weights.
        source, files: what was converted.
        digest: of the parameters. parameters: how many numbers there are; 0 if unknown.
    """

    family: str
    shape: Mapping[str, Any]
    licence: str
    source: str = ""
    files: tuple[str, ...] = ()
    digest: str = ""
    parameters: int = 0


Description = Model | DraftDescription | CodecDescription
_Kind = TypeVar("_Kind", Model, DraftDescription, CodecDescription)

_NAMES: dict[type[Description], str] = {Model: "language model", DraftDescription: "draft", CodecDescription: "codec"}
_KINDS: dict[type[Description], str] = {Model: "model", DraftDescription: "draft", CodecDescription: "codec"}
_READ = {kind: made for made, kind in _KINDS.items()} | {"language model": Model}  # the last in folders of earlier versions


def to_json(description: Description) -> dict[str, Any]:
    """A description as JSON values."""
    return {"kind": _KINDS[type(description)], **dataclasses.asdict(description)}


def read(folder: str | Path) -> Description:
    """The description of a folder.

    Raises:
        ValueError: the folder holds none, or one that cannot be read.
    """
    values = store.read_description(folder)
    path, kind = Path(folder) / store.DESCRIPTION, values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(f"expected kind {', '.join(_KINDS.values())} in {path}, got {kind!r}: install a newer jaxspec")
    made = _READ[kind]
    try:
        return records.from_json(made, values)
    except ValueError as error:
        raise ValueError(f"expected the description of a {_NAMES[made]} in {path}, got {error}: make the folder again") from error


def read_as(folder: str | Path, kind: type[_Kind]) -> _Kind:
    """The description of a folder that must be of one kind.

    Raises:
        ValueError: the folder holds none, one of another kind, or one that cannot be read.
    """
    description = read(folder)
    if not isinstance(description, kind):
        came, wanted = _NAMES[type(description)], _NAMES[kind]
        raise ValueError(f"expected a {wanted} in {folder}, got a {came}: give the folder of a {wanted}")
    return description


def tuned_of(description: DraftDescription, folder: str | Path) -> Tuned | None:
    """How a draft is used best; None before `jaxspec tune`.

    Raises:
        ValueError: the description is damaged there.
    """
    try:
        return records.from_json(Tuned, description.tuned) if description.tuned else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected what `jaxspec tune` writes as tuned in {folder}, got {error}: run it again") from error


def write_tuned(folder: str | Path, tuned: Tuned) -> None:
    """Writes how a draft is used best into its description, atomically.

    Raises:
        ValueError: the folder holds no draft that was trained.
        OSError: it cannot be written.
    """
    description = dataclasses.replace(read_as(folder, DraftDescription), tuned=dataclasses.asdict(tuned))
    store.write_description(Path(folder), to_json(description))
