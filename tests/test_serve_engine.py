"""The engine: requests in slots get what they get alone, leave nothing behind, and compile nothing."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from jaxspec.models import builtin as voices
from jaxspec.serve.engine import Engine, Limits
from jaxspec.serve.job import Done, Failed, Refused, Sound
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak

TEXTS = ["One day we met. The rain has stopped.", "Hi.", "We can go.", "Good morning, all of you.", "No.", "It was late."]


LEFT = ("queue", "requests", "slots", "leaked_slots", "stalled")


class Listener:
    """Collects the events of a job."""

    def __init__(self):
        self.events, self.ended, self.began, self.first = [], threading.Event(), time.monotonic(), None

    def __call__(self, event):
        self.first = self.first or time.monotonic() - self.began
        self.events.append(event)
        if not isinstance(event, Sound):
            self.ended.set()

    def result(self):
        """(wave, origin, counts) once the job has ended."""
        assert self.ended.wait(120)
        *sounds, last = self.events
        assert isinstance(last, Done), last
        return np.concatenate([s.wave for s in sounds]), np.concatenate([s.origin for s in sounds]), last.counts


def submit(engine, text, settings=None, rule=None):
    listener = Listener()
    return engine.submit(text, settings or Settings(), rule, listener), listener


def idle(engine):
    """What is left once all requests have ended."""
    deadline = time.monotonic() + 30
    while any(engine.gauges()[name] for name in LEFT) and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine.gauges()


@pytest.fixture(scope="module")
def engine():
    told = []
    made = Engine(builtin.builtin(), ("exact", "autoregressive"), Limits(slots=4, max_queue=12, max_text=300))
    with pytest.raises(Refused, match="warming up"):
        submit(made, "Hi.")
    made.start(lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(told[0][1] + 1))
    yield made
    assert made.drain(60)
    assert {name: left for name, left in idle(made).items() if name != "compilations"} == dict.fromkeys(LEFT, 0)
    with pytest.raises(Refused, match="about to end"):
        submit(made, "Hi.")
    made.close()


def check(listener, text, settings, rule="exact"):
    """The request gave what ``speak`` gives to the same text alone."""
    wave, origin, counts = listener.result()
    whole = speak(text, Settings(verify=rule, seed=settings.seed, voice=settings.voice, temperature=settings.temperature))
    np.testing.assert_array_equal(origin, whole.utterances[0].origin)
    np.testing.assert_allclose(wave, whole.utterances[0].wave, atol=1e-4)
    assert {name: counts[name] for name in ("tokens", "rounds", "accepted")} == {
        name: whole.counts[name] for name in ("tokens", "rounds", "accepted")
    }


def test_requests_together_get_what_they_get_alone(engine):
    settings = [Settings(seed=2**40 + i, voice=("slt", "rms")[i % 2], temperature=(None, 0.0, 0.5)[i % 3]) for i in range(6)]
    rules = ["exact", "exact", "autoregressive"] * 2
    running = [submit(engine, *each)[1] for each in zip(TEXTS, settings, rules, strict=True)]
    for listener, text, each, rule in zip(running, TEXTS, settings, rules, strict=True):
        check(listener, text, each, rule)
    assert idle(engine)["leaked_slots"] == 0


def test_nothing_is_compiled_after_the_warm_up(engine):
    before = engine.gauges()["compilations"]
    long = "One two three four five six seven eight nine ten. " * 5
    texts = ["A.", long, "It rained, and it rained, and then it rained some more", *TEXTS]
    each = [Settings(seed=2**70 + i, top_k=i, top_p=0.5 + i / 20, min_p=i / 50, max_codes=5 + 40 * i) for i in range(len(texts))]
    running = [
        submit(engine, text, one, rule)[1] for text, one, rule in zip(texts, each, (*engine.rules, "auto") * 3, strict=True)
    ]
    for listener in running:
        listener.result()
    assert engine.gauges()["compilations"] == before


def test_a_request_for_auto_is_served_by_one_of_the_rules(engine):
    for _ in range(3):
        assert submit(engine, "Hi.", rule="auto")[1].result()[2]["verify"] == "auto"


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(engine):
    long = "The rain has stopped, so we can go for a walk along the river. " * 4
    jobs = []

    def fill():
        for _ in range(30):
            jobs.append(submit(engine, long)[0])

    with pytest.raises(Refused) as refused:
        fill()
    assert refused.value.status == 429
    assert refused.value.retry_after_s >= 1
    assert len(jobs) >= 12
    for job in jobs:
        engine.cancel(job)
    job, listener = submit(engine, "Hi.")
    check(listener, "Hi.", Settings())
    assert [job.outcome for job in jobs] == ["cancelled"] * len(jobs)
    assert idle(engine)["slots"] == 0


def test_nothing_comes_after_a_request_is_cancelled(engine):
    job, listener = submit(engine, TEXTS[0] * 3)
    while not listener.events:
        time.sleep(0.001)
    engine.cancel(job)
    count = len(listener.events)
    assert idle(engine)["slots"] == 0
    assert len(listener.events) == count
    assert isinstance(listener.events[-1], Sound)


@pytest.mark.parametrize(
    ("text", "settings", "rule", "message"),
    [
        ("", Settings(), None, "one word to speak"),
        ("Hi.", Settings(voice="bob"), None, "voice among slt, rms"),
        ("Hi.", Settings(), "tolerance", "verify among exact, autoregressive, auto"),
        ("Hi. " * 100, Settings(), None, "at most 300 characters"),
    ],
)
def test_bad_requests_are_refused(engine, text, settings, rule, message):
    with pytest.raises(Refused, match=message) as refused:
        submit(engine, text, settings, rule)
    assert refused.value.status == 400


def test_a_late_request_ends(engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", Limits(slots=4, request_s=0.05))
    _, listener = submit(engine, TEXTS[0] * 4)
    assert listener.ended.wait(30)
    assert listener.events[-1].error.status == 504
    assert idle(engine)["slots"] == 0


def test_a_failure_of_the_device_ends_its_requests_and_no_others(engine, monkeypatch):
    lane = engine._lanes["exact"]
    advance = lane.slots.advance

    def fails_once(rounds):
        monkeypatch.setattr(lane.slots, "advance", advance)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lane.slots, "advance", fails_once)
    _, listener = submit(engine, "Hi.")
    assert listener.ended.wait(30)
    assert listener.events == [Failed(listener.events[-1].error)]
    assert listener.events[-1].error.status == 500
    check(submit(engine, "Hi.")[1], "Hi.", Settings())


def hung(monkeypatch, where, name):
    """Makes the calls of a method hang, until the event that is returned is set."""
    call, go_on = getattr(where, name), threading.Event()

    def hangs(*args, **kwargs):
        assert go_on.wait(60)
        return call(*args, **kwargs)

    monkeypatch.setattr(where, name, hangs)
    return go_on


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("call", ["advance", "codec"])
def test_a_call_that_hangs_is_told_and_requests_end_at_their_deadlines(engine, monkeypatch, caplog, call):
    monkeypatch.setattr(engine, "limits", dataclasses.replace(engine.limits, stall_s=0.3, request_s=1.5))
    go_on = hung(monkeypatch, *((engine._lanes["exact"].slots, "advance") if call == "advance" else (engine, "_decode")))
    _, late = submit(engine, "Hi.")
    wait_until(lambda: engine.stalled)
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"has not answered for 0.3 s ({'rounds' if call == 'advance' else 'codec'})" in line.getMessage()
    with pytest.raises(Refused, match="has not answered") as refused:
        submit(engine, "Hi.")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 60)
    assert late.ended.wait(30)  # though the call still hangs
    assert [event.error.status for event in late.events] == [504]
    assert engine.stalled
    with caplog.at_level("INFO"):
        go_on.set()
        wait_until(lambda: not engine.stalled)
    assert caplog.records[-1].getMessage() == "the device answers again"
    check(submit(engine, "Hi.")[1], "Hi.", Settings())
    assert idle(engine) == engine.gauges() | dict.fromkeys(LEFT, 0)


def test_an_engine_whose_codec_hangs_can_be_closed():
    engine = Engine(builtin.builtin(), ("autoregressive",), Limits(slots=1))
    while not engine._codec.full():
        engine._codec.put(None)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


def test_weights_that_are_not_finite_end_their_own_request():
    """The voice rms is NaN: slt, in the slot beside it, says bit by bit what it says alone."""
    voice = voices.load()
    table = np.array(voice.target_params["table_1"])
    table[len(voices.SYMBOLS) + 1] = np.nan
    bad = voice._replace(target_params={**voice.target_params, "table_1": table})
    engine = Engine(builtin.synthesizer(bad), ("autoregressive",), Limits(slots=2))
    engine.start()
    alone = submit(engine, TEXTS[0])[1].result()
    together = [submit(engine, TEXTS[0], Settings(voice=name))[1] for name in ("slt", "rms", "slt", "rms")]
    for listener in together[::2]:
        np.testing.assert_array_equal(listener.result()[1], alone[1])
        np.testing.assert_allclose(listener.result()[0], alone[0], atol=1e-5)
    for listener in together[1::2]:
        assert listener.ended.wait(60)
        assert "finite logits" in listener.events[-1].error.message
    assert idle(engine)["leaked_slots"] == 0
    engine.close()
