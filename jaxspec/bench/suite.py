"""The benchmark from end to end: what is asked for -> models -> times -> the roofline beside them -> one result."""

import dataclasses
import functools
import itertools
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.bench import presets, roofline
from jaxspec.bench.measure import RULES, Case, Models, random_asks, run
from jaxspec.bench.peers import time_transformers
from jaxspec.bench.roofline import Device
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.models import builtin as voices
from jaxspec.models import transformer
from jaxspec.models.card import Model
from jaxspec.sampling import Sampling
from jaxspec.synthesis import builtin, converted
from jaxspec.synthesis.contract import Requests, Settings, Synthesizer
from jaxspec.text.held_out import held_out

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to benchmark.

    preset: a name of ``presets.PAIRS``, "builtin", or a folder that ``jaxspec convert`` made, with ``draft`` another.
    synthetic_acceptance: of each position, for the presets without real weights, which need it.
    new_tokens: how many each row emits (of real models: at most, as their texts end).
    auto: whether the quickest loop of each batch and prompt length, found by trying, is a row of its own.
    peer: whether transformers is timed too, on the first dtype, prompt length and draft length.

    Raises:
        ValueError: a value out of its range, or synthetic acceptance together with real weights.
    """

    preset: str = "builtin"
    draft: Path | None = None
    rules: tuple[str, ...] = ("exact", "coarse-grained")
    draft_lengths: tuple[int, ...] = (3,)
    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] = (64,)
    dtypes: tuple[str, ...] = ("float32",)
    synthetic_acceptance: float | None = None
    new_tokens: int = 64
    turns: int = 5
    auto: bool = False
    peer: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.rules) - set(RULES):
            raise ValueError(f"expected verifiers among {', '.join(RULES)}, got {unknown.pop()!r}")
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"expected dtypes among {', '.join(DTYPES)}, got {unknown.pop()!r}")
        counts = (*self.draft_lengths, *self.batches, *self.prompts, self.new_tokens, self.turns)
        if min(counts) < 1:
            raise ValueError(f"expected draft lengths, batches, prompts, new tokens and turns of 1 or more, got {min(counts)}")
        if self.real() and self.synthetic_acceptance is not None:
            raise ValueError(f"expected no synthetic acceptance for {self.preset}, whose weights are real: leave it out")
        if not self.real() and self.synthetic_acceptance is None:
            raise ValueError(
                f"expected --synthetic-acceptance for {self.preset}, whose weights are random: give a number of 0 to 1"
            )
        if self.peer and self.real():
            raise ValueError(f"expected a preset of random weights for --peer, got {self.preset}: use small")
        if self.synthetic_acceptance is not None and not 0 <= self.synthetic_acceptance <= 1:
            raise ValueError(f"expected a synthetic acceptance of 0 to 1, got {self.synthetic_acceptance}")

    def real(self) -> bool:
        """Whether the weights are real: the built-in voice's, or a folder's."""
        return self.preset == "builtin" or Path(self.preset).is_dir()

    def cases(self) -> list[Case]:
        """Every row of one dtype, the autoregressive ones included."""
        shapes = list(itertools.product(self.batches, self.prompts))
        plain = [Case("autoregressive", 0, *shape) for shape in shapes]
        drafted = [Case(rule, k, *shape) for shape in shapes for rule in self.rules for k in self.draft_lengths]
        return plain + drafted + [Case("auto", 0, *shape) for shape in shapes if self.auto]


def bench(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a plan; ``say`` is told of the progress.

    Returns:
        {"rows": a dict for each case, "device": rates, versions and commit, "acceptance": "real" or "synthetic"}.

    Raises:
        ValueError: an unknown preset, or a batch that cannot fit in the device's memory.
    """
    rows, rates, peers = [], {}, []
    for dtype in plan.dtypes:
        models = _models(plan, dtype)
        measure = roofline.meter(dtype)
        seen = [measure()]
        if plan.peer and not peers:
            shape = plan.prompts[0], plan.draft_lengths[0], plan.turns
            peers = [row for batch in plan.batches for row in time_transformers(models, batch, *shape, say)]
        made = run(models, plan.cases(), plan.turns, say, lambda measure=measure, seen=seen: seen.append(measure()))
        rates[dtype] = roofline.middle(seen)
        say(f"{dtype}: reads {rates[dtype].bytes_per_s / 1e9:.1f} GB/s, multiplies {rates[dtype].flops_per_s / 1e12:.3f} Tflop/s")
        rows += [_beside_roofline(row, models, rates[dtype], plan) | {"dtype": dtype} for row in made]
    device = {dtype: rate._asdict() for dtype, rate in rates.items()}
    return {
        "preset": plan.preset,
        "acceptance": "real" if plan.real() else "synthetic",
        "rows": rows,
        "peers": peers,
        "device": device,
        **_where(),
    }


