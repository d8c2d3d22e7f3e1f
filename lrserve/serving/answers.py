"""The queue of `lrserve serve OUT --engine onnxruntime`: requests in, answers out, one after the other.

onnxruntime-genai computes one batch from beginning to end on a CPU, so requests wait in a queue and are answered one by one. One
thread drives the engine's process; clients are served by asyncio, and each gets its answer through a queue of its own. When a
client goes away, its request is marked as cancelled, which the thread sees before the next token.
"""

from __future__ import annotations

import asyncio
import hmac
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from lrserve.engines.genai import GenaiEngine
from lrserve.engines.sampling import Sampling
from lrserve.errors import EngineError, InputError, LrserveError
from lrserve.serving.generation import Piece, Text, answer
from lrserve.serving.openai_api import ApiError, ChatRequest, CompletionRequest, Request

_RETRY_SECONDS: Final = 5


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
        most_waiting: requests that may wait for another one's end, from their first byte to their last.
        api_key: what clients must show; None is no key.
    """

    def __init__(self, engine: GenaiEngine, text: Text, model: str, context: int, most_waiting: int, api_key: str | None) -> None:
        self.text, self.model, self.context = text, model, context
        self.failure: LrserveError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._engine, self._most_waiting, self._api_key = engine, most_waiting, api_key
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._live: set[_Job] = set()
        self._places = 0
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
            message = f"the model {request.model[:100]!r} does not exist; this server has {self.model!r}"
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

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a request, so that what all clients send together has a bound too.

        Raises:
            ApiError: there is none.
        """
        if self._places > self._most_waiting:
            message = f"{self._most_waiting} requests are waiting already"
            raise ApiError(503, message, code="queue_full", headers={"Retry-After": str(_RETRY_SECONDS)})
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def answer(self, prompt: Sequence[int], sampling: Sampling, stop: Sequence[str]) -> AsyncGenerator[Piece]:
        """Yield an answer; whoever closes the generator, or is cancelled in it, cancels the request.

        Raises:
            ApiError: the engine failed, or the server ends.
        """
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
