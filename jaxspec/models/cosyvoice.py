"""CosyVoice 2 and 3 (FunAudioLLM; arXiv 2412.10117, 2505.17589): Qwen 2 with separate text and code tables."""

import dataclasses

from jaxspec.models import card
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

NUM_CODES = 6561  # 3^8
_SAMPLING = Sampling(top_k=25, top_p=0.8, repetition_window=10, withheld=NUM_CODES)


@dataclasses.dataclass(frozen=True)
class Version:
    """The differences between CosyVoice 2 and 3.

    Attributes:
        name: of the family.
        rows: of the table and the head of codes; ids after the codes end an utterance or mark a part of the prompt.
        markers: rows of a separate table for the two markers; 0 where they are rows of the table of codes.
        start, turn: ids of the markers of the start and of the beginning of speech.
        head_bias: whether the head has a bias.
        system: text before the reference's text.
        instruct: what precedes the text with an instruction.
    """

    name: str
    rows: int
    markers: int
    start: int
    turn: int
    head_bias: bool
    system: str
    instruct: str


V2 = Version("cosyvoice2", 6564, 2, 6564, 6565, True, "", "{instruct}<|endofprompt|>")
_V3_SYSTEM = "You are a helpful assistant."
V3 = Version(
    "cosyvoice3", 6761, 0, 6561, 6563, False, f"{_V3_SYSTEM}<|endofprompt|>", f"{_V3_SYSTEM} {{instruct}}<|endofprompt|>"
)
VERSIONS = {version.name: version for version in (V2, V3)}


def model(version: Version, shape: Config) -> card.Model:
    """The description of a checkpoint.

    Args:
        version: which CosyVoice.
        shape: of the transformer; its table of codes may be padded.
    """
    moved = shape.vocab - version.rows  # the padding
    start, turn = (i + moved if i >= version.rows else i for i in (version.start, version.turn))
    return card.Model(
        family=version.name,
        shape=shape,
        codes_first=0,
        num_codes=NUM_CODES,
        stop_ids=tuple(range(NUM_CODES, version.rows)),
        text_first=sum(shape.input_tables[:-1]),
        prompt=(start, version.system + "{reference}", "{text}", turn),
        sampling=_SAMPLING,
        codec=version.name,
        licence="Apache-2.0",
        instruct=version.instruct,
        max_codes_per_token=20,
        min_codes_per_token=2,
        head="speech",
    )
