"""What stands before the application: the key, and the size of what is sent.

It is plain ASGI, so that a client that goes away is still noticed behind it.
"""

import asyncio
import hashlib
import hmac
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compress.serving.errors import ApiError
from compress.serving.listen import is_loopback
from compress.serving.settings import Settings

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")
OPEN_PATHS = ("/health",)
_READ_ON = 8  # so many times the allowed size is read and dropped, since a client that still sends doesn't listen


class Guard:
    """Answers 403 to another host's name, 401 without the key, 413 to a large body, 408 to one that doesn't come.

    Args:
        app: what it guards; it is given the whole body at once.
        settings: key and limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        if body is None:
            return
        rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, replay, send)

    def _check_host(self, scope: Scope) -> None:
        if not self._settings.local_only:
            return
        host = Headers(scope=scope).get("host", "")
        found = _HOST.fullmatch(host)
        name = found.group(1).strip("[]") if found else ""
        if name != "localhost" and not is_loopback(name):
            raise ApiError(403, f"without a key this server answers to localhost only, not to {name!r}", code="host")

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Digests have one length, so the time of the comparison tells nothing about the key.
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key):
            raise ApiError(
                401,
                "this server wants its API key: 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away."""
        limit = self._settings.max_request_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = announced.isdigit() and int(announced) > limit
        size = 0
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > limit
                    if too_large:
                        parts.clear()
                    else:
                        parts.append(part)
                    if not message.get("more_body") or size > limit * _READ_ON:
                        break
        except TimeoutError as error:
            raise ApiError(408, "the request's body did not come in time", code="request_timeout") from error
        if too_large:
            raise ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
        return b"".join(parts)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
