"""Times the real loops against our own autoregressive one: prefill, a round and its parts, codes a second; cases take turns."""

import dataclasses
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import request as requests
from jaxspec import rounds, speculate, verify
from jaxspec.common.stopwatch import Stopwatch, compilations
from jaxspec.draft import model_draft
from jaxspec.groups import Groups
from jaxspec.models import transformer
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.state import Generation, State
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.contract import Requests
from jaxspec.types import Array, Draft, LanguageModel, Params, Verdict, Verify

RULES = ("exact", "tolerance", "coarse-grained")
_PART_ROUNDS = 5  # of each part, in each turn
_ACCEPT_STREAM = 77


class Case(NamedTuple):
    """One row of the table: one of ``RULES``; or, with a draft length of 0, "autoregressive" or "auto", the quickest of all."""

    rule: str
    draft_length: int
    batch: int
    prompt: int


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """A pair of models to be timed.

    ask(case, turn): the prompts of a turn; real models get other texts in each.
    acceptance: of each position, drawn in place of the rule's own verdict, whose work is done all the same; None: the real one.
    """

    name: str
    target: Config
    draft: Config
    target_params: Params
    draft_params: Params
    groups: Groups
    ask: Callable[[Case, int], Requests]
    beta: float = 0.2
    acceptance: float | None = None

    def lm(self) -> LanguageModel:
        """The target's functions."""
        return transformer.language_model(self.target)

    def drafter(self, draft_length: int) -> Draft:
        """The draft's."""
        return model_draft(transformer.language_model(self.draft), draft_length)

    def rule(self, name: str) -> Verify:
        """A verifier, with the synthetic acceptance on it where one is asked for."""
        made = {
            "exact": verify.exact,
            "tolerance": functools.partial(verify.tolerance, self.beta),
            "coarse-grained": functools.partial(verify.coarse_grained, self.groups),
        }[name]()
        return made if self.acceptance is None else jax.tree_util.Partial(_synthetic, jnp.float32(self.acceptance), made)


def _synthetic(
    acceptance: Array, rule: Verify, key: Array, draft_tokens: Array, draft_probs: Array, target_probs: Array
) -> Verdict:
    """A rule's work, and in place of its verdict one in which each position stands with a given probability."""
    verdict = rule(key, draft_tokens, draft_probs, target_probs)
    stands = jax.random.uniform(jax.random.fold_in(key, _ACCEPT_STREAM), draft_tokens.shape) < acceptance
    return verdict._replace(num_accepted=jnp.cumprod(stands.astype(jnp.int32)).sum(), num_exact=None)


