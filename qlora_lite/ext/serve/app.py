"""The HTTP side: ``/v1/models`` and ``/v1/chat/completions`` of the OpenAI API, on this machine only.

A server for trying an adapter with existing clients. It answers one request at a time and has no accounts, so it is
bounded in all it takes (bytes of a request and the time until it is there, requests that wait, connections) and listens
on 127.0.0.1 unless told otherwise. It takes only JSON, only under its own host names, and of pages only from its own
origin: a page in a browser can then not send it requests behind its user's back, by a form or by a name that changes
its address.
"""

import asyncio
import errno
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_lite.errors import DoesNotFitError, OutputError, QloraLiteError
from qlora_lite.inference.multi_adapter import BASE, Tasks

from .engine import Engine, Piece
from .requests import ApiError, ChatRequest, read_request

log = logging.getLogger("qlora_lite")
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # as a Host header writes them
MAX_CONNECTIONS = 64
BODY_BYTES, BODY_BYTES_WITH_PICTURES = 1 << 20, 1 << 25
REQUEST_SECONDS = 10  # until a connection brings a request's header, and then its body


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes at most.

    Args:
        body_bytes: of a request.
        waiting: requests that wait while one is answered.
        new_tokens: of an answer.
    """

    body_bytes: int = BODY_BYTES
    waiting: int = 8
    new_tokens: int = 512


def build_app(tasks: Tasks, limits: Limits, hosts: tuple[str, ...] = LOCAL) -> Starlette:
    """Return the application.

    Args:
        hosts: host names under which it answers, as a Host header writes them; none for any.
    """
    api = _Api(tasks, limits)
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    handlers = {
        ApiError: _api_error,
        HTTPException: _http_error,
        DoesNotFitError: _memory_error,
        ClientDisconnect: _client_left,
        Exception: _internal_error,
    }
    guard = Middleware(_Guard, hosts=hosts)
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[guard])
    app.state.engine = api.engine
    return app


def run_server(tasks: Tasks, limits: Limits, host: str, port: int) -> None:
    """Listen until stopped.

    Raises:
        OutputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    if os.name == "posix":  # on Windows it would let two servers have one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        wrong = "host" if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL else "port"
        raise OutputError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --{wrong}") from error
    shown = f"[{host}]" if ":" in host else host
    is_local = ip_address(listener.getsockname()[0]).is_loopback
    app = build_app(tasks, limits, (*LOCAL, shown) if is_local else ())
    names = ", ".join(dict.fromkeys((*tasks.names, *([BASE] if tasks.has_base else []))))
    log.info("serving %s on http://%s:%d/v1", names, shown, listener.getsockname()[1])
    log.info("this is for trying adapters, one request at a time; use vLLM or Ollama in production (qlora-lite export)")
    http_server(app).run(sockets=[listener])


def http_server(app: Starlette) -> uvicorn.Server:
    """Return a server of the application whose connections are bounded in number and in time without a request."""
    return _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            http=_Connection,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=REQUEST_SECONDS,
        )
    )


class _Server(uvicorn.Server):
    """A server that ends the answer that it makes when it is stopped: uvicorn alone waits for its last token."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.engine.close()
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """A connection that is closed where no request comes.

    uvicorn alone has a time limit between two requests only, and any byte ends it: connections that send nothing or
    half a header would take up ``limit_concurrency`` for ever. (Read for uvicorn 0.30 to 0.54.)
    """

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        if self.deadline:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(REQUEST_SECONDS, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Guard:
    """Refuse what a page of another site may have sent, before anything else reads the request."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope["headers"], self.hosts) if scope["type"] == "http" else None
        answer = JSONResponse(refusal.body(), refusal.status) if refusal else self.app
        await answer(scope, receive, send)


