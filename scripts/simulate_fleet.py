"""Simulates chips that speak for many users: time to first audio, and how many chips a rate of requests needs.

    python scripts/simulate_fleet.py --costs results/fleet/llasa-1b-v5e.json --durations results/fleet/durations.json

Discrete events, in numpy and heapq. Requests arrive as a Poisson process, each as long as a sentence drawn from --durations, and
go to the chip of a pod with the fewest of them. A chip has as many slots as the largest batch that was planned. Between two
rounds it takes up to two waiting requests into free slots, each for the time of a prefill; a step or a round takes what the plan
of the smallest batch that holds the used slots says. In a round each draft's position is accepted with the same probability,
independently. Three loops are compared: one code a step, rounds always, and rounds only at those loads where they give more
codes a second, chosen for each round.

Requests are divided at random among pods, so that those of one pod are a Poisson process too (splitting): one pod is simulated,
whatever the rate. Left out: the codec, the host, the network, and that a draft which sat out some steps must catch up.
"""

import argparse
import collections
import heapq
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ADMITTED = 2  # requests between two rounds, as `jaxspec serve` has it
WARM_UP = 0.2  # of the requests are not counted
PLAIN, ROUNDS, BY_LOAD = LOOPS = ("plain", "speculation", "by load")


class Costs(NamedTuple):
    """Seconds of a chip's programs, by batch.

    Attributes:
        batches: planned sizes, ascending; the last is the number of slots.
        step_s: of a plain step, for each size.
        round_s: of a round, for each size.
        prefill_s: of one request.
        draft_length: K.
    """

    batches: tuple[int, ...]
    step_s: tuple[float, ...]
    round_s: tuple[float, ...]
    prefill_s: float
    draft_length: int


class Speech(NamedTuple):
    """What is asked for.

    Attributes:
        seconds: durations that requests are drawn from.
        codes_per_s: of speech.
        acceptance: of each drafted position.
        first_codes: that the first chunk of sound needs.
    """

    seconds: np.ndarray
    codes_per_s: float
    acceptance: float
    first_codes: int


class Outcome(NamedTuple):
    """Seconds of each counted request, from its arrival.

    Attributes:
        first_s: to its first audio.
        whole_s: to its last code.
        rtf: from its first audio to its last code, over the speech that came meanwhile; above 1 a listener waits.
        rows: mean slots in use, in a round.
    """

    first_s: np.ndarray
    whole_s: np.ndarray
    rtf: np.ndarray
    rows: float

    def holds(self, first_p95_s: float) -> bool:
        """Whether 95 % hear something in time, and 95 % are never kept waiting afterwards."""
        return bool(np.percentile(self.first_s, 95) <= first_p95_s and np.percentile(self.rtf, 95) <= 1)


