"""The server as clients meet it: openai-python, curl, Wyoming's own client, and those that mean no good."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import wave as wave_files

import chromium
import numpy as np
import pytest

from jaxspec.serve.engine import Engine, Limits
from jaxspec.synthesis import builtin
from jaxspec.synthesis.contract import Settings
from jaxspec.synthesis.pipeline import speak

pytest.importorskip("fastapi", reason="the extra serve")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("av")

from jaxspec.serve import server  # noqa: E402

KEY, TEXT, LONG = "a-key", "The rain has stopped.", "The rain has stopped, so we can go for a walk along the river. " * 8
PLAIN = {"verify": "autoregressive"}


class Served:
    """A server in a thread of its own."""

    def __init__(self, engine, front, with_wyoming=False):
        self.sockets = server.bind("127.0.0.1", [0, 0] if with_wyoming else [0])
        self.port, self.wyoming_port = (self.sockets[i].getsockname()[1] for i in (0, -1))
        self.url, self.engine, self.stopped = f"http://127.0.0.1:{self.port}", engine, None
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run(front, ready)))
        self.thread.start()
        assert ready.wait(300)

    async def _run(self, front, ready):
        self.loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        await server.run(self.engine, front, self.sockets, 60, lambda done, total: None, self.ended, ready.set)

    def stop(self):
        """As SIGTERM does."""
        self.loop.call_soon_threadsafe(self.ended.set)


@pytest.fixture(scope="module")
def served():
    engine = Engine(builtin.builtin(), ("autoregressive",), Limits(slots=2, max_queue=8, max_text=2000))
    made = Served(engine, server.Front(api_key=KEY, max_body=2**16, body_s=1.0), with_wyoming=True)
    yield made
    idle(made)
    accepted_requests_end_well_when_the_server_is_asked_to_end(made)


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def idle(served):
    """Waits until no request is left, and looks for leaks."""
    deadline = time.monotonic() + 60
    while served.engine.gauges()["requests"] + served.engine.gauges()["slots"] and time.monotonic() < deadline:
        time.sleep(0.02)
    gauges = served.engine.gauges()
    assert (gauges["requests"], gauges["slots"], gauges["queue"], gauges["leaked_slots"]) == (0, 0, 0, 0)


def post(served, content, key=KEY, **options):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} if key else {}
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(f"{served.url}/v1/audio/speech", content=content, headers=headers, timeout=120, **options)


def expected(text, seed=0, voice=None):
    return speak(text, Settings(verify="autoregressive", seed=seed, voice=voice)).utterances[0].wave


def test_openai_python_gets_the_speech_in_chunks(client):
    asked = {"model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": "wav", "extra_body": {"seed": 3}}
    with client.audio.speech.with_streaming_response.create(**asked) as response:
        parts = list(response.iter_bytes())
    assert len(parts) > 1
    with wave_files.open(io.BytesIO(b"".join(parts))) as file:
        assert file.getframerate() == 16_000
        got = np.frombuffer(file.readframes(10**9), "<i2") / 32767
    np.testing.assert_allclose(got, expected(TEXT, 3), atol=2e-4)


def test_openai_python_gets_events(client):
    asked = {"model": "gpt-4o-mini-tts", "voice": "ash", "input": TEXT, "response_format": "pcm", "stream_format": "sse"}
    with client.audio.speech.with_streaming_response.create(**asked, instructions="Gently.") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]
    samples = len(b"".join(base64.b64decode(event["audio"]) for event in deltas)) // 2
    codes = sum(len(event["origins"]) for event in deltas)
    assert samples == codes * 640 * 3 // 2
    assert len(expected(TEXT, voice="rms")) == codes * 640


@pytest.mark.parametrize(("name", "magic"), [("mp3", b"ID3"), ("opus", b"OggS"), ("flac", b"fLaC"), ("aac", b"\xff\xf1")])
def test_curl_gets_a_file_of_each_format(served, tmp_path, name, magic):
    if not shutil.which("curl"):
        pytest.skip("no curl")
    body = json.dumps({"input": TEXT, "response_format": name, "speed": 1.5})
    command = ["curl", "-sf", f"{served.url}/v1/audio/speech", "-H", f"Authorization: Bearer {KEY}", "-o", tmp_path / name]
    subprocess.run([*command, "-H", "Content-Type: application/json", "-d", body], check=True, timeout=120)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_what_clients_ask_beside_speech(served, client):
    assert [model.id for model in client.models.list()] == ["jaxspec"]
    assert client.models.retrieve("jaxspec").id == "jaxspec"
    get = lambda path: httpx.get(served.url + path, headers={"Authorization": f"Bearer {KEY}"})  # noqa: E731
    for prefix in ("/audio", "/v1/audio"):
        assert get(f"{prefix}/voices").json()["voices"] == [{"id": "slt", "name": "slt"}, {"id": "rms", "name": "rms"}]
        assert get(f"{prefix}/models").json()["models"][0]["id"] == "jaxspec"
    assert get("/health").json()["status"] == "ok"
    assert httpx.head(f"{served.url}/").status_code == httpx.get(f"{served.url}/").status_code == 200
    assert post(served, {"input": "Hi."}).status_code == 200
    metrics = dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", get("/metrics").text, re.MULTILINE))
    assert float(metrics['jaxspec_requests_total{outcome="finished"}']) >= 1
    assert float(metrics["jaxspec_time_to_first_audio_seconds_count"]) >= 1
    assert float(metrics["jaxspec_tokens_total"]) > 10
    assert float(metrics["jaxspec_leaked_slots_now"]) == 0


BAD = {
    "no JSON": (b"{", 400, "valid"),
    "truncated": (b'{"input": "Hi', 400, "valid"),
    "no input": ({}, 400, "valid input"),
    "a number": ({"input": 3}, 400, "valid input"),
    "empty": ({"input": ""}, 400, "one word"),
    "NUL": ({"input": "\0\0"}, 400, "one word"),
    "long": ({"input": "word " * 500}, 400, "at most 2000 characters"),
    "large": ({"input": "word " * 20_000}, 413, "at most 65536 bytes"),
    "voice": ({"input": "Hi.", "voice": "../../etc/passwd"}, 400, "among default, alloy"),
    "format": ({"input": "Hi.", "response_format": "m4a"}, 400, "response_format"),
    "speed": ({"input": "Hi.", "speed": 9}, 400, "speed"),
    "seed": ({"input": "Hi.", "seed": -1}, 400, "seed"),
    "rule": ({"input": "Hi.", "verify": "no"}, 400, "verify among"),
    "infinity": (b'{"input": "Hi.", "temperature": Infinity}', 400, "temperature"),
    "reference": ({"input": "Hi.", "reference": {"audio": "%"}}, 400, "base64"),
    "pickle": ({"input": "Hi.", "reference": {"audio": base64.b64encode(b"cposix\nsystem\n").decode()}}, 400, "wav, flac"),
    "surrogate": (b'{"input": "\\ud800"}', 400, ""),
    "deep": (b"[" * 30_000, 400, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_an_error_in_openais_shape(served, name):
    content, status, message = BAD[name]
    answer = post(served, content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_bad_requests_get_an_error(served, count):
    """Mutations of a request: fields of any type, bytes that are flipped, cut or put in."""
    rng = np.random.default_rng(0)
    values = [None, True, -1, 3, 1e308, 2**70, "", "x" * 99, "\0", "\u202e", [], {}, [[]], {"id": 1}, {"id": "x"}, {"audio": 3}]
    fields = "model voice instructions response_format speed stream_format seed verify temperature reference other".split()
    answers = []
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}, timeout=60) as http:
        for _ in range(count):
            body = {"input": str(rng.choice([" ", "\0", "?!", "\u200b"]))}  # nothing to speak, so each of them is bad
            body |= {str(field): values[rng.integers(len(values))] for field in rng.choice(fields, rng.integers(4))}
            content = bytearray(json.dumps(body).encode())
            for place in rng.integers(len(content), size=rng.choice([0, 0, 1, 5])):
                content[place] = rng.integers(256)
            cut = content[: rng.integers(len(content))] if rng.random() < 0.2 else content
            answers.append(http.post(f"{served.url}/v1/audio/speech", content=bytes(cut)))
    assert {answer.status_code for answer in answers} <= {200, 400}  # a byte may have become a word
    assert sum(answer.status_code == 200 for answer in answers) < count / 10
    assert all(answer.json()["error"]["message"] for answer in answers if answer.status_code == 400)
    idle(served)


def test_the_key_is_needed_and_compared_whole(served):
    for key in (None, "", "a-ke", "a-key2"):
        assert post(served, {"input": "Hi."}, key).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{served.url}/metrics").status_code == 401


def raw(served, content):
    """A connection that has sent some bytes."""
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(content)
    connection.settimeout(30)
    return connection


def request_bytes(body, length=None):
    length = len(body) if length is None else length
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def test_clients_that_hang_up_at_any_stage_leave_no_slot_in_use(served):
    whole = request_bytes(json.dumps({"input": LONG, "response_format": "pcm"}).encode())
    for sent, read in ((20, 0), (len(whole) - 9, 0), (len(whole), 0), (len(whole), 1), (len(whole), 20_000)):
        connection = raw(served, whole[:sent])
        while read > 0:
            read -= len(connection.recv(4096)) or read
        connection.close()
    idle(served)
    assert served.engine.totals["cancelled"] >= 3


def test_slow_clients_are_sent_away(served, monkeypatch):
    monkeypatch.setattr(server, "HEADERS_S", 0.3)
    with raw(served, b"POST /v1/audio/speech HT") as connection:
        assert connection.recv(100) == b""
    with raw(served, request_bytes(b'{"input": "H', 100)) as connection:
        assert b" 408 " in connection.recv(10_000)


def test_many_at_once_are_served_or_refused_and_none_is_changed(served):
    whole = post(served, {"input": TEXT, "response_format": "wav"}).content
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(served, {"input": TEXT, "response_format": "wav"}), range(20)))
    served_well = [answer for answer in answers if answer.status_code == 200]
    assert len(served_well) >= 8
    first = np.frombuffer(whole[44:], "<i2").astype(int)
    for answer in served_well:
        assert np.abs(np.frombuffer(answer.content[44:], "<i2") - first).max() <= 4  # the rounding of another batch
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1


def test_a_call_of_the_device_that_hangs_is_seen_from_outside(served, monkeypatch):
    monkeypatch.setattr(served.engine, "limits", dataclasses.replace(served.engine.limits, stall_s=0.3))
    slots, go_on = served.engine._lanes["autoregressive"].slots, threading.Event()
    advance = slots.advance
    monkeypatch.setattr(slots, "advance", lambda *args: go_on.wait(60) and advance(*args))
    get = lambda path: httpx.get(served.url + path, headers={"Authorization": f"Bearer {KEY}"})  # noqa: E731

    def until(status):
        deadline = time.monotonic() + 30
        while (answer := get("/health")).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return answer.json()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, served, {"input": "Hi.", "response_format": "wav"})
        health = until(503)
        assert (health["status"], health["stalled"], health["requests"]) == ("stalled", 1, 1)
        assert "jaxspec_stalled_now 1.0" in get("/metrics").text
        refused = post(served, {"input": "Hi."})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert "has not answered for 0.3 s" in refused.json()["error"]["message"]
        go_on.set()
        assert waiting.result().status_code == 200
    assert until(200)["status"] == "ok"
    assert "jaxspec_stalled_now 0.0" in get("/metrics").text
    assert post(served, {"input": "Hi.", "response_format": "wav"}).content == waiting.result().content


def test_wyomings_client_is_spoken_to(served):
    pytest.importorskip("wyoming")
    from wyoming.client import AsyncTcpClient
    from wyoming.info import Describe
    from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop, SynthesizeVoice

    async def answers(*messages, until):
        async with AsyncTcpClient("127.0.0.1", served.wyoming_port) as client:
            for message in messages:
                await client.write_event(message.event())
            got = []
            while not got or got[-1].type != until:
                got.append(await asyncio.wait_for(client.read_event(), 60))
            return got

    (info,) = asyncio.run(answers(Describe(), until="info"))
    assert [voice["name"] for voice in info.data["tts"][0]["voices"]] == ["slt", "rms"]
    voice = SynthesizeVoice(name="rms")
    start, *chunks, stop = asyncio.run(answers(Synthesize(text=TEXT, voice=voice), until="audio-stop"))
    assert (start.type, stop.type, start.data["rate"]) == ("audio-start", "audio-stop", 16_000)
    got = np.frombuffer(b"".join(chunk.payload for chunk in chunks), "<i2") / 32767
    np.testing.assert_allclose(got, expected(TEXT, voice="rms"), atol=2e-4)
    halves = [SynthesizeChunk(text=part) for part in ("The rain ", "has stopped.")]
    parts = asyncio.run(answers(SynthesizeStart(voice=voice), *halves, SynthesizeStop(), until="synthesize-stopped"))
    assert b"".join(part.payload or b"" for part in parts) == b"".join(chunk.payload for chunk in chunks)
    (error,) = asyncio.run(answers(Synthesize(text=" "), until="error"))
    assert "one word" in error.data["text"]
    with socket.create_connection(("127.0.0.1", served.wyoming_port)) as connection:
        connection.sendall(b"{\n")
        assert connection.recv(10) == b""


def test_the_page_plays_and_draws(served, tmp_path):
    with chromium.page(tmp_path, f"{served.url}/") as page:
        page.wait_for("at('error').textContent.includes('API key')")
        page.value(f"at('key').value = '{KEY}', fill()")
        page.wait_for("document.querySelectorAll('#voice option').length === 2")
        said = len(page.said)  # the answer without a key
        page.click("#play")
        page.wait_for("at('acceptance').textContent === 'no draft'")
        assert page.value("audio.state") == "running"
        assert float(page.value("at('seconds').textContent").split()[0]) > 1
        drawn = "[...at('{}').getContext('2d').getImageData(0, 0, 900, 20).data].some((value) => value)"
        assert page.value(drawn.format("codes"))
        assert page.screenshot().startswith(b"\x89PNG")
        assert page.said[said:] == []
        page.value("at('text').value = '?'")
        page.click("#play")
        page.wait_for("at('error').textContent.includes('one word')")


def accepted_requests_end_well_when_the_server_is_asked_to_end(served):
    """The last test, as it ends the server."""
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        running = [pool.submit(post, served, {"input": LONG[:200], "response_format": "wav"}) for _ in range(5)]
        while served.engine.gauges()["requests"] < 5:
            time.sleep(0.01)
        served.stop()
        while not served.engine.draining:
            time.sleep(0.01)
        refused = post(served, {"input": "Hi."})
        contents = [future.result().content for future in running]
    assert refused.status_code == 503
    assert min(map(len, contents)) == max(map(len, contents)) > 100_000
    served.thread.join(60)
    assert not served.thread.is_alive()
    assert served.engine.totals["failed"] == 0
