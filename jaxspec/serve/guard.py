"""What stands before the endpoints: the key, the size of bodies, and the time that they may take."""

import asyncio
import hmac
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxspec.serve import errors
from jaxspec.serve.job import Refused

OPEN = ("/", "/health")  # need no key


class Guard:
    """An ASGI application around another.

    Args:
        app: the other.
        api_key: that requests must bring as a bearer token; None: none.
        max_body: bytes of a body.
        body_s: seconds that a body may take to come.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int, body_s: float):
        self.app, self.max_body, self.body_s = app, max_body, body_s
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on with the body read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            content = await self._body(scope, receive)
        except Refused as error:
            return await errors.response(error)(scope, receive, send)
        if content is None:  # the client has gone
            return None
        whole: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, again, send)

    def _check_key(self, scope: Scope) -> None:
        if self._expected is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._expected):
            raise Refused(401, "expected the server's API key as a bearer token, got none or another: set the client's api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        headers: dict[bytes, Any] = dict(scope["headers"])
        if headers.get(b"content-length", b"0").isdigit():
            self._check_size(int(headers.get(b"content-length", b"0")))
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._check_size(size)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"expected the body within {self.body_s:g} s: send it at once") from None

    def _check_size(self, size: int) -> None:
        if size > self.max_body:
            raise Refused(413, f"expected a body of at most {self.max_body} bytes, got more: shorten it")
