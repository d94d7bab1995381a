"""Drafts: each builder returns a ``jaxspec.types.Draft``; the same arguments give the same object, which reuses programs."""

from jaxspec.draft.model import model_draft
from jaxspec.draft.ngram import ngram_draft

__all__ = ["model_draft", "ngram_draft"]