def _where() -> dict[str, str]:
    """Device, versions and commit."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    versions = {"jax": jax.__version__, "python": platform.python_version(), "processor": _processor()}
    return {**versions, "commit": commit.stdout.strip() or "unknown"}


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


def _models(plan: Plan, dtype: str) -> Models:
    if plan.preset == "builtin":
        return _real(builtin.builtin(), voices.load().target, voices.load().draft, plan)
    if plan.real():
        target = pretrained.load(plan.preset, dtype)
        if plan.draft is None:
            raise ValueError(f"expected --draft with {plan.preset}, got none: cut one with jaxspec convert --layers")
        draft, shape = pretrained.load_draft(plan.draft, target), descriptions.read_as(plan.draft, Model).shape
        return _real(converted.synthesizer(target, (draft.drafter, draft.params)), target.model.shape, shape, plan)
    pair = presets.pair(plan.preset, dtype)
    _check_fits(plan, pair)
    keys = jax.random.split(jax.random.key(0), 2)
    params = [presets.random_params(key, shape) for key, shape in zip(keys, pair[:2], strict=True)]
    groups = presets.neighbours(pair.target.vocab, pair.target.vocab - pair.stops)
    ask = random_asks(pair.target, pair.stops, plan.new_tokens, Sampling(temperature=0.8, top_p=0.95))
    return Models(plan.preset, *pair[:2], *params, groups, ask, acceptance=plan.synthetic_acceptance)


def _real(synthesizer: Synthesizer, target: transformer.Config, draft: transformer.Config, plan: Plan) -> Models:
    """Models that speak the held-out sentences, other ones in each turn; prompts are as long as the texts make them."""
    texts = held_out()

    def ask(case: Case, turn: int) -> Requests:
        some = [synthesizer.pieces(texts[(turn * case.batch + i) % len(texts)])[0] for i in range(case.batch)]
        requests = synthesizer.requests(some, Settings(max_codes=plan.new_tokens))
        capacity = max(requests.max_new_tokens, plan.new_tokens)
        return requests._replace(max_new_tokens=capacity, limit=np.minimum(requests.limit, plan.new_tokens))

    groups = synthesizer.groups(synthesizer.threshold, "target")
    return Models(plan.preset, target, draft, synthesizer.target_params, synthesizer.draft_params, groups, ask)


def _check_fits(plan: Plan, pair: presets.Pair) -> None:
    """Raises ValueError where weights, caches and laws of the largest batch pass the device's memory."""
    batch, draft_length = max(plan.batches), max(plan.draft_lengths)
    cells = max(plan.prompts) + plan.new_tokens + draft_length + 1
    weights = sum(map(presets.parameter_bytes, pair[:2]))
    caches = sum(presets.cache_bytes(config, batch, cells) for config in pair[:2])
    laws = 4 * 4 * batch * (2 * draft_length + 1) * pair.target.vocab
    limit = memory_bytes()
    if limit and weights + caches + laws > limit:
        parts = ", ".join(
            f"{name} {value / 1e9:.1f} GB" for name, value in (("weights", weights), ("caches", caches), ("laws", laws))
        )
        raise ValueError(
            f"expected a batch that fits in {limit / 1e9:.1f} GB, but {plan.preset} with batch {batch} and {cells} cells "
            f"takes {parts}: lower --batches, --prompts or --new-tokens"
        )


@functools.cache
def memory_bytes() -> int | None:
    """What the device may hold; None where nobody tells."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _beside_roofline(row: dict[str, Any], models: Models, device: Device, plan: Plan) -> dict[str, Any]:
    """Adds the share of the bound that each part reaches, and what a round would give with every part at its bound."""
    if row["rule"] == "auto":
        return row
    k, batch = row["draft_length"], row["batch"]
    cells = row["prompt"] + plan.new_tokens // 2
    one = roofline.model_pass(models.target, batch, 1, cells).bound_s(device)
    if not k:
        return row | {"roofline_step": one / row["round_s"]}
    scoring = roofline.model_pass(models.target, batch, k + 1, cells).bound_s(device)
    drafting = k * roofline.model_pass(models.draft, batch, 1, cells).bound_s(device)
    bound = {"roofline_target": scoring / row["target_s"], "roofline_draft": drafting / row["draft_s"]}
    return row | bound | {"ideal_speed_up": row["tokens_per_round"] * one / (scoring + drafting)}
