"""The HTTP server: OpenAI's endpoint for speech and those around it, over the engine."""

import base64
import binascii
import dataclasses
import io
import logging
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

import jaxspec
from jaxspec.audio import files
from jaxspec.serve import errors, formats
from jaxspec.serve.answer import Events, Gone, Streamed, server_sent, sound
from jaxspec.serve.engine import AUTO, Engine
from jaxspec.serve.guard import Guard
from jaxspec.serve.job import Failed, Job, Refused
from jaxspec.serve.metrics import Metrics
from jaxspec.serve.schema import ALIASES, Recording, SpeechRequest, Voice
from jaxspec.synthesis.contract import Reference, Settings

log = logging.getLogger("jaxspec.serve")


@dataclasses.dataclass(frozen=True)
class Front:
    """How the server meets its clients.

    model: the name of what is served.
    api_key: that clients must bring; None: none.
    max_body: bytes of a request.
    body_s: seconds that a request may take to come.
    log_texts: whether the log says what is spoken.
    """

    model: str = "jaxspec"
    api_key: str | None = None
    max_body: int = 8 * 2**20
    body_s: float = 20.0
    log_texts: bool = False


def application(engine: Engine, front: Front) -> FastAPI:
    """The ASGI application over an engine that has been started, or is starting."""
    app = FastAPI(title="jaxspec", version=jaxspec.__version__, redoc_url=None)
    app.add_middleware(Guard, api_key=front.api_key, max_body=front.max_body, body_s=front.body_s)
    errors.handle(app)
    metrics = Metrics(engine)
    voices, instructed = _voices(engine), _takes_instructions(engine)
    page = resources.files("jaxspec") / "serve" / "page.html"

    @app.post("/v1/audio/speech", response_class=Response, responses=_RESPONSES)
    async def speech(asked: SpeechRequest, request: Request) -> Response:
        """Speaks a text; the sound comes while it is made."""
        return await _Speech(engine, front, metrics, voices, instructed).answer(asked, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(front.model)]}

    @app.get("/v1/models/{name}", responses=_refused(404))
    async def model(name: str) -> dict[str, Any]:
        """The model of a name."""
        if name != front.model:
            raise Refused(404, f"expected the model {front.model}, got another: it is the only one")
        return _model(name)

    @app.get("/audio/models")
    @app.get("/v1/audio/models")
    async def audio_models() -> dict[str, Any]:
        """The model that is served, as Open WebUI asks for it."""
        return {"models": [{"id": front.model, "name": front.model}]}

    @app.get("/audio/voices")
    @app.get("/v1/audio/voices")
    async def audio_voices() -> dict[str, Any]:
        """The voices and rules that requests may name."""
        named = [{"id": name, "name": name} for name in engine.synthesizer.voices]
        return {"voices": named or [{"id": "default", "name": "default"}], "rules": [*engine.rules, AUTO]}

    @app.get("/health", responses=_refused(503))
    async def health() -> JSONResponse:
        """Whether requests are served now."""
        state = "draining" if engine.draining else "warming up" if not engine.ready else "stalled" if engine.stalled else "ok"
        return JSONResponse({"status": state, **engine.gauges()}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    return app


# The page loads nothing from elsewhere, and no other site may show it in a frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "media-src blob:; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_ERROR = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}}}}}


def _refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documented answers of these statuses."""
    return {status: {"description": "Refused", "content": _ERROR} for status in statuses}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {name: {} for name in (*formats.MEDIA_TYPES.values(), "text/event-stream")}},
    **_refused(400, 401, 408, 413, 429, 500, 503, 504),
}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "jaxspec"}


def _voices(engine: Engine) -> dict[str, str | None]:
    """What each name that a request may give stands for."""
    own = engine.synthesizer.voices
    aliases = {alias: own[i % len(own)] if own else None for i, alias in enumerate(ALIASES)}
    return {"default": engine.synthesizer.default_voice, **aliases, **{name: name for name in own}}


def _takes_instructions(engine: Engine) -> bool:
    try:
        engine.synthesizer.requests(
            engine.synthesizer.pieces("one, two."), Settings(voice=engine.synthesizer.default_voice, instruct="Speak.")
        )
    except ValueError:
        return False
    return True


class _Speech:
    """One request for speech."""

    def __init__(self, engine: Engine, front: Front, metrics: Metrics, voices: dict[str, str | None], instructed: bool):
        self.engine, self.front, self.metrics, self.voices, self.instructed = engine, front, metrics, voices, instructed

    async def answer(self, asked: SpeechRequest, request: Request) -> Response:
        """Waits for the first sound, so that what fails before it has a status of its own, and answers."""
        events = Events(lambda: _hung_up(request))
        listen = self.metrics.watching(events.listen)
        job: Job | None = None
        try:
            settings, encoder = await anyio.to_thread.run_sync(self._prepare, asked)
            job = await anyio.to_thread.run_sync(self.engine.submit, asked.input, settings, asked.verify, listen)
            if self.front.log_texts:
                log.info("speaks %r", asked.input)
            first = await events.next()
        except BaseException as error:
            self._close(events, job)
            if isinstance(error, Gone):
                return Response(status_code=499)
            if isinstance(error, ValueError):
                raise Refused(400, str(error)) from error
            raise
        if isinstance(first, Failed):
            self._close(events, job)
            raise first.error
        num_input = int(job.requests.prompt_length.sum())
        if asked.stream_format == "sse":
            body, media_type = server_sent(first, events, encoder, num_input), "text/event-stream"
        else:
            body, media_type = sound(first, events, encoder), formats.MEDIA_TYPES[asked.response_format]
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        if asked.response_format == "pcm":
            headers |= {"X-Sample-Rate": str(formats.PCM_HZ), "X-Channels": "1", "X-Bit-Depth": "16"}
        return Streamed(self._closing(body, events, job), media_type, headers)

    def _prepare(self, asked: SpeechRequest) -> tuple[Settings, formats.Encoder]:
        formats.check(asked.response_format, asked.speed)
        name = asked.voice.id if isinstance(asked.voice, Voice) else asked.voice
        if name is not None and name not in self.voices:
            raise ValueError(f"expected a voice among {', '.join(self.voices)}, got another: choose one of them")
        settings = Settings(
            voice=None if name is None and asked.reference else self.voices[name or "default"],
            temperature=asked.temperature,
            seed=asked.seed,
            reference=asked.reference and self._reference(asked.reference),
            instruct=asked.instructions if self.instructed else "",
        )
        return settings, formats.Encoder(asked.response_format, self.engine.synthesizer.sample_rate_hz, asked.speed)

    def _reference(self, recording: Recording) -> Reference:
        """From bytes in memory."""
        try:
            content = base64.b64decode(recording.audio, validate=True)
        except binascii.Error as error:
            raise ValueError(f"expected reference.audio in base64, got something else: {error}") from error
        return self.engine.synthesizer.reference(*files.decode(io.BytesIO(content), "reference.audio"), recording.text)

    async def _closing(self, body: AsyncIterator[bytes], events: Events, job: Job) -> AsyncIterator[bytes]:
        """The body; however it ends, the job has no slot any more."""
        try:
            async for part in body:
                yield part
        finally:
            self._close(events, job)

    def _close(self, events: Events, job: Job | None) -> None:
        events.close()
        if job is not None:
            self.engine.cancel(job)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