def _refusal(headers: Iterable[tuple[bytes, bytes]], hosts: tuple[str, ...]) -> ApiError | None:
    """Return why a request is not for this server, None if it is.

    The raw header is compared with a list: starlette's ``request.url`` takes the socket's own address in place of a
    Host that it cannot parse.

    Args:
        headers: of the ASGI scope, with names in lower case.
        hosts: host names under which requests are answered; none for any.
    """
    found = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    host = found[0] if len(found) == 1 else ""
    if hosts and re.sub(r":[0-9]{1,5}\Z", "", host) not in hosts:
        return ApiError(403, f"requests for the host {host!r} are not answered", "wrong_host")
    origins = {value.decode("latin-1").lower() for name, value in headers if name == b"origin"}
    if foreign := origins - {f"http://{host}", f"https://{host}"}:
        return ApiError(403, f"requests from pages of {min(foreign)!r} are not answered", "wrong_origin")
    return None


class _Api:
    def __init__(self, tasks: Tasks, limits: Limits):
        self.engine, self.limits = Engine(tasks, limits.waiting), limits
        self.created = int(time.time())

    async def models(self, _request: Request) -> Response:
        """List what can be asked for."""
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self.engine.names]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        name = request.path_params["name"]
        if name not in self.engine.names:
            raise ApiError(404, f"there is no model {name!r}", "model_not_found", "model")
        return JSONResponse(self._describe(name))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, at once or as a stream."""
        wanted = read_request(await self._json(request), self.limits.new_tokens)
        pieces = self.engine.pieces(wanted)
        reply = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
        if wanted.stream:
            # an error before the first piece is still an error of the API and no stream
            first = await _while_client_listens(request, anext(pieces))
            return StreamingResponse(_events(reply, first, pieces, wanted), media_type="text/event-stream")
        text, last = await _while_client_listens(request, _whole_answer(pieces))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": last.finish,
            "logprobs": None,
        }
        return JSONResponse(reply | {"object": "chat.completion", "choices": [choice], "usage": _usage(last)})

    def _describe(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "qlora-lite"}

    async def _json(self, request: Request) -> object:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request's content-type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body_bytes:
                        raise ApiError(413, f"the limit is {self.limits.body_bytes} bytes", "request_too_large")
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {REQUEST_SECONDS} seconds") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request is not JSON: {error}") from error


async def _while_client_listens(request: Request, work: Awaitable):
    """Return what some work returns; stop it when the client leaves first.

    Raises:
        ClientDisconnect: the client left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole_answer(pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    """Return the text of all pieces, and the last one."""
    text = ""
    async for piece in pieces:
        text += piece.text
    return text, piece


def _usage(last: Piece) -> dict:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.answer_tokens,
        "total_tokens": last.prompt_tokens + last.answer_tokens,
    }


async def _events(reply: dict, first: Piece, rest: AsyncIterator[Piece], wanted: ChatRequest) -> AsyncIterator[str]:
    """Write an answer as server-sent events."""

    def event(delta: dict, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps(reply | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    piece = first
    try:
        while piece.finish is None:
            yield event({"content": piece.text})
            piece = await anext(rest)
    except (QloraLiteError, RuntimeError) as error:  # RuntimeError: out of memory, among others
        log.error("a stream broke off: %s", error)
        said = _too_long(error) if isinstance(error, DoesNotFitError) else ApiError(500, str(error))
        yield f"data: {json.dumps(said.body())}\n\n"
        return
    yield event({}, piece.finish)
    if wanted.wants_usage:
        counted = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(piece)}
        yield f"data: {json.dumps(reply | counted)}\n\n"
    yield "data: [DONE]\n\n"


async def _api_error(_request: Request, error: ApiError) -> Response:
    headers = {408: {"connection": "close"}, 429: {"retry-after": "1"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


async def _http_error(_request: Request, error: HTTPException) -> Response:
    return JSONResponse(ApiError(error.status_code, f"{error.detail}; see /v1/models").body(), error.status_code)


async def _memory_error(request: Request, error: DoesNotFitError) -> Response:
    return await _api_error(request, _too_long(error))


def _too_long(error: DoesNotFitError) -> ApiError:
    return ApiError(400, str(error), "context_length_exceeded", "messages")


async def _client_left(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _internal_error(_request: Request, error: Exception) -> Response:
    log.error("a request failed: %s: %s", type(error).__name__, error)
    return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)