def read_costs(path: Path) -> Costs:
    """The costs in a file of ``fleet_inputs.py``; a program takes what the slowest of schedule, bandwidth and arithmetic says.

    Raises:
        ValueError: it is no such file.
    """
    try:
        plans = sorted(json.loads(path.read_text(encoding="utf-8"))["plans"], key=lambda plan: plan["batch"])
        step_s, round_s = (tuple(slowest(plan[name]) for plan in plans) for name in ("step", "round"))
        prefill_s = max(slowest(plans[0]["prefill"]), plans[0]["step"]["bandwidth_bound_s"])
        return Costs(tuple(plan["batch"] for plan in plans), step_s, round_s, prefill_s, plans[0]["draft_length"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"expected plans in {path}, got {error!r}: make them with scripts/fleet_inputs.py costs") from error


def slowest(program: dict[str, Any]) -> float:
    """The longest of the times that a plan gives for a program; a chip whose clock is not published has no scheduled one."""
    return max(program.get(name) or 0.0 for name in ("cycles_s", "bandwidth_bound_s", "compute_bound_s"))


def read_durations(path: Path) -> np.ndarray:
    """The durations in a file of ``fleet_inputs.py``.

    Raises:
        ValueError: it is no such file, or one of them is not above 0.
    """
    try:
        seconds = np.array(json.loads(path.read_text(encoding="utf-8"))["seconds"], float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected durations in {path}, got {error!r}: make them with scripts/fleet_inputs.py durations"
        ) from error
    if not seconds.size or not (seconds > 0).all():
        raise ValueError(f"expected durations above 0 in {path}, got {seconds.size} with {seconds.min(initial=0)}: make it anew")
    return seconds


def mean_codes(speech: Speech, draft_length: int) -> float:
    """The mean codes of a round."""
    return float(codes_per_round(speech.acceptance, draft_length) @ np.arange(1, draft_length + 2))


def codes_per_round(acceptance: float, draft_length: int) -> np.ndarray:
    """The probabilities of 1 .. K + 1 codes in a round.

    >>> codes_per_round(0.5, 2)
    array([0.5 , 0.25, 0.25])
    """
    reached = acceptance ** np.arange(draft_length + 1)
    return reached - np.append(reached[1:], 0)


def loop_at_load(costs: Costs, speech: Speech, loop: str) -> list[bool]:
    """Whether a loop uses rounds, for each planned batch."""
    mean = mean_codes(speech, costs.draft_length)
    faster = [one / mean < step for one, step in zip(costs.round_s, costs.step_s, strict=True)]
    return {PLAIN: [False] * len(faster), ROUNDS: [True] * len(faster), BY_LOAD: faster}[loop]


class Chip:
    """The slots of one chip and its queue; ``turn`` is called at the end of each round.

    Args:
        costs: of its programs.
        speech: what is asked of it.
        loop: one of ``LOOPS``.
        rng: for the codes of rounds.
    """

    def __init__(self, costs: Costs, speech: Speech, loop: str, rng: np.random.Generator):
        self.waiting: collections.deque[int] = collections.deque()
        self.idle, self.row_rounds, self.rounds = True, 0, 0
        self._costs, self._rounds = costs, loop_at_load(costs, speech, loop)
        self._law = np.cumsum(codes_per_round(speech.acceptance, costs.draft_length))[:-1]
        self._first, self._rng = speech.first_codes, rng
        self._request, self._made, self._wanted = (np.zeros(0, int) for _ in range(3))

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.waiting) + len(self._request)

    def turn(self, now: float, codes: np.ndarray, first_at: np.ndarray, last_at: np.ndarray) -> float | None:
        """Takes requests in and begins a round.

        Args:
            now: the time.
            codes: of each request of the run.
            first_at: where the times of first audio are written.
            last_at: where the times of the last code are written.

        Returns:
            When the round ends; None where there is nothing to do.
        """
        kept = self._made < self._wanted
        taken = [self.waiting.popleft() for _ in range(min(len(self.waiting), ADMITTED, self._costs.batches[-1] - kept.sum()))]
        self._request = np.concatenate([self._request[kept], taken]).astype(int)
        self._made = np.concatenate([self._made[kept], np.zeros(len(taken), int)])
        self._wanted = np.concatenate([self._wanted[kept], codes[taken]])
        self.idle = not len(self._request)
        if self.idle:
            return None
        rows = len(self._request)
        size = next(i for i, batch in enumerate(self._costs.batches) if batch >= rows)
        new, took = np.ones(rows, int), self._costs.step_s[size]
        if self._rounds[size]:
            new, took = 1 + np.searchsorted(self._law, self._rng.random(rows), side="right"), self._costs.round_s[size]
        end, before = now + len(taken) * self._costs.prefill_s + took, self._made
        self._made = before + new
        first = np.minimum(self._first, self._wanted)
        first_at[self._request[(before < first) & (self._made >= first)]] = end
        last_at[self._request[self._made >= self._wanted]] = end
        self.row_rounds, self.rounds = self.row_rounds + rows, self.rounds + 1
        return end


