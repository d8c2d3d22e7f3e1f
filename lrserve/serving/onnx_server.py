"""`lrserve serve OUT --engine onnxruntime`: OpenAI's API for one machine, on onnxruntime-genai (answers.py)."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from lrserve.engines.genai import GenaiEngine
from lrserve.errors import InputError
from lrserve.plugins.versions import require_http
from lrserve.serving.address import bound, warn_if_open
from lrserve.serving.answers import Service
from lrserve.serving.flags import DEFAULT_HOST, DEFAULT_PORT
from lrserve.serving.flags import OWN_KEY_VARIABLE as API_KEY
from lrserve.serving.generation import Piece, Text, checked_graph
from lrserve.serving.openai_api import ApiError, ChatRequest, CompletionRequest, Kind, Reply, parse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

_LARGEST_BODY: Final = 4 * 2**20  # bytes
_MOST_READ: Final = 16 * _LARGEST_BODY  # of a body that is too large, and thrown away
_BODY_SECONDS: Final = 60  # in which it has to come, for it holds a place
_DEFAULT_CONTEXT: Final = 4096  # tokens; the KV cache of an answer is allocated for it where a client sets no limit
_KEEP_ALIVE: Final = 65  # seconds: more than clients keep a connection, or a request could meet its end
_M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h
_LARGE: Final = 128 * 2**10  # bytes
_GRACE_SECONDS: Final = 1  # of answers that are under way when the server is told to end
_GONE: Final = 499  # of answers that nobody waits for

Result = TypeVar("Result")


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know with the list of what it does."""

    def error(self, message: str) -> NoReturn:
        flags = ", ".join(action.option_strings[0] for action in self._actions if action.dest != "help")
        raise InputError(f"serve --engine onnxruntime: {message}; its flags are {flags}")


def parser() -> argparse.ArgumentParser:
    """Return the flags of the server."""

    def whole(least: int, most: int = 2**31) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not text.isdecimal() or not least <= int(text) <= most:
                raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
            return int(text)

        return number

    def key(text: str) -> str:
        if not text:
            raise ValueError
        return text

    flags = _Parser("lrserve serve OUT --engine onnxruntime", allow_abbrev=False, add_help=False)
    flags.add_argument("--host", default=DEFAULT_HOST)
    flags.add_argument("--port", type=whole(0, 2**16 - 1), default=DEFAULT_PORT)
    flags.add_argument("--api-key", type=key, default=os.environ.get(API_KEY) or None)
    flags.add_argument("--served-model-name")
    flags.add_argument("--max-model-len", type=whole(1))
    flags.add_argument("--max-queue", type=whole(0), default=64)
    flags.add_argument("--threads", type=whole(1))
    return flags


def serve(out: str, arguments: Sequence[str] = ()) -> None:
    """Serve the ONNX graph of an artifact until SIGINT or SIGTERM.

    Raises:
        InputError: a wrong flag, or an address that is not free.
        ArtifactError: no graph, or no tokenizer.
        EngineError: a package is missing, or the engine failed.
    """
    flags = parser().parse_args(list(arguments))
    require_http()
    folder, context = checked_graph(Path(os.path.expanduser(out)))
    longest = min(flags.max_model_len or _DEFAULT_CONTEXT, context)
    if (flags.max_model_len or 0) > context:
        raise InputError(f"--max-model-len {flags.max_model_len} is more than the model's context, {context}")
    import uvicorn

    _return_large_blocks()
    with bound(flags.host, flags.port) as address:
        host, port = address.getsockname()[:2]
        warn_if_open(flags.host, port, flags.api_key, "the model", f"Set {API_KEY}")
        text = Text(folder)
        with GenaiEngine(folder, threads=flags.threads) as engine:
            service = Service(engine, text, flags.served_model_name or out, longest, flags.max_queue, flags.api_key)

            class Server(uvicorn.Server):
                """Answers every client before it ends."""

                def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                    service.end()
                    super().handle_exit(sig, frame)

            # h11 bounds a request's head, whatever other parser is installed; there are no web sockets here
            limits: dict[str, Any] = {
                "http": "h11",
                "ws": "none",
                "timeout_keep_alive": _KEEP_ALIVE,
                "timeout_graceful_shutdown": _GRACE_SECONDS,
            }
            server = Server(uvicorn.Config(build_app(service), server_header=False, **limits))
            service.on_failure = lambda: setattr(server, "should_exit", True)
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {service.model} on http://{shown}:{port}, one answer at a time", file=sys.stderr, flush=True)
            with suppress(KeyboardInterrupt):  # uvicorn ends in order, and then raises the signal again
                server.run(sockets=[address])
            if service.failure is not None:
                raise service.failure


