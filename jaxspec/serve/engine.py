"""Many requests in one running loop: slots, admission, rounds, codec decoding beside them, and an orderly end.

    submit -> queue -> [slot: rounds of tokens]  -> windows of codes -> [codec] -> the job's listener
                        thread of the loop                              thread of the codec

The loop is one call ahead of what the host reads, so that the device does not wait for it. A job gets the tokens it would get
alone, up to the rounding of the logits, which the size of a batch can change; one that asks for "auto" gets the rule that was
faster at the load of its moment. An error in one job ends that job; a failure of the device ends all that are in the same slots.
While a call of the device hangs, new jobs are refused and those that were taken on end at their deadlines.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxspec.common.stopwatch import Stopwatch, compilations
from jaxspec.serve import warm_up
from jaxspec.serve.job import Done, Event, Failed, Job, Listener, Refused, Sound
from jaxspec.serve.lane import Lane, News
from jaxspec.synthesis.autotune import Autotuner
from jaxspec.synthesis.contract import Requests, Settings, Synthesizer
from jaxspec.synthesis.decoding import NOT_FINITE, PLAIN, resolve
from jaxspec.synthesis.pipeline import count
from jaxspec.synthesis.windows import FIRST_CODES, Window

AUTO = "auto"
_WATCH_S = 0.5  # between two looks of the watchdog, at most
_ADMITTED = 2  # between two calls of the loop, so that those who listen do not wait for all who came at once
log = logging.getLogger("jaxspec.serve")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    slots: rows of each rule that are decoded together.
    rounds: of each call of the loop, as many as hide the work of the host.
    max_queue: requests that wait; beyond it they are refused.
    max_text: characters of a text.
    max_prompt: tokens of a prompt; None: as many as the longest piece of a text has.
    max_codes: tokens of a piece; None: the model's own limit.
    first_codes: of the first chunk.
    request_s: seconds after which a request is given up.
    stall_s: seconds after which a call of the device counts as hung.
    """

    slots: int = 16
    rounds: int = 2
    max_queue: int = 64
    max_text: int = 4096
    max_prompt: int | None = None
    max_codes: int | None = None
    first_codes: int = FIRST_CODES
    request_s: float = 300.0
    stall_s: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"expected {field.name} above 0, got {value}: leave it out for the default")


