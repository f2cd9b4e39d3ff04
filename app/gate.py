"""A gate before the app for servers that other machines can reach: who has no token sees nothing of it.

The token is in the address once. The answer moves it into a cookie that scripts cannot read and sends the browser to
the same address without it, so that it is not in the history, in bookmarks or in what is shared.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

PARAMETER, COOKIE = "token", "saelab_token"
REFUSAL = b"This address needs the token that `saelab app` printed when it was started.\n"


class Gate:
    """ASGI middleware that lets through who shows ``token``, in a cookie or once in the address."""

    def __init__(self, app: Any, token: str) -> None:
        if len(token) < 16:
            raise ValueError("a token has at least 16 characters")
        self.app, self._token = app, token

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._has_cookie(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 4403})
        elif scope["method"] == "GET" and self._has_parameter(scope):
            await self._welcome(scope, send)
        else:
            await _answer(send, 403, REFUSAL, [])

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _has_cookie(self, scope: dict[str, Any]) -> bool:
        for name, value in scope["headers"]:
            if name == b"cookie":
                try:
                    found = SimpleCookie(value.decode("latin-1")).get(COOKIE)
                except CookieError:
                    continue
                if found is not None and self._is_token(found.value):
                    return True
        return False

    def _has_parameter(self, scope: dict[str, Any]) -> bool:
        return any(name == PARAMETER and self._is_token(value) for name, value in _query(scope))

    async def _welcome(self, scope: dict[str, Any], send: Any) -> None:
        """Set the cookie and lead to the same page without the token."""
        rest = urlencode([(name, value) for name, value in _query(scope) if name != PARAMETER])
        # One slash: two would be the name of another host.
        target = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self._token}; Path=/; HttpOnly; SameSite=Lax{secure}"
        headers = [(b"location", target.encode("ascii", "ignore")), (b"set-cookie", cookie.encode())]
        await _answer(send, 303, b"", [*headers, (b"referrer-policy", b"no-referrer")])


def _query(scope: dict[str, Any]) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


async def _answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    known = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": [*known, *headers]})
    await send({"type": "http.response.body", "body": body})
