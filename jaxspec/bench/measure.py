"""Times the real loops against the autoregressive one, interleaved: prefill, a round and its parts, tokens per second."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxspec import mirror, rounds, speculate
from jaxspec import request as requests
from jaxspec.bench.cases import Case, Models
from jaxspec.common.stopwatch import Stopwatch, compilations
from jaxspec.state import Generation, State
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.contract import Requests
from jaxspec.synthesis.mirrored import mirrored
from jaxspec.types import Array, Draft, LanguageModel, Params, Proposal, Verify

PARTS = ("draft", "target", "verify_and_commit")
_PART_ROUNDS = 5  # of each part, in each repeat
_REPEATED = 4  # times a part or a step in one program, so that calling it weighs less

_T = TypeVar("_T")


def run(
    models: Models,
    cases: Sequence[Case],
    repeats: int,
    progress: Callable[[str], None] = print,
    before_repeat: Callable[[], None] = lambda: None,
    parts: bool = True,
) -> list[dict[str, Any]]:
    """Times every case once in each repeat, after one run of each that compiles.

    Args:
        models: to time.
        cases: with the autoregressive case of each batch and prompt length, which the others are compared with, and "auto" after
            the cases that it chooses from.
        repeats: how often each case is timed.
        progress: receives a line for each step.
        before_repeat: called before each repeat.
        parts: also time the parts of rounds.

    Returns:
        A row of figures for each case, see ``_row``.
    """
    timed: dict[Case, _Timed | _Autotuned] = {}
    compile_s: dict[Case, float] = {}
    for case in cases:
        watch = Stopwatch()
        with watch("run"):
            timed[case] = _autotuned(models, case, timed) if case.rule == "auto" else _Timed(models, case, parts)
            timed[case].repeat(0)
        timed[case].clear()
        compile_s[case] = watch.seconds["compile"]
        progress(f"{models.name}: {case} compiled in {compile_s[case]:.1f} s")
    before = compilations()
    for repeat in range(1, repeats + 1):
        before_repeat()
        for case in cases:
            timed[case].repeat(repeat)
        progress(f"{models.name}: repeat {repeat} of {repeats}")
    after = compilations() - before
    rows = {case: _row(case, timed[case]) | {"compile_s": compile_s[case], "compilations_after_warm_up": after} for case in cases}
    for case, row in rows.items():
        plain = rows[Case("autoregressive", 0, case.batch, case.prompt)]
        row["speed_up"] = row["codes_per_s"] / plain["codes_per_s"]
        row["round_over_step"] = row["round_s"] / plain["round_s"]
    return list(rows.values())


class _Method(NamedTuple):
    """What speculates: a draft with its parameters, and a rule."""

    draft: Draft
    params: Params
    verify: Verify


class _Timed:
    """The programs of one case, and what they took in each repeat."""

    def __init__(self, models: Models, case: Case, parts: bool = True):
        self.models, self.case, self.lm, self.parts = models, case, models.lm(case.draft), parts and not case.mirror
        self.method: _Method | None = None
        self.mirror: mirror.Mirror | None = None
        if case.rule != "autoregressive":
            drafter = models.drafts[case.draft].drafter
            rule = models.verifier(case.rule, case.threshold)
            self.method = _Method(drafter.make(case.draft_length), drafter.params, rule)
            if case.mirror:
                shape, options = models.drafts[case.draft].shape, mirror.parse(case.mirror)
                make, params = mirrored(options, models.target, shape, drafter.params)
                self.mirror, self.method = make(self.method.draft), self.method._replace(params=params)
        self._propose = jax.jit(_propose, static_argnums=0, donate_argnums=2)
        self._score = jax.jit(_score, static_argnums=0, donate_argnums=3)
        self._steps = jax.jit(_steps, static_argnums=0, donate_argnums=2)
        self._verify_and_commit = jax.jit(_verify_and_commit, donate_argnums=1)
        self.clear()

    def clear(self) -> None:
        """Discards the times."""
        self.seconds: dict[str, list[float]] = {name: [] for name in ("prefill", "loop", "step", *PARTS)}
        self.tokens: list[int] = []
        self.rounds: list[int] = []
        self.context: list[float] = []  # mean number of tokens that a row attends to
        self.counts = np.zeros(4, np.int64)  # accepted, drafted, rounds and exact matches of all rows
        self.positions = np.zeros(self.case.draft_length, np.int64)  # rounds that accepted each position
        self.followed = np.zeros(2, np.int64)  # of a mirror, rounds after another one, and those of them that began with a branch

    def repeat(self, number: int) -> None:
        """Runs the prefill, the whole loop, and the parts of a round."""
        self.loop(number)
        if self.method is not None and self.parts:
            self._time_parts(number, self.method)

    def loop(self, number: int) -> None:
        """Times the loop, and without any round, which leaves the prefill."""
        asked = self.models.requests(self.case, number)
        self._time("prefill", lambda: self._generate(number, asked._replace(limit=np.zeros_like(asked.limit))))
        generation = self._time("loop", lambda: self._generate(number, asked))
        info = generation.info
        self.tokens.append(int(generation.length.sum()))
        self.rounds.append(int(info.rounds.max()))
        self.context.append(float(np.mean(asked.prompt_length)) + float(generation.length.mean()) / 2)
        some = info.accepted, info.drafted, info.rounds, info.exact_matches
        self.counts += np.array([int(count.sum()) for count in some])
        self.positions += np.asarray(info.accepted_per_position.sum(0))

    def _generate(self, number: int, asked: Requests) -> Generation:
        target = jax.random.key(number), self.lm, self.models.target_params
        if self.method is None:
            return speculate.autoregressive(*target, **asked._asdict())
        if self.mirror is not None:
            models = target[0], self.mirror, self.models.target_params, self.method.params
            out = mirror.generate(*models, self.method.verify, **asked._asdict())
            self.followed += max(out.rounds - 1, 0), out.reused
            return out.generation
        return speculate.generate(*target, *self.method, **asked._asdict())

    def _time_parts(self, number: int, method: "_Method") -> None:
        """Times the parts of some rounds, and plain steps beside them, each several times in one program."""
        asked = self.models.requests(self.case, number)
        target_params, (draft, draft_params, verify) = self.models.target_params, method
        request = requests.check(jax.random.key(number), **asked._asdict())
        cells = asked.prompt.shape[1] + asked.max_new_tokens + draft.length + 1
        plain = self.models.lm()
        state = speculate.init(self.lm, target_params, draft, draft_params, request, cells)
        stepped = speculate.init(plain, target_params, None, (), request, cells)
        for _ in range(_PART_ROUNDS):
            stepped = self._time("step", lambda s=stepped: self._steps(plain, target_params, s))
            proposal, state = self._time("draft", lambda s=state: self._propose(draft, draft_params, s))
            probs, features, state = self._time("target", lambda s=state, p=proposal: self._score(self.lm, target_params, p, s))
            parts = proposal, probs, features
            state = self._time("verify_and_commit", lambda s=state, p=parts: self._verify_and_commit(verify, s, *p))

    def _time(self, name: str, call: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        repeated = _REPEATED if name in ("step", *PARTS) else 1
        self.seconds[name].append((time.perf_counter() - start) / repeated)
        return result


def _steps(target: LanguageModel, params: Params, state: State) -> State:
    """``_REPEATED`` plain steps, also where every row has finished, unlike ``speculate.advance``."""
    return jax.lax.fori_loop(0, _REPEATED, lambda _, state: rounds.plain_step(target, params, state), state)


def _propose(draft: Draft, params: Params, state: State) -> tuple[Proposal, State]:
    """Proposes ``_REPEATED`` times after the same token."""

    def again(_: Array, carry: tuple[Proposal, State]) -> tuple[Proposal, State]:
        return rounds.propose(draft, params, carry[1])

    return jax.lax.fori_loop(1, _REPEATED, again, rounds.propose(draft, params, state))


def _score(target: LanguageModel, params: Params, proposal: Proposal, state: State) -> tuple[Array, Array | None, State]:
    """Scores the same proposal ``_REPEATED`` times."""

    def again(_: Array, carry: tuple[Array, Array | None, State]) -> tuple[Array, Array | None, State]:
        return rounds.score(target, params, proposal, carry[2])

    return jax.lax.fori_loop(1, _REPEATED, again, rounds.score(target, params, proposal, state))


def _verify_and_commit(verify: Verify, state: State, *parts: Any) -> State:
    """Verifies the same proposal and commits what stands ``_REPEATED`` times, also where every row has finished."""
    return jax.lax.fori_loop(0, _REPEATED, lambda _, state: rounds.verify_and_commit(verify, state, *parts), state)


def _autotuned(models: Models, case: Case, timed: dict[Case, Any]) -> "_Autotuned":
    """The "auto" case that chooses among the timed cases of its batch and prompt length."""
    others = [other for other in timed if (other.batch, other.prompt) == (case.batch, case.prompt) and other.rule != "auto"]
    return _Autotuned(case.batch, {other: _Timed(models, other) for other in others})


class _Autotuned:
    """Runs the fastest so far of the other cases of a batch and prompt length; each is tried once before the first repeat."""

    def __init__(self, batch: int, candidates: dict[Case, _Timed]):
        self.batch, self.candidates = batch, candidates
        self.autotuner = Autotuner(tuple(candidates))
        self.clear()

    def clear(self) -> None:
        """Discards the times; what the autotuner recorded stays."""
        self.seconds: dict[str, list[float]] = {"prefill": [], "loop": []}
        self.tokens: list[int] = []
        self.rounds: list[int] = []
        self.context: list[float] = []
        self.counts = np.zeros(4, np.int64)
        self.chosen: list[str] = []

    def repeat(self, number: int) -> None:
        """Runs the fastest loop once; in repeat 0, every loop."""
        for candidate in self.candidates if number == 0 else [self.autotuner.choose(self.batch)]:
            timed = self.candidates[candidate]
            timed.clear()
            timed.loop(number)
            for name, some in self.seconds.items():
                some += timed.seconds[name]
            self.tokens += timed.tokens
            self.rounds += timed.rounds
            self.context += timed.context
            self.counts += timed.counts
            self.chosen.append(candidate.method)
            self.autotuner.record(self.batch, candidate, self.tokens[-1], self.seconds["loop"][-1] - self.seconds["prefill"][-1])


def _row(case: Case, timed: _Timed | _Autotuned) -> dict[str, Any]:
    """The figures of a case: medians over the repeats, in seconds; codes_per_s counts all rows, and excludes the prefill."""
    prefill, loop = np.array(timed.seconds["prefill"]), np.array(timed.seconds["loop"])
    decode = np.maximum(loop - prefill, 1e-9)
    rates = np.array(timed.tokens) / decode
    accepted, drafted, rounds, exact = (int(n) for n in timed.counts)
    row = {
        **case._asdict(),
        "context": statistics.mean(timed.context),
        "prefill_s": float(np.median(prefill)),
        "round_s": float(np.median(decode / np.array(timed.rounds))),
        "codes_per_s": float(np.median(rates)),
        "codes_per_s_spread": [float(rates.min()), float(rates.max())],
        "tokens_per_round": sum(timed.tokens) / max(rounds, 1),
        "quality_loss": (accepted - exact) / max(sum(timed.tokens), 1),
        "peak_bytes": _peak_bytes(),
    }
    if drafted:
        row["acceptance_rate"] = accepted / drafted
        row["exact_match_rate"] = exact / max(accepted, 1)
    if isinstance(timed, _Autotuned):
        return row | {"chosen": statistics.mode(timed.chosen)}
    if timed.method is None:
        return row
    if timed.mirror is not None:
        row["reused"] = float(timed.followed[1] / max(timed.followed[0], 1))
    row["accepted_per_position"] = (timed.positions / max(rounds, 1)).tolist()
    if not timed.parts:
        return row
    steps, drafting = (np.array(timed.seconds[name]) for name in ("step", "draft"))
    medians = {f"{name}_s": float(np.median(timed.seconds[name])) for name in PARTS}
    return row | medians | {"draft_over_step": float(np.median(drafting / steps))}


def _peak_bytes() -> int:
    """The most memory that the device held since the process began; on a CPU, the process."""
    stats = jax.devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    return stats["peak_bytes_in_use"] if stats else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