def _return_large_blocks() -> None:
    """Let malloc give the memory of large bodies back to the system.

    glibc keeps blocks up to the size of the largest that was freed, 32 MB at most, unless it is told what is large. Other libraries
    of C have no such function.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def build_app(service: Service) -> Starlette:
    """Return the HTTP application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    class Events(StreamingResponse):
        """Ends the generator and gives back the place with the response, also where a slow client goes away between two events."""

        def __init__(self, events: AsyncGenerator[str], place: ExitStack) -> None:
            super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            self._place = place

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with self._place:
                async with aclosing(self.body_iterator):  # type: ignore[type-var]
                    await super().__call__(scope, receive, send)

    async def health(http: HttpRequest) -> Response:
        return Response(status_code=503 if service.failure else 200)

    async def models(http: HttpRequest) -> Response:
        service.authorize(http.headers.get("authorization", ""))
        card = {"id": service.model, "object": "model", "created": 0, "owned_by": "lrserve", "max_model_len": service.context}
        return JSONResponse({"object": "list", "data": [card]})

    async def chat(http: HttpRequest) -> Response:
        return await complete(http, ChatRequest)

    async def completion(http: HttpRequest) -> Response:
        return await complete(http, CompletionRequest)

    async def complete(http: HttpRequest, kind: type[Kind]) -> Response:
        service.authorize(http.headers.get("authorization", ""))
        with ExitStack() as stack:
            stack.enter_context(service.place())
            request = parse(kind, await _body(http))
            prompt = await run_in_threadpool(service.prompt_of, request)
            sampling = service.sampling_of(request, len(prompt))
            reply = Reply(chat=kind is ChatRequest, identifier=uuid.uuid4().hex, model=service.model)
            pieces = service.answer(prompt, sampling, request.stop)
            if request.stream:
                first = await _while_connected(http, anext(pieces))  # so that what goes wrong before it has a status
                events = _events(first, pieces, reply, len(prompt), with_usage=request.with_usage)
                return Events(events, stack.pop_all())
            said = await _while_connected(http, _collect(pieces))
            last = said[-1].finish or "length"
            tokens = sum(piece.tokens for piece in said)
            return JSONResponse(reply.whole("".join(piece.text for piece in said), last, len(prompt), tokens))

    async def refused(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, ApiError):
            return JSONResponse(error.body, error.status, error.headers)
        if isinstance(error, HTTPException):
            shown = ApiError(error.status_code, f"{http.method} {http.url.path[:100]}: {error.detail}")
            return JSONResponse(shown.body, shown.status, error.headers)
        return Response(status_code=_GONE)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((ApiError, HTTPException, ClientDisconnect), refused))


async def _body(http: HttpRequest) -> bytes:
    """Read a request's body, as long as it is JSON, comes soon and is not too large."""
    sent_as = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent_as != "application/json":  # what a page in a browser may not send to another host by itself
        raise ApiError(400, f"Content-Type is {sent_as[:100] or 'missing'}; send JSON as application/json")

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for part in http.stream():  # to the end, for who is still sending would not see the answer
            size += len(part)
            if size <= _LARGEST_BODY:
                body += part
            elif size > _MOST_READ:
                break
        if size > _LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {_LARGEST_BODY} bytes", code="request_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body has not come within {_BODY_SECONDS} s", headers={"Connection": "close"}) from None
    except asyncio.CancelledError:  # by uvicorn, whose patience has ended
        raise ApiError(503, "the server is ending") from None


async def _while_connected(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """Wait for something, and cancel it when the client goes away."""
    from starlette.requests import ClientDisconnect

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(pieces: AsyncGenerator[Piece]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece], reply: Reply, prompt_tokens: int, *, with_usage: bool
) -> AsyncGenerator[str]:
    """Yield the events of a stream, one for each token."""
    async with aclosing(pieces):
        yield _event(reply.chunk(first.text, first.finish, first=True))
        tokens = first.tokens
        try:
            async for piece in pieces:
                tokens += piece.tokens
                yield _event(reply.chunk(piece.text, piece.finish, first=False))
        except ApiError as error:  # its status is sent already
            yield _event(error.body)
        else:
            if with_usage:
                yield _event(reply.last_chunk(prompt_tokens, tokens))
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
