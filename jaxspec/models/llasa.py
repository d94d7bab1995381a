"""LLaSA (HKUSTAudio/Llasa-1B, 3B, 8B; arXiv 2502.04128): Llama 3 with 65,536 codes of X-codec2 in its vocabulary."""

from typing import TYPE_CHECKING, Any

from jaxspec.models import card
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME: str = "llasa"
MARK: str = "<|SPEECH_UNDERSTANDING_START|>"  # the token by which the family is recognised
STOPS: tuple[str, ...] = ("<|SPEECH_GENERATION_END|>",)
SLOTS: int = 1

# The chat template of Llama 3 with a fixed date; that of Llama 3.2 inserts today's.
_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<|SPEECH_GENERATION_START|>"
)


def codes(tokenizer: "Tokenizer") -> tuple[int, int]:
    """The id of the first code and the number of codes; raises ValueError where the tokenizer has none."""
    return card.code_ids(tokenizer, "<|s_{}|>")


def model(shape: Config, tokenizer: "Tokenizer", ids: dict[str, Any]) -> card.Model:
    """The description of a checkpoint; for arguments and errors see ``jaxspec.convert.pipeline.Vocabulary``."""
    card.token_ids(tokenizer, "<|begin_of_text|>", "<|TEXT_UNDERSTANDING_START|>", "<|SPEECH_GENERATION_START|>")
    return card.Model(
        family=NAME,
        shape=shape,
        prompt=(_PROMPT,),
        sampling=Sampling(temperature=0.8),
        codec="xcodec2",
        licence="CC-BY-NC-4.0",
        max_tokens=2048,
        **ids,
    )
