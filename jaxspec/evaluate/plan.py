"""What an evaluation compares: sentences, seeds, and the settings of each row that the models generate."""

import dataclasses
from typing import Literal

from jaxspec.evaluate.recognize import Recognizer, default_recognizer
from jaxspec.models.builtin import VOICES
from jaxspec.synthesis.builtin import SAMPLING
from jaxspec.synthesis.contract import Settings
from jaxspec.text.held_out import held_out

BUILTIN_DRAFT = "builtin"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compare. Sentence i is synthesised in voice i modulo the number of voices.

    Raises:
        ValueError: a value is out of its range.
    """

    texts: Literal["sentences", "prose"] = "sentences"
    """The held-out texts: 200 short sentences, or 40 sentences of prose."""
    sentences: int | None = None
    """How many of them to synthesise; by default all."""
    seeds: int = 3
    """How many times to synthesise each sentence, each time with another seed."""
    betas: tuple[float, ...] = (0.2, 0.4)
    """The tolerances to compare."""
    thresholds: tuple[float, ...] = (0.6, 0.7, 0.8, 0.85)
    """The cosine thresholds of the coarse-grained verifier to compare."""
    blocks: bool = False
    """Compare block verification of the exact and the coarse-grained rule too."""
    matrix: Literal["target", "codec"] = "target"
    """Which vectors the groups are built from: the target's embeddings or the codec's code vectors."""
    draft: str = BUILTIN_DRAFT
    """What drafts: builtin (the voice's own draft), ngram, or the folder of a draft that was trained for the voice."""
    draft_length: int | None = Settings.draft_length
    """Codes to draft in a round (K); by default as `jaxspec tune` chose for the draft, else 3."""
    weights: Literal["float", "int8"] = "float"
    """int8: the voice with int8 weights, whose logits are compared with those of the float weights."""
    temperature: float = SAMPLING.temperature
    """Sampling temperature; 0 is greedy."""
    recognizer: Recognizer = dataclasses.field(default_factory=default_recognizer)
    """What transcribes: moonshine (base-en), where its package exists (Linux, x86-64), or pocketsphinx."""

    def __post_init__(self) -> None:
        fewest, most = len(VOICES), len(held_out(self.texts))
        if self.sentences is not None and not fewest <= self.sentences <= most:
            raise ValueError(f"expected {fewest} to {most} sentences, got {self.sentences}: choose a number in that range")
        if self.seeds < 1:
            raise ValueError(f"expected 1 seed or more, got {self.seeds}: the sentences are synthesised once for each seed")
        if self.draft_length is not None and self.draft_length < 1:
            raise ValueError(f"expected a draft length of 1 or more, got {self.draft_length}: the verifiers need drafted codes")
        if self.weights == "int8" and self.draft != BUILTIN_DRAFT:
            raise ValueError(
                f"expected --draft {BUILTIN_DRAFT} with --weights int8, got {self.draft}: they are tied to the floats"
            )
        self.settings()

    def chosen(self) -> list[str]:
        """The texts to synthesise."""
        return held_out(self.texts)[: self.sentences]

    def settings(self) -> dict[str, Settings]:
        """The settings of each row that the models generate, by the row's name."""
        base = Settings(draft_length=self.draft_length, temperature=self.temperature, matrix=self.matrix)
        rows = {name: dataclasses.replace(base, verify=name) for name in ("autoregressive", "exact")}
        for beta in self.betas:
            rows[f"tolerance {beta:g}"] = dataclasses.replace(base, verify="tolerance", beta=beta)
        for threshold in self.thresholds:
            rows[f"coarse-grained {threshold:g}"] = dataclasses.replace(base, verify="coarse-grained", threshold=threshold)
        blocks = ("exact", "coarse-grained") if self.blocks else ()
        some = {name: one for name, one in rows.items() if one.verify in blocks}
        return rows | {f"block-{name}": dataclasses.replace(one, verify=f"block-{one.verify}") for name, one in some.items()}
