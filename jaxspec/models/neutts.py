"""NeuTTS-Air (neuphonic/neutts-air): Qwen 2.5 with 65,536 codes of NeuCodec in its vocabulary, prompted with phonemes."""

from typing import TYPE_CHECKING, Any

from jaxspec.models import card
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME: str = "neutts-air"
MARK: str = "<|TEXT_PROMPT_START|>"
STOPS: tuple[str, ...] = ("<|SPEECH_GENERATION_END|>",)
SLOTS: int = 1

_PROMPT = "user: Convert the text to speech:<|TEXT_PROMPT_START|>{text}<|TEXT_PROMPT_END|>\nassistant:<|SPEECH_GENERATION_START|>"


def codes(tokenizer: "Tokenizer") -> tuple[int, int]:
    """The id of the first code and the number of codes; raises ValueError where the tokenizer has none."""
    return card.code_ids(tokenizer, "<|speech_{}|>")


def model(shape: Config, tokenizer: "Tokenizer", ids: dict[str, Any]) -> card.Model:
    """The description of a checkpoint; for arguments and errors see ``jaxspec.convert.pipeline.Vocabulary``."""
    card.token_ids(tokenizer, "<|TEXT_PROMPT_END|>", "<|SPEECH_GENERATION_START|>")
    return card.Model(
        family=NAME,
        shape=shape,
        prompt=(_PROMPT,),
        sampling=Sampling(temperature=1.0, top_k=50, min_new_tokens=50, withheld=ids["stop_ids"][0]),
        codec="neucodec",
        licence="Apache-2.0",
        phonemes="en-us",
        max_tokens=2048,
        **ids,
    )
