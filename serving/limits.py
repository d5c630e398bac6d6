"""Limits of connections: API key, size and time of a body, and time of a head."""

import asyncio
import hmac
from typing import Any

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError, error_response

PROTECTED = "/v1/"
DISCARDED_BODIES = 64  # of a body that is too large so many times the limit is read and dropped: the client then reads


class Gate:
    """ASGI middleware that lets complete requests pass: with the API key, and with a body of limited size and time.

    Args:
        api_key: bearer token that requests to `/v1/` must have; None for any.
        max_body_bytes: most bytes of a body.
        body_timeout: most seconds in which a body must have come.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, body_timeout: float):
        self.app, self.api_key = app, api_key
        self.max_body_bytes, self.body_timeout = max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(Request(scope))
            body = await self._read(Request(scope), receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:  # else the client has hung up
            await self.app(scope, replay(body, receive), send)

    def _check_key(self, request: Request) -> None:
        if self.api_key is None or not request.url.path.startswith(PROTECTED):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise ApiError(401, "the header `Authorization` must be `Bearer` with the API key", code="invalid_api_key")

    async def _read(self, request: Request, receive: Receive) -> bytes | None:
        """Return the body; None if the client hangs up.

        Raises:
            ApiError: 413 for a body that is too large, 408 for one that is not complete in time.
        """
        announced = request.headers.get("content-length", "")
        is_too_large = announced.isdecimal() and int(announced) > self.max_body_bytes
        body, size, more_body = bytearray(), 0, True
        try:
            with anyio.fail_after(self.body_timeout):
                while more_body and size <= DISCARDED_BODIES * self.max_body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    more_body = message.get("more_body", False)
                    is_too_large = is_too_large or size > self.max_body_bytes
                    if is_too_large:
                        body.clear()
                    else:
                        body += message.get("body", b"")
        except TimeoutError:
            if not is_too_large:
                raise ApiError(408, f"the body must come within {self.body_timeout:g} seconds, but did not") from None
        if is_too_large:
            got = announced or f"more than {self.max_body_bytes}"
            raise ApiError(413, f"the body must have at most {self.max_body_bytes} bytes, but got {got}")
        return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what comes: the client's hanging up."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


class TimedProtocol(H11Protocol):
    """HTTP of uvicorn that closes a connection whose head does not come in time; uvicorn itself waits for ever.

    The time of a body is limited by [`Gate`], that of an answer by the server.
    """

    head_timeout = 10.0  # seconds

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Run the timer while no request is being answered; uvicorn's own one runs between two requests."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
