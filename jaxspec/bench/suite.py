"""The benchmark from end to end: settings -> models -> times -> the roofline of each -> one result."""

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxspec.bench import roofline
from jaxspec.bench.cases import Models
from jaxspec.bench.loading import load
from jaxspec.bench.measure import run
from jaxspec.bench.peers import time_transformers
from jaxspec.bench.roofline import Rates
from jaxspec.bench.settings import Settings

DRAFT = "draft "  # before the names of drafts among the measured rates


def bench(settings: Settings, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a benchmark.

    Args:
        settings: what to time.
        progress: receives a line for each step.

    Returns:
        {"preset", "drafts", "acceptance": "real" or "synthetic", "rows": a dict for each case, "peers", "device": measured rates
        by dtype, versions and commit}. Keys that end in _s are seconds.

    Raises:
        ValueError: a setting is out of its range, or a batch does not fit in the device's memory.
    """
    settings.check()
    rows, device, peers = [], {}, []
    for dtype in settings.dtypes:
        models = load(settings, dtype)
        meters = _meters(models, dtype)
        readings = [_read(meters)]  # compiles them
        if settings.peer and not peers:
            shape = settings.prompts[0], settings.draft_lengths[0], settings.repeats
            peers = [row for batch in settings.batches for row in time_transformers(models, batch, *shape, progress)]
        made = run(models, settings.cases(), settings.repeats, progress, lambda m=meters, r=readings: r.append(_read(m)))
        best = {name: max(reading[name] for reading in readings) for name in meters}
        rates = ", ".join(f"{name.replace('_per_s', '')} {rate / 1e9:.1f} G/s" for name, rate in best.items())
        progress(f"{dtype}: best measured rates: {rates}")
        rows += [_with_roofline(row, models, best) | {"dtype": dtype} for row in made]
        device[dtype] = best
    return {
        "preset": settings.preset,
        "drafts": settings.drafts,
        "acceptance": "real" if settings.real else "synthetic",
        "rows": rows,
        "peers": peers,
        "device": device,
        **_environment(),
    }


def _meters(models: Models, dtype: str) -> dict[str, Callable[[], float]]:
    """The rates that bound the models: reading as many bytes as each has of weights, and multiplying."""
    configs = {"target": models.target} | {f"{DRAFT}{name}": draft.shape for name, draft in models.drafts.items()}
    reading = {
        f"{name}_bytes_per_s": roofline.reading(dtype, int(roofline.model_pass(config, 1, 1, 0).bytes))
        for name, config in configs.items()
        if config is not None
    }
    return {**reading, "flops_per_s": roofline.multiplying(dtype)}


def _read(meters: dict[str, Callable[[], float]]) -> dict[str, float]:
    return {name: meter() for name, meter in meters.items()}


def _environment() -> dict[str, str]:
    """Processor, versions and commit."""
    versions = {"jax": jax.__version__, "python": platform.python_version(), "processor": _processor()}
    return {**versions, "commit": commit()}


def commit() -> str:
    """That of the repository which this file is in; "unknown" outside of one."""
    here = Path(__file__).parent
    said = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def _processor() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else "cpu"


def _with_roofline(row: dict[str, Any], models: Models, best: dict[str, float]) -> dict[str, Any]:
    """Adds the share of the roofline that each part reaches, and the speedup with every part at its roofline."""
    if row["rule"] == "auto":
        return row
    k, batch, cells = row["draft_length"], row["batch"], row["context"]
    rates = Rates(best["target_bytes_per_s"], best["flops_per_s"])
    one = roofline.model_pass(models.target, batch, 1, cells).bound_s(rates)
    if not k:
        return row | {"roofline_step": one / row["round_s"]}
    if "target_s" not in row:
        return row
    scoring = roofline.model_pass(models.target, batch, k + 1, cells).bound_s(rates)
    row = row | {"roofline_target": scoring / row["target_s"]}
    shape = models.drafts[row["draft"]].shape
    if shape is None:
        return row
    rates = rates._replace(bytes_per_s=best[f"{DRAFT}{row['draft']}_bytes_per_s"])
    drafting = k * roofline.model_pass(shape, batch, 1, cells).bound_s(rates)
    ideal = row["tokens_per_round"] * one / (scoring + drafting)
    return row | {"roofline_draft": drafting / row["draft_s"], "ideal_speed_up": ideal}
