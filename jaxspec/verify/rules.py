"""The verifiers by the names that settings and commands give them."""

import typing
from collections.abc import Callable
from typing import Literal

from jaxspec.groups import Groups
from jaxspec.types import Verify
from jaxspec.verify.block import block_coarse_grained, block_exact, block_tolerance
from jaxspec.verify.coarse_grained import coarse_grained
from jaxspec.verify.exact import exact
from jaxspec.verify.tolerance import tolerance

Rule = Literal["exact", "tolerance", "coarse-grained", "block-exact", "block-tolerance", "block-coarse-grained"]
RULES: tuple[str, ...] = typing.get_args(Rule)


def by_name(rule: str, beta: float, groups: Callable[[], Groups]) -> Verify:
    """The verifier of a name.

    Args:
        rule: one of ``RULES``.
        beta: of the tolerance rules.
        groups: makes the groups, for the coarse-grained rules only.
    """
    makers: dict[str, Callable[[], Verify]] = {
        "exact": exact,
        "tolerance": lambda: tolerance(beta),
        "coarse-grained": lambda: coarse_grained(groups()),
        "block-exact": block_exact,
        "block-tolerance": lambda: block_tolerance(beta),
        "block-coarse-grained": lambda: block_coarse_grained(groups()),
    }
    return makers[rule]()
