"""Drafts: each builder gives a ``jaxspec.types.Draft``. The same arguments give the same object, so that nothing recompiles."""

from jaxspec.draft.model import model_draft
from jaxspec.draft.ngram import ngram_draft

__all__ = ["model_draft", "ngram_draft"]