def run(
    models: Models,
    cases: Sequence[Case],
    turns: int,
    say: Callable[[str], None] = print,
    before_turn: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Times every case, all of them once in each turn, after each has run once; see ``_row`` for what is told.

    ``cases`` must hold the autoregressive case of each batch and prompt length, which the others are compared with, and "auto"
    after those that it chooses from.
    """
    timed, compile_s = {}, {}
    for case in cases:
        watch = Stopwatch()
        with watch("run"):
            candidates = [candidate for candidate in timed if candidate[2:] == case[2:]]
            timed[case] = _Auto(models, case, candidates) if case.rule == "auto" else _Timed(models, case)
            timed[case].turn(0)
        timed[case].clear()
        compile_s[case] = watch.seconds["compile"]
        say(f"{models.name}: {_name(case)} compiled in {compile_s[case]:.1f} s")
    before = compilations()
    for turn in range(1, turns + 1):
        before_turn()
        for case in cases:
            timed[case].turn(turn)
        say(f"{models.name}: turn {turn} of {turns}")
    after = compilations() - before
    rows = {case: _row(case, timed[case]) | {"compile_s": compile_s[case], "compilations_after_warm_up": after} for case in cases}
    for case, row in rows.items():
        plain = rows[Case("autoregressive", 0, case.batch, case.prompt)]
        row["speed_up"] = row["codes_per_s"] / plain["codes_per_s"]
    return list(rows.values())


def _name(case: Case) -> str:
    return f"{_way(case)} batch={case.batch} prompt={case.prompt}"


def _way(case: Case) -> str:
    return f"{case.rule} K={case.draft_length}" if case.draft_length else case.rule


class _Timed:
    """The programs of one case, and what they took in each turn."""

    def __init__(self, models: Models, case: Case):
        self.models, self.case = models, case
        self.lm, self.draft = models.lm(), models.drafter(case.draft_length)
        self.rule = None if case.rule == "autoregressive" else models.rule(case.rule)
        self._init = jax.jit(speculate.init, static_argnums=(0, 2, 5))
        self._parts = {
            "draft": jax.jit(functools.partial(_propose, self.draft), donate_argnums=1),
            "target": jax.jit(functools.partial(_score, self.lm), donate_argnums=1),
            "settle": jax.jit(_settle, donate_argnums=1),
        }
        self.clear()

    def clear(self) -> None:
        """Forgets the times."""
        self.seconds: dict[str, list[float]] = {name: [] for name in ("prefill", "loop", "draft", "target", "settle")}
        self.tokens: list[int] = []
        self.rounds: list[int] = []
        self.counts = np.zeros(3, np.int64)  # accepted, drafted, rounds of all rows

    def turn(self, number: int) -> None:
        """Runs prefill, the whole loop and the parts of a round once."""
        state = self.loop(number)
        if self.rule is not None:
            self._time_parts(state)

    def loop(self, number: int) -> State:
        """Runs prefill and the whole loop once; returns the state between them."""
        asked = self.models.ask(self.case, number)
        key = jax.random.key(number)
        fields = asked._asdict()
        prompt, length = fields.pop("prompt"), fields.pop("prompt_length")
        request = requests.check(
            key, prompt, length, *(fields[name] for name in ("max_new_tokens", "limit", "stop_ids", "sampling"))
        )
        models = (self.lm, self.models.target_params, self.draft, self.models.draft_params)
        cells = prompt.shape[1] + asked.max_new_tokens + self.draft.length + 1
        state = self._clock("prefill", lambda: self._init(*models, request, cells))
        if self.rule is None:
            loop = functools.partial(speculate.autoregressive, key, self.lm, self.models.target_params, prompt, length, **fields)
        else:
            loop = functools.partial(speculate.generate, key, *models, self.rule, prompt, length, **fields)
        self._count(self._clock("loop", loop))
        return state

    def _time_parts(self, state: State) -> None:
        target_params, draft_params = self.models.target_params, self.models.draft_params
        for _ in range(_PART_ROUNDS):
            proposal, state = self._clock("draft", lambda s=state: self._parts["draft"](draft_params, s))
            probs, features, state = self._clock("target", lambda p=proposal, s=state: self._parts["target"](target_params, s, p))
            parts = proposal, probs, features
            state = self._clock("settle", lambda p=parts, s=state: self._parts["settle"](self.rule, s, *p))

    def _clock(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def _count(self, generation: Generation) -> None:
        info = generation.info
        self.tokens.append(int(generation.length.sum()))
        self.rounds.append(int(info.rounds.max()))
        self.counts += np.array([int(info.accepted.sum()), int(info.drafted.sum()), int(info.rounds.sum())])


class _Auto:
    """The quickest so far of the other cases of a batch and prompt length, each of which it tries before the first turn."""

    def __init__(self, models: Models, case: Case, candidates: Sequence[Case]):
        self.batch, self.candidates = case.batch, {candidate: _Timed(models, candidate) for candidate in candidates}
        self.autotuner = Autotuner(candidates)
        self.clear()

    def clear(self) -> None:
        """Forgets the times, but not which way is the quickest."""
        self.seconds, self.tokens, self.rounds, self.counts = {"prefill": [], "loop": []}, [], [], np.zeros(3, np.int64)
        self.taken: list[str] = []

    def turn(self, number: int) -> None:
        """Runs the quickest loop once."""
        for candidate in self.candidates if number == 0 else [self.autotuner.choose(self.batch)]:
            timed = self.candidates[candidate]
            timed.clear()
            timed.loop(number)
            for name, some in self.seconds.items():
                some += timed.seconds[name]
            self.tokens += timed.tokens
            self.rounds += timed.rounds
            self.counts += timed.counts
            self.taken.append(_way(candidate))
            self.autotuner.record(self.batch, candidate, self.tokens[-1], self.seconds["loop"][-1] - self.seconds["prefill"][-1])


def _peak_bytes() -> int:
    """The most that the device held since the process began; of a CPU, the process."""
    stats = jax.devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    return stats["peak_bytes_in_use"] if stats else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _propose(draft: Draft, params: Params, state: State) -> Any:
    return rounds.propose(draft, params, state)


def _score(lm: LanguageModel, params: Params, state: State, proposal: Any) -> Any:
    return rounds.score(lm, params, proposal, state)


def _settle(rule: Verify, state: State, proposal: Any, target_probs: Array, features: Array | None) -> State:
    return rounds.verify_and_commit(rule, state, proposal, target_probs, features)


def _row(case: Case, timed: _Timed | _Auto) -> dict[str, Any]:
    """A case's figures: seconds are medians of the turns; codes_per_s counts all rows, and the prefill apart."""
    prefill, loop = np.array(timed.seconds["prefill"]), np.array(timed.seconds["loop"])
    decode = np.maximum(loop - prefill, 1e-9)
    rates = np.array(timed.tokens) / decode
    accepted, drafted, rounds = (int(n) for n in timed.counts)
    row = {
        **case._asdict(),
        "prefill_s": float(np.median(prefill)),
        "round_s": float(np.median(decode / np.array(timed.rounds))),
        "codes_per_s": float(np.median(rates)),
        "codes_per_s_spread": [float(rates.min()), float(rates.max())],
        "tokens_per_round": sum(timed.tokens) / max(rounds, 1),
        "peak_bytes": _peak_bytes(),
    }
    if isinstance(timed, _Auto):
        return row | {"taken": statistics.mode(timed.taken)}
    if timed.rule is None:
        return row
    parts = {f"{name}_s": float(np.median(timed.seconds[name])) for name in ("draft", "target", "settle")}
    return row | parts | {"acceptance_rate": accepted / max(drafted, 1)}


def random_asks(target: Config, stops: int, new_tokens: int, sampling: Sampling) -> Callable[[Case, int], Requests]:
    """Prompts of random codes, each row emitting ``new_tokens``; no id stops it."""

    def ask(case: Case, turn: int) -> Requests:
        ids = np.random.default_rng(turn).integers(0, target.vocab - stops, (case.batch, case.prompt)).astype(np.int32)
        length, limit = np.full(case.batch, case.prompt, np.int32), np.full(case.batch, new_tokens, np.int32)
        return Requests(ids, length, new_tokens, limit, (), sampling)

    return ask
