"""A plan for people."""

from collections.abc import Mapping
from typing import Any

from jaxspec import mesh
from jaxspec.bench.plan_shapes import readable


def passes(result: Mapping[str, Any]) -> bool:
    """Whether the program fits in the chip and every check holds.

    Args:
        result: of ``plan.plan``.
    """
    return result["memory"]["fits"] and all(check["holds"] for check in result["checks"].values())


def card(result: Mapping[str, Any]) -> str:
    """The plan, a line for each figure.

    Args:
        result: of ``plan.plan``.
    """
    lines = [
        *_head(result),
        *_memory(result["memory"]),
        "prefill",
        *_counted(result["prefill"]),
        _scheduled(result["prefill"]),
        "one step of the plain loop, for one token of each row",
        _bound(result["step"]),
        _scheduled(result["step"]),
        *_collectives(result, "step"),
        "one round, for 1 to K + 1 tokens of each row",
        *_round(result["round"], result["step"]),
        *_collectives(result, "round"),
        "checks of the compiled program",
    ]
    for check in result["checks"].values():
        lines.append(f"  {'holds' if check['holds'] else 'FAILS'}: {check['what']}")
        if not check["holds"]:
            lines += [f"    {check['count']} instructions break it, such as", *(f"      {op}" for op in check["found"])]
    return "\n".join(lines)


def on_mesh(result: Mapping[str, Any]) -> bool:
    """Whether the plan is for several devices."""
    return mesh.parse(result["mesh"]) != (1, 1)


def _collectives(result: Mapping[str, Any], name: str) -> list[str]:
    """The collectives of a step or a round, and the estimate with them; nothing for one device."""
    if not on_mesh(result):
        return []
    figures, wait = result[name], result["collective_us"]
    counted = [f"  collectives {_WHEN[when]}: {_kinds(kinds)}" for when, kinds in figures["collectives"].items() if kinds]
    scheduled = "no published clock" if figures["cycles_s"] is None else f"{figures['cycles_s'] * 1e3:.3g} ms scheduled"
    count = round(figures["collectives_s"] * 1e6 / wait) if wait else 0
    return [
        *counted,
        f"  estimate {figures['estimate_s'] * 1e3:.3g} ms: the larger of bandwidth and schedule ({scheduled}), {count} x {wait:g}"
        f" us, which is a guess, and {figures['links_s'] * 1e3:.2g} ms on the links",
    ]


_WHEN = {"always": "in each one", "trip": "in each trip of an inner loop", "branch": "in branches that are not the cheapest"}


def _kinds(kinds: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{entry['count']} {kind} of {readable(entry['bytes'])}" for kind, entry in kinds.items())


def _head(result: Mapping[str, Any]) -> list[str]:
    if on_mesh(result):
        device = f"a mesh of {result['mesh']}, of which the figures are one device's,"
    else:
        device = "one chip" if result["devices_per_chip"] == 1 else f"one of the {result['devices_per_chip']} devices of a chip"
    kind = result["dtype"] + (" with int8 weights" if result["weights"] == "int8" else "")
    draft = f"a draft of {result['draft_layers']}" if result["draft_layers"] else "the n-gram draft"
    return [
        f"{result['model']}, {result['target_layers']} layers, and {draft}, in {kind}: batch {result['batch']}, "
        f"cache length {result['cells']}, prompt length {result['prompt_length']}, K = {result['draft_length']}",
        f"on {device} of {result['topology']} ({result['device']}); compiled in {result['compile_s']:.0f} s, not run",
    ]


def _memory(memory: Mapping[str, Any]) -> list[str]:
    size = {name: readable(count) for name, count in memory.items()}
    return [
        "memory by shape",
        f"  target {size['target']}, draft {size['draft']} ({size['shared']} of each are tables that may be shared)",
        f"  groups {size['groups']}, caches {size['target_cache']} + {size['draft_cache']}",
        "memory as compiled",
        f"  arguments {size['arguments']}, outputs {size['outputs']}, program {size['code']}, temporaries {size['temporaries']}",
        f"  of these: caches as laid out in HBM {size['caches_as_laid_out']}, parameters in another layout "
        f"{size['parameters_laid_out_anew']}",
        f"  total {size['total']} of {size['room']}: {'fits' if memory['fits'] else 'DOES NOT FIT'}",
    ]


def _round(figures: Mapping[str, Any], step: Mapping[str, Any]) -> list[str]:
    lines = [*_counted(figures), _bound(figures), _scheduled(figures)]
    if figures["cycles_of_draft_steps"] is not None:
        lines.append(f"  of these cycles {figures['cycles_of_draft_steps']:,} in the draft's steps after its first")
    scheduled, read = figures["cycles"] / step["cycles"], figures["bytes_needed"] / step["bytes_needed"]
    return [
        *lines,
        f"  a round is {scheduled:.2f} plain steps as scheduled, {read:.2f} by bytes read: it is faster with more tokens a round",
    ]


def _counted(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"  {figures['operations'] / 1e9:,.4g} G operations: {figures['compute_bound_s'] * 1e3:.3g} ms at peak",
        f"  {readable(figures['bytes'])} accessed as XLA counts: {figures['optimal_s'] * 1e3:.3g} ms by its own estimate",
    ]


def _bound(figures: Mapping[str, Any]) -> str:
    needed = readable(figures["bytes_needed"])
    return f"  {needed} of parameters and caches to read: {figures['bandwidth_bound_s'] * 1e3:.3g} ms at full bandwidth"


def _scheduled(figures: Mapping[str, Any]) -> str:
    seconds = "" if figures["cycles_s"] is None else f" = {figures['cycles_s'] * 1e3:.3g} ms"
    return f"  {figures['cycles']:,} cycles scheduled{seconds}"