def simulate(costs: Costs, speech: Speech, loop: str, chips: int, rate: float, requests: int, seed: int) -> Outcome:
    """One pod.

    Args:
        costs: of its chips.
        speech: what is asked for.
        loop: one of ``LOOPS``.
        chips: of the pod.
        rate: requests a second.
        requests: to simulate, of which the first ``WARM_UP`` are not counted.
        seed: of arrivals, durations and rounds; the same requests come with every loop, sooner or later as the rate has it.
    """
    arrivals_rng, rounds_rng = np.random.default_rng(seed).spawn(2)
    arrive_at = np.cumsum(arrivals_rng.exponential(1.0, requests)) / rate
    codes = np.maximum(np.round(arrivals_rng.choice(speech.seconds, requests) * speech.codes_per_s), 1).astype(int)
    first_at, last_at = np.zeros(requests), np.zeros(requests)
    pod = [Chip(costs, speech, loop, rounds_rng) for _ in range(chips)]
    turns: list[tuple[float, int]] = []  # the ends of rounds

    def run_until(time: float) -> None:
        while turns and turns[0][0] <= time:
            now, index = heapq.heappop(turns)
            if (end := pod[index].turn(now, codes, first_at, last_at)) is not None:
                heapq.heappush(turns, (end, index))

    for request, now in enumerate(arrive_at):
        run_until(now)
        index = min(range(chips), key=lambda i: pod[i].load)
        pod[index].waiting.append(request)
        if pod[index].idle:
            pod[index].idle = False
            heapq.heappush(turns, (now, index))
    run_until(math.inf)
    counted = slice(int(WARM_UP * requests), None)
    later_s = np.maximum(codes - speech.first_codes, 1) / speech.codes_per_s
    figures = (first_at - arrive_at, last_at - arrive_at, (last_at - first_at) / later_s)
    rows = sum(chip.row_rounds for chip in pod) / sum(chip.rounds for chip in pod)
    return Outcome(*(figure[counted] for figure in figures), rows)


class Wanted(NamedTuple):
    """How good the service must be, and how it is simulated.

    Attributes:
        first_p95_s: the longest time to first audio of 95 % of the requests.
        pod: chips of a pod.
        requests: of each simulation.
        seed: of it.
    """

    first_p95_s: float
    pod: int
    requests: int
    seed: int


def capacity(costs: Costs, speech: Speech, loop: str, wanted: Wanted, steps: int = 10) -> float:
    """The most requests a second that a pod serves as wanted, by bisection; 0 where it serves none."""
    mean = mean_codes(speech, costs.draft_length)
    codes = float(speech.seconds.mean()) * speech.codes_per_s
    fastest = max(b * max(1 / s, mean / r) for b, s, r in zip(costs.batches, costs.step_s, costs.round_s, strict=True))
    low, high = 0.0, wanted.pod * fastest / codes
    for _ in range(steps):
        middle = (low + high) / 2
        good = simulate(costs, speech, loop, wanted.pod, middle, wanted.requests, wanted.seed).holds(wanted.first_p95_s)
        low, high = (middle, high) if good else (low, middle)
    return low


def fleet(costs: Costs, speech: Speech, loop: str, wanted: Wanted, pod_rate: float, rate: float) -> dict[str, Any]:
    """The chips that a rate needs, whole pods or a part of one, and what its requests see.

    Args:
        costs: of the chips.
        speech: what is asked for.
        loop: one of ``LOOPS``.
        wanted: how good it must be.
        pod_rate: what ``capacity`` says.
        rate: requests a second.

    Raises:
        ValueError: no number of chips is good enough.
    """
    if pod_rate == 0:
        raise ValueError(
            f"expected a chip that gives 95 % of its requests their first audio within {wanted.first_p95_s} s and keeps up with "
            f"speech, got none with the loop {loop!r}: allow more time, or plan smaller batches"
        )
    pods = math.ceil(rate / pod_rate)
    parts = range(1, wanted.pod) if pods == 1 else ()
    for chips in itertools.chain(parts, itertools.count(pods * wanted.pod, wanted.pod)):
        simulated = min(chips, wanted.pod)
        outcome = simulate(costs, speech, loop, simulated, rate * simulated / chips, wanted.requests, wanted.seed)
        if outcome.holds(wanted.first_p95_s):
            break
    seen = {
        f"{name}_p{q}": float(np.percentile(values, q))
        for name, values in zip(("first_s", "whole_s", "rtf"), outcome[:3], strict=True)
        for q in (50, 95)
    }
    return {
        "rate": rate,
        "loop": loop,
        "chips": chips,
        "rate_per_chip": rate / chips,
        "rows": outcome.rows,
    } | seen


