"""The server as a process: sockets, signals, and an end that finishes what was accepted."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspec.serve.engine import Engine
from jaxspec.serve.http import Front, application

__all__ = ["Front", "bind", "run", "serve"]
HEADERS_S = 10.0  # that a client may take from its connection, or its first byte, to the end of the headers
log = logging.getLogger("jaxspec.serve")
T = TypeVar("T")


def bind(host: str, ports: Sequence[int]) -> list[socket.socket]:
    """Sockets at an address, before a model is loaded.

    Raises:
        ValueError: a port is in use or cannot be had.
    """
    sockets = []
    for port in ports:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            one = socket.socket(family, socket.SOCK_STREAM)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
            one.listen(128)
        except (OSError, OverflowError) as error:
            raise ValueError(f"expected a free port, got {host}:{port} ({error}): choose another with --port") from error
        sockets.append(one)
    return sockets


Progress = Callable[[int, int], None]


def serve(engine: Engine, front: Front, sockets: Sequence[socket.socket], drain_s: float, progress: Progress) -> None:
    """``run`` until SIGTERM or SIGINT."""

    async def until_a_signal() -> None:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        await run(engine, front, sockets, drain_s, progress, end)

    asyncio.run(until_a_signal())


async def run(
    engine: Engine,
    front: Front,
    sockets: Sequence[socket.socket],
    drain_s: float,
    progress: Progress,
    end: asyncio.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Warms the engine up and serves: HTTP at the first socket, and Wyoming at the second if there is one.

    During the warm-up requests are refused, and /health says so. At the end new requests are refused, and those that were
    accepted are finished.

    Args:
        engine: not yet started; it is closed at the end.
        front: how the server meets its clients.
        sockets: that listen.
        drain_s: the most seconds to wait for accepted requests.
        progress: of the warm-up, called with (done, total).
        end: when to end.
        ready: called after the warm-up.

    Raises:
        Exception: what the warm-up raised.
    """

    def warmed(done: "asyncio.Future[None]") -> None:
        if done.exception():
            end.set()
        else:
            log.info("serves speech at http://%s:%d", *sockets[0].getsockname()[:2])
            ready()

    others = [await _wyoming(engine, sockets[1], front)] if len(sockets) > 1 else []
    http = _Http(_config(engine, front))
    serving = asyncio.create_task(http.serve(sockets=[sockets[0]]))
    warming = _in_thread(lambda: engine.start(progress))
    warming.add_done_callback(warmed)
    await asyncio.wait({asyncio.create_task(end.wait()), serving}, return_when=asyncio.FIRST_COMPLETED)
    if engine.ready:
        log.info("ends: %d requests are under way", engine.gauges()["requests"])
        if not await _in_thread(lambda: engine.drain(drain_s)):
            log.error("%d requests did not end within %g s", engine.gauges()["requests"], drain_s)
    for other in others:
        other.close()
    http.should_exit = True
    await asyncio.wait({serving}, timeout=30)  # what was made is sent
    await _in_thread(engine.close)
    log.info("ended")
    if warming.done():
        warming.result()


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """The result of work in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        if not future.done():
            _ = future.set_exception(error) if error else future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, daemon=True).start()
    return future


async def _wyoming(engine: Engine, at: socket.socket, front: Front) -> Any:
    """The Wyoming server, whose package is only needed for it."""
    from jaxspec.serve import wyoming_front

    return await wyoming_front.start(engine, at, front.model)


def _config(engine: Engine, front: Front) -> uvicorn.Config:
    return uvicorn.Config(
        application(engine, front),
        http=Protocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 2**10,
    )


class _Http(uvicorn.Server):
    """uvicorn without its handling of signals, which is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Leaves signals alone."""
        yield


class Protocol(H11Protocol):
    """uvicorn's, for clients that take their time: a connection without whole headers is closed after some seconds."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts to wait for the headers."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits no more once they are whole; or for those of the next request."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing."""
        super().connection_lost(exc)
        if self._late:
            self._late.cancel()

    def _wait(self) -> None:
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and self._late:
            self._late.cancel()
            self._late = None
        elif not under_way and self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close)

    def _close(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
