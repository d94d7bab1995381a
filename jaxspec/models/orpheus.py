"""Orpheus (canopylabs/orpheus-3b-0.1-ft): Llama 3.2 with frames of seven SNAC codes in its vocabulary.

A reference is an earlier turn of the conversation, which the pretrained model (orpheus-3b-0.1-pretrained) continues.
"""

from typing import TYPE_CHECKING, Any

from jaxspec.models import card
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME: str = "orpheus"
MARK: str = "<custom_token_10>"
STOPS: tuple[str, ...] = ("<custom_token_2>",)
SLOTS: int = 7

# Tokens 3 and 4 enclose the user's message; 5 begins the answer, 1 its speech, 2 ends its speech, and 6 the answer.
_TURN = "<custom_token_3><|begin_of_text|>{}<|eot_id|><custom_token_4><custom_token_5><custom_token_1>"
_PROMPT = _TURN.format("{voice}: {text}")
_CLONE = (_TURN.format("{reference}"), "{codes}", "<custom_token_2><custom_token_6>" + _TURN.format("{text}"))
_VOICES = ("tara", "leah", "jess", "leo", "dan", "mia", "zac", "zoe")


def codes(tokenizer: "Tokenizer") -> tuple[int, int]:
    """The id of the first slot's first code and the codes per slot; raises ValueError where the tokenizer has none."""
    first, count = card.code_ids(tokenizer, "<custom_token_{}>")
    return first + 10, (count - 10) // SLOTS


def model(shape: Config, tokenizer: "Tokenizer", ids: dict[str, Any]) -> card.Model:
    """The description of a checkpoint; for arguments and errors see ``jaxspec.convert.pipeline.Vocabulary``."""
    card.token_ids(tokenizer, "<|begin_of_text|>", "<|eot_id|>", *(f"<custom_token_{i}>" for i in range(1, 7)))
    return card.Model(
        family=NAME,
        shape=shape,
        prompt=(_PROMPT,),
        sampling=Sampling(temperature=0.6, top_p=0.8, repetition_penalty=1.3),
        codec="snac",
        licence="Apache-2.0 (its base, Llama 3.2, under the Llama 3.2 Community License)",
        slots=SLOTS,
        clone=_CLONE,
        voices=_VOICES,
        max_new_tokens=1200,
        **ids,
    )
