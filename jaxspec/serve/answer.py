"""The answer to a request for speech: the events of its job as sound or as server-sent events, until the client hangs up."""

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxspec.serve import errors
from jaxspec.serve.formats import Encoder
from jaxspec.serve.job import Done, Event, Failed, Sound

Origins = list[int]
log = logging.getLogger("jaxspec.serve")


class Gone(Exception):  # noqa: N818
    """The client has hung up, or there is nothing more to tell it."""


class Events:
    """The events of a job, which other threads give, for a coroutine of the server.

    Args:
        hung_up: returns once the client has.
    """

    def __init__(self, hung_up: Callable[[], Awaitable[None]]):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._gone = asyncio.ensure_future(hung_up())

    def listen(self, event: Event) -> None:
        """The listener of the job."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """The next event.

        Raises:
            Gone: the client has hung up.
        """
        coming = asyncio.ensure_future(self._queue.get())
        try:
            await asyncio.wait({coming, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise Gone
            return coming.result()
        finally:
            coming.cancel()

    def close(self) -> None:
        """Waits for the client no more."""
        self._gone.cancel()


class Streamed(Response):
    """A response whose body comes bit by bit; it ends, and closes the connection, where the body raises ``Gone``.

    Starlette's own asks the server for the client's end, which ``Events`` does here.
    """

    def __init__(self, body: AsyncIterator[bytes], media_type: str, headers: dict[str, str]):
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for part in self._body:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Gone:
            pass


async def sound(first: Event, events: Events, encoder: Encoder) -> AsyncIterator[bytes]:
    """The bytes of the sound; where the job fails, the body ends early, so that the client sees a broken transfer.

    Raises:
        Gone: the client has hung up, or the job has failed.
    """
    event = first
    while isinstance(event, Sound):
        if part := await anyio.to_thread.run_sync(encoder.add, event.wave):
            yield part
        event = await events.next()
    if isinstance(event, Failed):
        log.error("a request failed after its first sound: %s", event.error.message)
        raise Gone
    yield await anyio.to_thread.run_sync(encoder.end)


async def server_sent(first: Event, events: Events, encoder: Encoder, num_input: int) -> AsyncIterator[bytes]:
    """The sound as OpenAI's events; beside it each delta says the origin of its codes, and the end the counts.

    Raises:
        Gone: the client has hung up.
    """
    event = first
    while isinstance(event, Sound):
        part = await anyio.to_thread.run_sync(encoder.add, event.wave)
        yield _delta(part, event.origin.ravel().tolist())
        event = await events.next()
    if isinstance(event, Failed):
        yield _event({"type": "error", **errors.body(event.error.status, event.error.message)})
        return
    assert isinstance(event, Done)
    if part := await anyio.to_thread.run_sync(encoder.end):
        yield _delta(part, [])
    num_output = event.counts["tokens"]
    usage = {"input_tokens": num_input, "output_tokens": num_output, "total_tokens": num_input + num_output}
    yield _event({"type": "speech.audio.done", "usage": usage, "counts": event.counts})


def _delta(part: bytes, origins: Origins) -> bytes:
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(part).decode(), "origins": origins})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