class Engine:
    """Serves requests for speech from a synthesizer; ``start`` it, and ``close`` it.

    Args:
        synthesizer: with a codec.
        rules: verifiers that requests may name, the default one first.
        limits: what it takes on.

    Raises:
        ValueError: there is no codec, or a rule needs a draft that is not there.
    """

    def __init__(self, synthesizer: Synthesizer, rules: Sequence[str], limits: Limits):
        if synthesizer.decode_windows is None:
            raise ValueError("expected a codec to serve speech, got none: give --codec")
        self.synthesizer, self.rules, self.limits = synthesizer, tuple(rules), limits
        self._decode = synthesizer.decode_windows
        self._shapes = warm_up.shapes(synthesizer, limits.slots, limits.max_prompt, limits.max_codes)
        self._lanes = {
            rule: Lane(synthesizer, resolve(synthesizer, Settings(verify=rule)), self._shapes, limits.first_codes)
            for rule in self.rules
        }
        self._autotuner = Autotuner(self.rules[:1] + ((PLAIN,) if PLAIN in self.rules[1:] else ()))
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._live: set[Job] = set()
        self._codec: queue.Queue[tuple[Job, Window | None] | None] = queue.Queue(4 * limits.slots)
        self._calls: dict[str, float] = {}  # device calls that are under way, and when they began
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._codec_rows = warm_up.codec_rows(synthesizer)
        self._example: np.ndarray | None = None  # the first code of a window
        self._mean_s = 1.0  # of a request, an average over the last ones
        self.ready = self.draining = self.stalled = False
        self.totals: collections.Counter[str] = collections.Counter()  # requests by outcome, tokens, rounds, drafted, accepted
        self.warm_compilations = 0

    # --- What others call -------------------------------------------------------------------------------------------------------

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Starts the threads, and compiles all programs that requests need; ``progress`` is called with (done, total)."""
        steps = [
            *warm_up.loop_steps(self._lanes, self._shapes, self.synthesizer, self.limits.rounds, self._autotuner),
            self._start_threads,
            *(functools.partial(self._warm_request, rule) for rule in self.rules),
            self._warm_codec,
        ]
        for done, step in enumerate(steps):
            progress(done, len(steps))
            step()
        progress(len(steps), len(steps))
        self.totals.clear()
        self.warm_compilations, self.ready = compilations(), True

    def submit(self, text: str, settings: Settings, rule: str | None, listen: Listener) -> Job:
        """Takes on a request, and returns at once.

        Args:
            text: what to say.
            settings: how; its verifier is not used.
            rule: one of ``rules`` or "auto"; None is the default.
            listen: called with the request's events, see ``Job``.

        Raises:
            Refused: it is not served, and why.
        """
        if self.draining:
            raise Refused(503, "the server is about to end: try another one")
        if not self.ready:
            raise Refused(503, "the server is warming up: try again soon", 5)
        if self.stalled:
            raise Refused(503, f"the device has not answered for {self.limits.stall_s:g} s: try again later", 60)
        return self._submit(text, settings, rule, listen)

    def cancel(self, job: Job) -> None:
        """Gives up a request: its slot is free after the rounds that run."""
        self._end(job, "cancelled")
        with self._changed:
            self._changed.notify_all()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests and waits for those taken on; True when all have ended."""
        self.draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def close(self) -> None:
        """Ends what is left, and the threads."""
        self.draining = True
        for job in list(self._live):
            self._end(job, "failed", Failed(Refused(503, "the server has ended: try again")))
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        with contextlib.suppress(queue.Full):  # then the codec's thread need not be woken, or its device hangs
            self._codec.put_nowait(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def gauges(self) -> dict[str, int]:
        """Requests in the queue and in all, slots in use, slots leaked (it should be 0), compilations since the warm-up, and 1
        while a call of the device hangs.
        """
        lanes = self._lanes.values()
        return {
            "queue": len(self._waiting),
            "requests": len(self._live),
            "slots": sum(lane.used for lane in lanes),
            "leaked_slots": sum(lane.leaked for lane in lanes),
            "compilations": compilations() - self.warm_compilations if self.ready else 0,
            "stalled": int(self.stalled),
        }

    # --- Admission --------------------------------------------------------------------------------------------------------------

    def _submit(self, text: str, settings: Settings, rule: str | None, listen: Listener) -> Job:
        if rule not in (None, AUTO, *self.rules):
            raise Refused(400, f"expected verify among {', '.join((*self.rules, AUTO))}, got {rule!r}: choose one of them")
        requests = self._requests(text, settings)
        job = Job(rule or self.rules[0], settings, requests, listen, time.monotonic() + self.limits.request_s)
        with self._changed:
            if len(self._waiting) >= self.limits.max_queue:
                wait_s = math.ceil(len(self._waiting) * self._mean_s / self.limits.slots)
                raise Refused(429, f"the queue of {self.limits.max_queue} requests is full: try again later", max(wait_s, 1))
            self._live.add(job)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _requests(self, text: str, settings: Settings) -> Requests:
        if len(text) > self.limits.max_text:
            raise Refused(400, f"expected a text of at most {self.limits.max_text} characters, got {len(text)}: shorten it")
        try:
            requests = self.synthesizer.requests(self.synthesizer.pieces(text), settings)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        longest, most = int(requests.prompt_length.max()), self._shapes.prompt_widths[-1]
        if longest > most:
            raise Refused(400, f"expected a prompt of at most {most} tokens, got {longest}: shorten the reference")
        return requests._replace(limit=np.minimum(requests.limit, self._shapes.max_codes))

    def _admit_waiting(self) -> None:
        """Some, in the order of arrival, each rule's as far as its slots go."""
        with self._changed:
            waiting = list(self._waiting)
        admitted = 0
        for job in waiting:
            lane = self._lanes[job.rule if job.rule != AUTO else self._choose()]
            if not job.ended.is_set():
                if not lane.free or admitted == _ADMITTED:
                    continue
                self._admit(lane, job)
                admitted += 1
            with self._changed, contextlib.suppress(ValueError):  # it ended meanwhile
                self._waiting.remove(job)

    def _choose(self) -> str:
        """The rule that is faster at this load."""
        load = sum(lane.used for lane in self._lanes.values()) + len(self._waiting)
        return self._autotuner.choose(next((size for size in self._shapes.sizes if size >= load), self.limits.slots))

    def _admit(self, lane: Lane, job: Job) -> None:
        try:
            with self._watched("prefill"):
                lane.admit(job)
        except ValueError as error:
            self._end(job, "failed", Failed(Refused(400, str(error))))

    def _end(self, job: Job, outcome: str, event: Done | Failed | None = None) -> None:
        if job.end(outcome, event):
            with self._changed:
                self._live.discard(job)
                with contextlib.suppress(ValueError):  # it was admitted
                    self._waiting.remove(job)
                self.totals[outcome] += 1
                self._changed.notify_all()

    # --- The threads ------------------------------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        while not self._closing.is_set():
            with self._changed:
                self._changed.wait_for(self._has_work)
            for lane in self._lanes.values():
                lane.drop_ended()
            self._admit_waiting()
            for lane in self._lanes.values():
                if lane.busy:
                    self._step(lane)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._closing.is_set() or any(lane.busy for lane in self._lanes.values()))

    def _step(self, lane: Lane) -> None:
        try:
            with self._watched("rounds"):
                news = lane.step(self.limits.rounds)
        except Exception as error:  # of the device: the state of these slots is lost
            log.exception("a call of the device failed; its requests end")
            for job in lane.reset():
                self._end(job, "failed", Failed(Refused(500, f"the device failed ({type(error).__name__}): try again")))
            return
        for each in news:
            self._pass_on(each)

    def _pass_on(self, news: News) -> None:
        """Gives the windows of a job to the codec, and its end."""
        job = news.job
        if news.non_finite:
            self._end(job, "failed", Failed(Refused(500, NOT_FINITE)))
        if job.ended.is_set():
            return
        for window in (*news.windows, *((None,) if news.finished else ())):
            self._codec.put((job, window))

    def _run_codec(self) -> None:
        while not self._closing.is_set():
            items = [self._codec.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < self._codec_rows:
                    items.append(self._codec.get_nowait())
            wanted = [item for item in items if item is not None and not item[0].ended.is_set()]
            waves = self._decoded([(job, window) for job, window in wanted if window is not None])
            for job, window in wanted:
                self._tell(job, window, waves)

    def _tell(self, job: Job, window: Window | None, waves: dict[int, np.ndarray | Exception]) -> None:
        wave = waves.get(id(window))
        if window is None:
            counts = count(job.generations, job.rule, job.settings.seed)
            counts["audio_seconds"] = job.num_samples / self.synthesizer.sample_rate_hz
            self.totals.update({name: counts[name] for name in ("tokens", "rounds", "drafted", "accepted", "audio_seconds")})
            self._mean_s = 0.9 * self._mean_s + 0.1 * (time.monotonic() - job.began_s)
            self._end(job, "finished", Done(counts))
        elif isinstance(wave, np.ndarray):
            job.tell(Sound(window.cut(wave), window.origin))
        else:
            self._end(job, "failed", Failed(Refused(500, f"the codec failed ({type(wave).__name__}): try again")))

    def _decoded(self, wanted: list[tuple[Job, Window]]) -> dict[int, np.ndarray | Exception]:
        """The wave of each window by its id, or why there is none; windows in the same voice are decoded together."""
        groups: dict[tuple[object, ...], list[tuple[Job, Window]]] = collections.defaultdict(list)
        for job, window in wanted:
            groups[job.settings.voice, id(job.settings.reference), job.settings.instruct].append((job, window))
        waves: dict[int, np.ndarray | Exception] = {}
        for group in groups.values():
            settings, codes = group[0][0].settings, [window.codes for _, window in group]
            self._example = codes[0][:1] if len(codes[0]) else self._example
            try:
                with self._watched("codec"):
                    found: Sequence[np.ndarray | Exception] = self._decode(codes, settings, Stopwatch())
            except Exception as error:
                log.exception("the codec failed")
                found = [error] * len(group)
            waves |= {id(window): wave for (_, window), wave in zip(group, found, strict=True)}
        return waves

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        self._calls[name] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[name]

    def _run_watchdog(self) -> None:
        """Ends requests at their deadlines, and says when a call of the device hangs, and when it is over."""
        while not self._closing.wait(min(self.limits.stall_s / 4, _WATCH_S)):
            now, allowed_s = time.monotonic(), self.limits.stall_s
            late = [name for name, began in list(self._calls.items()) if now - began > allowed_s]
            stalled = bool(late) and self.ready  # during the warm-up calls compile
            if stalled and not self.stalled:
                log.error("the device has not answered for %g s (%s): requests are refused", allowed_s, ", ".join(late))
            elif self.stalled and not stalled:
                log.info("the device answers again")
            self.stalled = stalled
            for job in [job for job in self._live.copy() if now > job.deadline_s]:
                took = f"{self.limits.request_s:g} s"
                self._end(job, "failed", Failed(Refused(504, f"expected the request to end within {took}: shorten the text")))

    # --- The warm-up ------------------------------------------------------------------------------------------------------------

    def _start_threads(self) -> None:
        for name, work in (("loop", self._run_loop), ("codec", self._run_codec), ("watchdog", self._run_watchdog)):
            thread = threading.Thread(target=work, name=f"jaxspec-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _warm_request(self, rule: str) -> None:
        """A whole request, so that everything on its way has been used once."""
        ended, events = threading.Event(), []

        def listen(event: Event) -> None:
            events.append(event)
            if not isinstance(event, Sound):
                ended.set()

        self._submit(warm_up.TEXT, Settings(voice=self.synthesizer.default_voice), rule, listen)
        ended.wait()
        if isinstance(events[-1], Failed):
            raise ValueError(f"expected a warm-up that speaks, got: {events[-1].error.message}")

    def _warm_codec(self) -> None:
        if self._example is not None:
            warm_up.codec(self._shapes, self.synthesizer, self._example)
