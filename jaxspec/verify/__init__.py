"""The rules of acceptance: each is one pure function over a proposal, see ``jaxspec.types.Verify``."""

from jaxspec.verify.exact import exact

__all__ = ["exact"]
