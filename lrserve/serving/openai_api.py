"""OpenAI's API as far as `lrserve serve --engine onnxruntime` has it: requests, and the objects of answers and errors.

What would change an answer and is not supported is refused, unless it has the value that changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lrserve.engines.sampling import Finish

_MOST_STOPS: Final = 16
_LONGEST_NAME: Final = 50  # of a parameter in an error
_LONGEST_MESSAGE: Final = 300  # characters of an error, which may quote what a client sent

_NEUTRAL: Final[Mapping[str, Sequence[Any]]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
}
"""Parameters that are not supported, and their values that change nothing; null never does."""

_IGNORED: Final = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Parameters that change no answer."""


class ApiError(Exception):
    """A request that is refused; `body` is OpenAI's error object, with a message of one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = " ".join(message[: 4 * _LONGEST_MESSAGE].split())[:_LONGEST_MESSAGE]
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > _MOST_STOPS:
        raise ValueError(f"must be a text or a list of at most {_MOST_STOPS} texts, none of them empty")
    return stops


def _content(value: Any) -> Any:
    if isinstance(value, str):
        return value
    texts: list[str] = []
    for part in value if isinstance(value, list) else [None]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("must be a text or a list of parts of type text")
        texts.append(part["text"])
    return "".join(texts)


def _prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(token) is int for token in value)):
        return value
    raise ValueError("must be one text or one list of token ids; send several prompts as several requests")


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        kept = {}
        for name, value in data.items():
            if name in _NEUTRAL and name not in cls.model_fields:
                if value is not None and value not in _NEUTRAL[name]:
                    raise ValueError(f"{name} is not supported, except {_shown(_NEUTRAL[name])}; leave it out")
            elif name not in _IGNORED:
                kept[name] = value
        return kept

    @property
    def tokens_asked(self) -> int | None:
        """Most tokens of the answer, None where the client leaves it to the server."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def tokens_asked(self) -> int | None:
        """As of `Request`; the newer name wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]

    @property
    def tokens_asked(self) -> int | None:
        """As of `Request`, and 16 where nothing is said, as OpenAI has it."""
        return self.max_tokens or 16


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Return the request in a body.

    Raises:
        ApiError: 400, with what is wrong in one line.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:_LONGEST_NAME] for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "there is no such parameter here; leave it out"
        raise ApiError(400, f"{place}: {message}" if place else message, param=place or None) from None


def _shown(values: Sequence[Any]) -> str:
    return " or ".join(map(repr, values))


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return the object that counts tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Reply:
    """The objects that answer one request.

    Args:
        chat: of a chat completion, or else of a completion.
        identifier: names the answer.
        model: the served model's name.
    """

    def __init__(self, *, chat: bool, identifier: str, model: str) -> None:
        self._chat, self._created, self._model = chat, int(time.time()), model
        self._identifier = f"{'chatcmpl' if chat else 'cmpl'}-{identifier}"

    def whole(self, text: str, finish: Finish, prompt: int, answer: int) -> dict[str, Any]:
        """Return the whole answer."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._object("chat.completion", [self._choice(said, finish)]), "usage": usage(prompt, answer)}

    def chunk(self, text: str, finish: Finish | None, *, first: bool) -> dict[str, Any]:
        """Return a piece of a stream."""
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": text}} if self._chat else {"text": text}
        return self._object("chat.completion.chunk", [self._choice(said, finish)])

    def last_chunk(self, prompt: int, answer: int) -> dict[str, Any]:
        """Return the piece with the usage, which ends a stream."""
        return {**self._object("chat.completion.chunk", []), "usage": usage(prompt, answer)}

    def _choice(self, said: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        kind = kind if self._chat else "text_completion"
        return {"id": self._identifier, "object": kind, "created": self._created, "model": self._model, "choices": choices}
