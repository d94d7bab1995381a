"""Verifiers: each is one pure function over a proposal, see ``jaxspec.types.Verify``."""

from jaxspec.verify.block import block_coarse_grained, block_exact, block_tolerance
from jaxspec.verify.coarse_grained import coarse_grained
from jaxspec.verify.exact import exact
from jaxspec.verify.tolerance import tolerance

__all__ = ["block_coarse_grained", "block_exact", "block_tolerance", "coarse_grained", "exact", "tolerance"]
