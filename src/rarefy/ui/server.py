"""The local page: reads only, this machine only.

Every address it answers is written in a table, so a path from outside is looked up and never joined to a folder.
Requests must name an expected host (DNS rebinding), come with the token where one is set, and read only.
"""

from __future__ import annotations

import hmac
import ipaddress
import mimetypes
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import BadInput, RarefyError
from .export import module_order, static
from .report import NAME, report_json

POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE = "rarefy-token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_TOKEN = 16


def _host_of(header: str) -> str:
    """Host name of a Host header, without its port; empty when it is malformed."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?", header):
        return ""
    return (urlsplit("//" + header).hostname or "").lower()


class Guard:
    """Refuses what the page never needs, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], token: str = ""):
        self.app, self.hosts, self.token = app, frozenset(h.lower() for h in hosts), token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refuse(scope)
        await (refusal or self.app)(scope, receive, guarded)

    def refuse(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass, else None."""
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        host = _host_of(named[0]) if len(named) == 1 else ""
        if not host or (self.hosts and host not in self.hosts):
            return PlainTextResponse("unknown host\n", 400)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("this page is read only\n", 405, {"Allow": "GET, HEAD"})
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != named[0]:
            return PlainTextResponse("another origin\n", 403)
        # same-site is refused too: another port of localhost is another program
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("another site\n", 403)
        return self._check_token(scope) if self.token else None

    def _check_token(self, scope: Scope) -> Response | None:
        request = Request(scope)
        query = QueryParams(scope["query_string"]).get("token", "")
        if query and self._same(query):
            reply = RedirectResponse(
                scope["path"] if scope["path"] == "/" else "/", 303
            )  # keeps the secret out of the address bar
            reply.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return reply
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._same(request.cookies.get(COOKIE, "")) or self._same(bearer):
            return None
        return PlainTextResponse("open the address with ?token=... that `rarefy show` printed\n", 401)

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode("utf-8"))


def _file(name: str) -> Callable[[Request], Response]:
    text = static(name)
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "text/plain"
    return lambda request: Response(text, media_type=kind)


def make_app(run_folder: Path, hosts: Iterable[str] = LOOPBACK, token: str = "") -> ASGIApp:
    """The application that shows `run_folder`. `hosts` are the names it answers to (none: any, with a token).

    Raises BadInput when the folder holds no report.json, Damaged when that is not whole.
    """
    folder = Path(run_folder)
    kept: dict[tuple[int, int], bytes] = {}

    def current() -> bytes:
        stat = (folder / NAME).stat() if (folder / NAME).is_file() else None
        stamp = (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)
        if stamp not in kept:
            data = report_json(folder)  # raises with the advice
            kept.clear()
            kept[stamp] = data
        return kept[stamp]

    current()  # checking a large report takes seconds: before the first visitor waits for it

    def report(request: Request) -> Response:
        try:
            return Response(current(), media_type="application/json")
        except (RarefyError, OSError) as error:
            said = str(error).encode("utf-8", "replace").decode()
            return JSONResponse({"error": said}, 422)

    routes = [
        Route("/", _file("index.html")),
        Route("/" + NAME, report),
        Route("/static/style.css", _file("style.css")),
    ]
    routes += [Route(f"/static/{name}", _file(name)) for name in module_order()]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    return Guard(app, hosts, token)


def check_address(host: str, token: str) -> tuple[str, ...]:
    """Names to answer to when bound to `host`. Raises BadInput where an open address has no good token."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or (address is not None and address.is_loopback):
        return (*LOOPBACK, host)
    if len(token) < SHORTEST_TOKEN:
        raise BadInput(
            f"host={host!r} lets other machines in: give a token of at least {SHORTEST_TOKEN} characters, "
            "or stay on 127.0.0.1"
        )
    if address is not None and address.is_unspecified:
        return ()  # reached by names unknown here; the token decides
    return (*LOOPBACK, host)


def serve(
    run_folder: Path,
    port: int = 8765,
    host: str = "127.0.0.1",
    token: str = "",
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Show a run folder's page until interrupted. Port 0 takes a free one; `on_ready` gets the address once it listens.

    Raises BadInput for a folder without report.json, a port out of range or in use, an open host without a token.
    """
    import socket

    import uvicorn

    if not 0 <= port <= 65535:
        raise BadInput(f"port={port} must be in [0, 65535]; 0 takes a free one")
    app = make_app(run_folder, check_address(host, token), token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise BadInput(
                f"{host}:{port}: {error.strerror or error}; choose another port, or 0 for a free one"
            ) from None
        listener.listen()
        shown = f"[{host}]" if ":" in host else host
        if on_ready:
            on_ready(f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else ""))
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
