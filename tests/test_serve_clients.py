"""The server as the plug-ins of voice agents and a fuzzer of its OpenAPI document meet it.

pip install pipecat-ai livekit-plugins-openai schemathesis, then pytest -m slow -n 0 tests/test_serve_clients.py
"""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from test_serve_http import KEY, TEXT, Served, expected, idle, post

from jaxspec.audio.resample import resample
from jaxspec.serve import server
from jaxspec.serve.engine import Engine, Limits
from jaxspec.synthesis import builtin

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the warnings of others
RATE = 24_000


@pytest.fixture(scope="module")
def served():
    engine = Engine(builtin.builtin(), ("autoregressive",), Limits(slots=4, max_queue=32, max_text=300))
    made = Served(engine, server.Front(api_key=KEY, max_body=2**16, body_s=5.0))
    yield made
    idle(made)
    made.stop()


def assert_is_the_speech(pcm, voice, tolerance):
    """16-bit PCM at 24 kHz, in which a codec or a player may have put some silence."""
    got, wanted = np.frombuffer(pcm, "<i2") / 32767, resample(expected(TEXT, voice=voice), 16_000, RATE)
    assert abs(len(got) - len(wanted)) <= tolerance * RATE
    size = min(len(got), len(wanted))
    levels = [np.sqrt(np.mean(wave[: size // 2400 * 2400].reshape(-1, 2400) ** 2, axis=1)) for wave in (got, wanted)]
    assert np.corrcoef(*levels)[0, 1] > (0.999 if tolerance < 0.1 else 0.8)


def test_pipecats_service_speaks(served):
    pytest.importorskip("pipecat")
    from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame
    from pipecat.pipeline.worker import PipelineParams
    from pipecat.services.openai.tts import OpenAITTSService
    from pipecat.tests.utils import run_test

    async def spoken():
        settings = OpenAITTSService.Settings(voice="alloy", model="builtin")
        service = OpenAITTSService(api_key=KEY, base_url=f"{served.url}/v1", settings=settings)
        parameters = PipelineParams(audio_out_sample_rate=RATE)
        return await run_test(service, frames_to_send=[TTSSpeakFrame(TEXT)], pipeline_params=parameters, start_timeout=30)

    down, up = asyncio.run(spoken())
    assert not [frame for frame in up if isinstance(frame, ErrorFrame)]
    frames = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
    assert len(frames) > 1
    assert {(frame.sample_rate, frame.num_channels) for frame in frames} == {(RATE, 1)}
    assert_is_the_speech(b"".join(frame.audio for frame in frames), None, 0.02)


@pytest.mark.parametrize("form", ["pcm", "mp3"])
@pytest.mark.parametrize("model", ["tts-1", "gpt-4o-mini-tts"])  # sound, and events
def test_livekits_plugin_speaks(served, form, model):
    plugin = pytest.importorskip("livekit.plugins.openai")

    async def spoken():
        tts = plugin.TTS(model=model, voice="alloy", api_key=KEY, base_url=f"{served.url}/v1", response_format=form)
        async with tts.synthesize(TEXT) as stream:
            frames = [event.frame async for event in stream]
        await tts.aclose()
        return frames

    frames = asyncio.run(spoken())
    assert {(frame.sample_rate, frame.num_channels) for frame in frames} == {(RATE, 1)}
    assert_is_the_speech(b"".join(bytes(frame.data) for frame in frames), None, 0.02 if form == "pcm" else 0.15)


def test_a_fuzzer_of_the_openapi_document_finds_no_error_of_the_server(served):
    pytest.importorskip("schemathesis")
    asked = {"input": TEXT, "response_format": "pcm", "seed": 5}
    before = post(served, asked).content
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    found = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--checks", checks),
            *("--header", f"Authorization: Bearer {KEY}", "--max-examples", "300", "--seed", "1", "--workers", "4"),
        ],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert found.returncode == 0, found.stdout[-6000:]
    idle(served)
    assert post(served, asked).content == before
