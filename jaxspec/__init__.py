"""Speculative decoding for speech-token language models: a draft proposes, a target verifies, the rule of acceptance is yours."""

from typing import TYPE_CHECKING, Any

from jaxspec import draft, groups, mesh, sampling, types, verify
from jaxspec.common.compilation_cache import use_compilation_cache
from jaxspec.draft import model_draft, ngram_draft
from jaxspec.groups import Groups, acoustic_similarity_groups
from jaxspec.sampling import Sampling
from jaxspec.speculate import autoregressive, generate
from jaxspec.state import Generation, Info, State
from jaxspec.text import TextWarning
from jaxspec.types import Codec, Draft, LanguageModel, Proposal, Verdict, Verify

if TYPE_CHECKING:
    from jaxspec.synthesis.pipeline import speak

__version__ = "0.1.0"

__all__ = [
    "Codec",
    "Draft",
    "Generation",
    "Groups",
    "Info",
    "LanguageModel",
    "Proposal",
    "Sampling",
    "State",
    "TextWarning",
    "Verdict",
    "Verify",
    "acoustic_similarity_groups",
    "autoregressive",
    "draft",
    "generate",
    "groups",
    "mesh",
    "model_draft",
    "ngram_draft",
    "sampling",
    "speak",
    "types",
    "use_compilation_cache",
    "verify",
]


def __getattr__(name: str) -> Any:
    """``speak``, whose models and text front end are imported when it is first used."""
    if name == "speak":
        from jaxspec.synthesis.pipeline import speak

        return speak
    raise AttributeError(f"module 'jaxspec' has no attribute {name!r}")
