"""`lrserve serve OUT --engine onnxruntime`: OpenAI's API for one machine, on onnxruntime-genai.

onnxruntime-genai computes one batch from beginning to end on a CPU, so requests wait in a queue and are answered one by one. One
thread drives the engine's process; clients are served by asyncio, and each gets its answer through a queue of its own. When a
client goes away, its request is marked as cancelled, which the thread sees before the next token.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import queue
import socket
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from lrserve.engines.genai import GenaiEngine
from lrserve.engines.sampling import Sampling
from lrserve.errors import EngineError, InputError, LrserveError
from lrserve.plugins.versions import require_http
from lrserve.serving.generation import Piece, Text, answer, checked_graph
from lrserve.serving.openai_api import ApiError, ChatRequest, CompletionRequest, Kind, Reply, Request, parse
from lrserve.serving.server import DEFAULT_HOST

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

API_KEY: Final = "LRSERVE_API_KEY"
_LARGEST_BODY: Final = 4 * 2**20  # bytes
_DEFAULT_CONTEXT: Final = 4096  # tokens; the KV cache of an answer is allocated for it where a client sets no limit
_GRACE_SECONDS: Final = 1  # of answers that are under way when the server is told to end
_RETRY_SECONDS: Final = 5
_GONE: Final = 499  # of answers that nobody waits for

Result = TypeVar("Result")


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know with the list of what it does."""

    def error(self, message: str) -> NoReturn:
        flags = ", ".join(action.option_strings[0] for action in self._actions if action.dest != "help")
        raise InputError(f"serve --engine onnxruntime: {message}; its flags are {flags}")


