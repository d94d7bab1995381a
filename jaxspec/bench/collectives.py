"""The collectives of a compiled program: how often an iteration of its loop runs each kind, and the bytes of their results."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxspec.bench import hlo
from jaxspec.bench.hlo import Op, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_GATHERS = ("all-gather", "all-to-all")

ALWAYS, TRIP, BRANCH = "always", "trip", "branch"  # when one runs
_WHEN = (ALWAYS, TRIP, BRANCH)
_CONTINUES = ("async-done", "async-update")  # may name the computation that async-start has begun

Summary = Mapping[str, Mapping[str, Mapping[str, int]]]


class Collective(NamedTuple):
    """One collective of a computation.

    Attributes:
        op: the instruction; of an asynchronous pair, the one that has the result.
        kind: one of ``KINDS``.
        bytes: of its result on one device; of its operands where they are larger, as of a reduce-scatter.
        times: how often a run of the computation repeats it, by loops of known length.
        when: ALWAYS; TRIP, in each trip of a loop of unknown length; or BRANCH, in a branch of a conditional that is not the
            cheapest.
    """

    op: Op
    kind: str
    bytes: int
    times: int
    when: str


def collectives(program: Program, name: str, times: int = 1, when: str = ALWAYS) -> Iterator[Collective]:
    """The collectives of a computation and of those that it calls.

    Args:
        program: with the computation.
        name: of the computation.
        times: how often it runs.
        when: it runs.
    """
    shapes = {op.name: op.shape for op in program.computations[name]}
    for op in program.computations[name]:
        kind = op.code.removesuffix("-done")
        if kind in KINDS:
            given = 0 if kind != op.code else sum(_bytes(shapes.get(operand, "")) for operand in op.operands)
            yield Collective(op, kind, max(_bytes(op.shape), given), times, when)
        elif op.code == "while":
            trips = hlo.trips(program, op)
            inner = when if trips or when != ALWAYS else TRIP
            yield from collectives(program, op.calls("body")[0], times * (trips or 1), inner)
        elif op.code == "conditional":
            branches = op.calls()
            cheapest = min(branches, key=lambda branch: hlo.scheduled_cycles(program, branch))
            for branch in branches:
                yield from collectives(program, branch, times, when if branch == cheapest or when != ALWAYS else BRANCH)
        elif op.code not in _CONTINUES and not op.code.startswith(KINDS):
            for called in op.calls("calls") + op.calls("to_apply"):
                yield from collectives(program, called, times, when)


def _bytes(shape: str) -> int:
    return sum(hlo.nbytes(array) for array in hlo.arrays(shape))


def summary(program: Program, name: str) -> Summary:
    """The count and the bytes by when they run and by kind: ``{"always": {"all-reduce": {"count": 1, "bytes": 4}}, ...}``."""
    found: dict[str, dict[str, dict[str, int]]] = {when: defaultdict(lambda: {"count": 0, "bytes": 0}) for when in _WHEN}
    for one in collectives(program, name):
        entry = found[one.when][one.kind]
        entry["count"] += one.times
        entry["bytes"] += one.times * one.bytes
    return {when: dict(kinds) for when, kinds in found.items()}


def checks(program: Program, large: int) -> dict[str, dict[str, Any]]:
    """Checks the collectives of the compiled loop.

    In branches that are not the cheapest, those of filters as top-k, distributions are gathered on purpose where they are few.

    Args:
        program: with the loop.
        large: the bytes of a result that is as large as a cache, or as the distribution of one token.

    Returns:
        The ``hlo.verdict`` of each check.
    """
    found = list(collectives(program, program.body))
    permutes = [one.op for one in found if one.kind == "collective-permute"]
    gathers = [one.op for one in found if one.kind in _GATHERS and one.bytes >= large and one.when != BRANCH]
    return {
        "permutes": hlo.verdict("no collective-permute in the loop", permutes),
        "gathers": hlo.verdict(f"no gather of {large:,} bytes or more, a cache or a distribution, but for filters", gathers),
    }


def total(counted: Summary) -> dict[str, int]:
    """The count and the bytes of an iteration in which inner loops run once and conditionals take the cheapest branch."""
    entries = [entry for when in (ALWAYS, TRIP) for entry in counted[when].values()]
    return {name: sum(entry[name] for entry in entries) for name in ("count", "bytes")}