def arithmetic(costs: Costs, speech: Speech) -> str:
    """A table of a chip's codes a second by batch, without queues: rows over the time of a step, times the codes of a round."""
    lines = [
        "| slots in use | step, ms | round, ms | codes a second, plain | with rounds | rounds are |",
        "|---|---|---|---|---|---|",
    ]
    mean = mean_codes(speech, costs.draft_length)
    for batch, step, drafted in zip(costs.batches, costs.step_s, costs.round_s, strict=True):
        plain, faster = batch / step, batch * mean / drafted
        verdict = f"{max(faster / plain, plain / faster):.2f}x {'faster' if faster > plain else 'slower'}"
        lines.append(f"| {batch} | {step * 1e3:.2f} | {drafted * 1e3:.2f} | {plain:,.0f} | {faster:,.0f} | {verdict} |")
    codes = speech.seconds.mean() * speech.codes_per_s
    about = f"{mean:.2f} codes a round; {codes:.0f} codes and a prefill of {costs.prefill_s * 1e3:.2f} ms a request"
    return "\n".join([*lines, "", about])


COLUMNS = {
    "requests a second": "{rate:,g}",
    "loop": "{loop}",
    "chips": "{chips:,}",
    "requests a second and chip": "{rate_per_chip:.1f}",
    "slots in use": "{rows:.0f}",
    "first audio, p50 / p95, ms": "{first_ms_p50:.0f} / {first_ms_p95:.0f}",
    "whole sentence, p50 / p95, s": "{whole_s_p50:.2f} / {whole_s_p95:.2f}",
    "rtf, p95": "{rtf_p95:.2f}",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``fleet`` as a table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shown = row | {f"first_ms_p{q}": 1e3 * row[f"first_s_p{q}"] for q in (50, 95)}
        lines.append(f"| {' | '.join(cell.format(**shown) for cell in COLUMNS.values())} |")
    return "\n".join(lines)


def check(asked: argparse.Namespace) -> None:
    """Refuses numbers out of their range.

    Raises:
        ValueError: one is.
    """
    for name in ("codes_per_s", "first_codes", "first_p95_s", "pod", "requests"):
        if not getattr(asked, name) > 0:
            raise ValueError(f"expected --{name.replace('_', '-')} above 0, got {getattr(asked, name)}")
    if min(asked.rates) <= 0:
        raise ValueError(f"expected --rates above 0, got {min(asked.rates)}: they are requests a second")
    if not 0 <= asked.acceptance <= 1:
        raise ValueError(f"expected --acceptance from 0 to 1, got {asked.acceptance}: it is a probability")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, required=True, help="of scripts/fleet_inputs.py costs")
    parser.add_argument("--durations", type=Path, required=True, help="of scripts/fleet_inputs.py durations")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 1_000, 100_000], help="requests a second")
    parser.add_argument("--acceptance", type=float, default=0.61, help="of each drafted position")
    parser.add_argument("--codes-per-s", type=float, default=50, help="of speech; LLaSA has 50")
    parser.add_argument("--first-codes", type=int, default=10, help="of the first chunk of sound")
    parser.add_argument("--first-p95-s", type=float, default=0.5, help="the longest time to first audio of 95 %% of the requests")
    parser.add_argument("--pod", type=int, default=8, help="chips that share arriving requests")
    parser.add_argument("--requests", type=int, default=4000, help="of each simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Simulates each loop at each rate, and prints the table."""
    asked = arguments(given)
    try:
        check(asked)
        costs, seconds = read_costs(asked.costs), read_durations(asked.durations)
        speech = Speech(seconds, asked.codes_per_s, asked.acceptance, asked.first_codes)
        wanted = Wanted(asked.first_p95_s, asked.pod, asked.requests, asked.seed)
        capacities = {loop: capacity(costs, speech, loop, wanted) for loop in LOOPS}
        rows = [fleet(costs, speech, loop, wanted, capacities[loop], rate) for rate in asked.rates for loop in LOOPS]
    except ValueError as error:
        print(f"simulate_fleet: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{arithmetic(costs, speech)}\n\n{table(rows)}")
    if asked.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
        asked.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