def parser() -> argparse.ArgumentParser:
    """Return the flags of the server."""

    def positive(text: str) -> int:
        number = int(text)
        if number < 1:
            raise ValueError
        return number

    def port(text: str) -> int:
        number = int(text)
        if not 0 <= number < 2**16:
            raise ValueError
        return number

    def count(text: str) -> int:
        number = int(text)
        if number < 0:
            raise ValueError
        return number

    def key(text: str) -> str:
        if not text:
            raise ValueError
        return text

    flags = _Parser("lrserve serve OUT --engine onnxruntime", allow_abbrev=False, add_help=False)
    flags.add_argument("--host", default=DEFAULT_HOST)
    flags.add_argument("--port", type=port, default=8000)
    flags.add_argument("--api-key", type=key, default=os.environ.get(API_KEY) or None)
    flags.add_argument("--served-model-name")
    flags.add_argument("--max-model-len", type=positive)
    flags.add_argument("--max-queue", type=count, default=64)
    flags.add_argument("--threads", type=positive)
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

    text = Text(folder)
    with _bound(flags.host, flags.port) as address, GenaiEngine(folder, threads=flags.threads) as engine:
        service = Service(engine, text, flags.served_model_name or out, longest, flags.max_queue, flags.api_key)
        app = build_app(service)

        class Server(uvicorn.Server):
            """Answers every client before it ends."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                service.end()
                super().handle_exit(sig, frame)

        server = Server(uvicorn.Config(app, timeout_graceful_shutdown=_GRACE_SECONDS, server_header=False))
        service.on_failure = lambda: setattr(server, "should_exit", True)
        host, port = address.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {service.model} on http://{shown}:{port}, one answer at a time", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn ends in order, and then raises the signal again
            server.run(sockets=[address])
        if service.failure is not None:
            raise service.failure


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, before minutes of loading; it listens once the server is ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); give another --host or --port") from error
    return bound


@dataclass(eq=False)
class _Job:
    """A request in the queue; `pieces` takes what is generated, and in the end None or what went wrong."""

    prompt: Sequence[int]
    sampling: Sampling
    stop: Sequence[str]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | ApiError | None] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def tell(self, piece: Piece | ApiError | None) -> None:
        """Give the client something, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Service:
    """The engine behind a queue.

    Args:
        engine: running.
        text: the model's tokenizer.
        model: the name by which clients call it.
        context: most tokens of a prompt and its answer.
        most_waiting: requests that may wait for another one's end.
        api_key: what clients must show; None is no key.
    """

    def __init__(self, engine: GenaiEngine, text: Text, model: str, context: int, most_waiting: int, api_key: str | None) -> None:
        self.text, self.model, self.context = text, model, context
        self.failure: LrserveError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._engine, self._most_waiting, self._api_key = engine, most_waiting, api_key
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._live: set[_Job] = set()
        self._ended = False
        threading.Thread(target=self._work, daemon=True).start()

    def authorize(self, header: str) -> None:
        """Check an Authorization header.

        Raises:
            ApiError: 401.
        """
        if self._api_key is None:
            return
        scheme, _, shown = header.partition(" ")
        fits = hmac.compare_digest(shown.encode("latin-1"), self._api_key.encode())  # headers arrive as bytes
        if scheme.lower() != "bearer" or not fits:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def prompt_of(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt.

        Raises:
            ApiError: another model, or a prompt that cannot be used.
        """
        if request.model not in (None, self.model):
            message = f"the model {request.model!r} does not exist; this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, ChatRequest):
                tokens = self.text.encode_chat([message.model_dump() for message in request.messages])
            elif isinstance(request, CompletionRequest):
                tokens = self.text.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
        except InputError as error:
            raise ApiError(400, str(error), param=param) from None
        if not tokens:
            raise ApiError(400, f"{param}: there are no tokens in it", param=param)
        if not all(0 <= token < self.text.vocabulary for token in tokens):
            raise ApiError(400, f"{param}: token ids are from 0 to {self.text.vocabulary - 1}", param=param)
        return tokens

    def sampling_of(self, request: Request, prompt_tokens: int) -> Sampling:
        """Return how to sample.

        Raises:
            ApiError: prompt and answer do not fit into the context.
        """
        left = self.context - prompt_tokens
        asked = request.tokens_asked
        if left < 1 or (asked or 0) > left:
            wanted = f" and {asked} of the answer" if asked else ""
            message = f"{prompt_tokens} tokens of the prompt{wanted} are more than this server's context of {self.context} tokens"
            raise ApiError(400, message, code="context_length_exceeded")
        return Sampling(
            max_tokens=asked or left,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            ignore_eos=bool(request.ignore_eos),
        )

    async def answer(self, prompt: Sequence[int], sampling: Sampling, stop: Sequence[str]) -> AsyncGenerator[Piece]:
        """Yield an answer; whoever closes the generator, or is cancelled in it, cancels the request.

        Raises:
            ApiError: the queue is full, or the engine failed.
        """
        if len(self._live) > self._most_waiting:
            message = f"{self._most_waiting} requests are waiting already"
            raise ApiError(503, message, code="queue_full", headers={"Retry-After": str(_RETRY_SECONDS)})
        job = _Job(prompt, sampling, stop, asyncio.get_running_loop())
        self._live.add(job)
        self._jobs.put(job)
        try:
            while (piece := await job.pieces.get()) is not None:
                if isinstance(piece, ApiError):
                    raise piece
                yield piece
        finally:
            job.cancelled = True
            self._live.discard(job)

    def end(self) -> None:
        """Tell all clients that the server ends; may be called by a signal handler."""
        self._ended = True
        for job in list(self._live):
            job.cancelled = True
            job.tell(ApiError(503, "the server is ending"))

    def _work(self) -> None:
        """Answer one request after the other."""
        while True:
            job = self._jobs.get()
            try:
                if not job.cancelled:
                    self._run(job)
                job.tell(None)
            except Exception as error:  # whatever it is, the client waits
                if not self._ended:
                    self._note(error)
                job.tell(ApiError(500, "the engine failed; the server's log says more"))

    def _note(self, error: Exception) -> None:
        """Say what went wrong, and end the server if the engine has ended."""
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not self._engine.running:
            self.failure = error if isinstance(error, LrserveError) else EngineError(f"the engine has ended: {error}")
            self.on_failure()

    def _run(self, job: _Job) -> None:
        with closing(answer(self._engine, self.text.decode, job.prompt, job.sampling, job.stop)) as pieces:
            for piece in pieces:
                if job.cancelled:
                    return
                if piece.tokens:
                    job.tell(piece)


def build_app(service: Service) -> Starlette:
    """Return the HTTP application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    class Events(StreamingResponse):
        """Ends the generator with the response, also where the client is slow and goes away between two events."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
        request = parse(kind, await _body(http))
        prompt = await run_in_threadpool(service.prompt_of, request)
        sampling = service.sampling_of(request, len(prompt))
        reply = Reply(chat=kind is ChatRequest, identifier=uuid.uuid4().hex, model=service.model)
        pieces = service.answer(prompt, sampling, request.stop)
        if request.stream:
            first = await _while_connected(http, anext(pieces))  # so that what goes wrong before it has a status
            events = _events(first, pieces, reply, len(prompt), with_usage=request.with_usage)
            return Events(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        said = await _while_connected(http, _collect(pieces))
        last = said[-1].finish or "length"
        tokens = sum(piece.tokens for piece in said)
        return JSONResponse(reply.whole("".join(piece.text for piece in said), last, len(prompt), tokens))

    async def refused(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, ApiError):
            return JSONResponse(error.body, error.status, error.headers)
        if isinstance(error, HTTPException):
            shown = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
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
    """Read a request's body, as long as it is not too large."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > _LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {_LARGEST_BODY} bytes", code="request_too_large")
    return bytes(body)


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
