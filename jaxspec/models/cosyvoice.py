"""CosyVoice 2 and 3 (FunAudioLLM; arXiv 2412.10117, 2505.17589): Qwen 2 with separate text and code tables.

Codes only: the flow model and the vocoder, which turn them into a waveform, are not implemented.
"""

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
    """

    name: str
    rows: int
    markers: int
    start: int
    turn: int
    head_bias: bool
    system: str


V2 = Version("cosyvoice2", 6564, 2, 6564, 6565, True, "")
V3 = Version("cosyvoice3", 6761, 0, 6561, 6563, False, "You are a helpful assistant.<|endofprompt|>")
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
        codec="",
        licence="Apache-2.0",
        max_codes_per_token=20,
        min_codes_per_token=2,
        head="speech",
    )
