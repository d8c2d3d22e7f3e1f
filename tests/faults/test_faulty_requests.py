"""Requests that no client should send, to `lrserve serve --engine onnxruntime`: one line and a status below 500, and it goes on."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving.tiny_graph import CONTEXT, greedy, running, write_graph

LONGEST = 400  # characters of an error that a client still reads
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
HELLO: dict[str, Any] = {"prompt": "Hello there", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
SAY: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@dataclass(frozen=True)
class Wrong:
    """One row: a request, the status of its answer, and what the answer's line must contain."""

    name: str
    body: Any
    status: int
    line: str
    path: str = COMPLETION
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)

    def __str__(self) -> str:
        return self.name


def hello(**changes: Any) -> dict[str, Any]:
    return {**HELLO, **changes}


def says(content: Any, **changes: Any) -> dict[str, Any]:
    return {**SAY, "messages": [{"role": "user", "content": content}], **changes}


def raw(text: str) -> bytes:
    """A body with one more member than HELLO, written as it stands."""
    return (json.dumps(HELLO)[:-1] + ", " + text + "}").encode()


NOT_JSON = [
    Wrong("nothing", b"", 400, "Invalid JSON"),
    Wrong("text", b"Hello there", 400, "Invalid JSON"),
    Wrong("half", b'{"prompt": "a', 400, "Invalid JSON"),
    Wrong("bytes", bytes(range(256)), 400, "Invalid JSON"),
    Wrong("utf-16", json.dumps(HELLO).encode("utf-16"), 400, "Invalid JSON"),
    Wrong("null", b"null", 400, "must be a JSON object"),
    Wrong("number", b"1e999", 400, "must be a JSON object"),
    Wrong("list", [HELLO], 400, "must be a JSON object"),
    Wrong("lists, deep", b"[" * 500_000, 400, "Invalid JSON"),
    Wrong("objects, deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "Invalid JSON"),
    Wrong("deep in what is ignored", raw('"metadata": ' + "[" * 3000 + "]" * 3000), 400, "Invalid JSON"),
    Wrong("lone surrogate", rb'{"prompt": "\ud83d"}', 400, "Invalid JSON"),
    Wrong("form", b"prompt=a", 400, "Content-Type is application/x-www-form-urlencoded; send JSON", headers={}),
    Wrong("text/plain", HELLO, 400, "Content-Type is text/plain", headers={"Content-Type": "text/plain"}),
    Wrong("long type", HELLO, 400, "Content-Type is xxx", headers={"Content-Type": "x" * 5000}),
    Wrong("10 MB of text", b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "larger than 4194304 bytes"),
    Wrong("10 MB of tokens", b'{"prompt": [' + b"1," * 5_000_000 + b"1]}", 413, "larger than"),
    Wrong("10 MB of messages", {"messages": SAY["messages"] * 300_000}, 413, "larger than", CHAT),
]
WRONG_TYPES = [
    Wrong(f"{name} {value!r:.20}", hello(**{name: value}), 400, name)
    for name, values in {
        "prompt": (None, 5, 1.5, True, {}, [], [""] * 2, [True], [1.5], [[1], [2]], [None], ["a", 1], {"a": "b"}),
        "max_tokens": ("8", 1.5, True, [], {}, 0, -1),
        "temperature": ("0", True, [], -0.1, 2.5, 1e308),
        "top_p": ("1", True, [], 0, -1, 1.1),
        "seed": ("1", 1.5, True, [], {}),
        "stop": (5, [5], [None], "", [""], ["a"] * 17, {}),
        "stream": ("yes", 1, [], {}),
        "stream_options": (True, [], {"include_usage": "often"}, {"more": 1}),
        "ignore_eos": ("yes", 2, []),
        "model": (5, True, [], {}),
    }.items()
    for value in values
]
NUMBERS = [
    Wrong("n huge", hello(n=10**9), 400, "n is not supported, except 1"),
    Wrong("n negative", hello(n=-1), 400, "n is not supported"),
    Wrong("n a list", hello(n=[1]), 400, "n is not supported"),
    Wrong("best_of", hello(best_of=10**9), 400, "best_of is not supported"),
    Wrong("max_tokens huge", hello(max_tokens=10**30), 400, "more than this server's context of 512 tokens"),
    Wrong("max_tokens of 5,000 digits", raw('"max_tokens": ' + "9" * 5000), 400, ""),
    Wrong("max_tokens of 4 MB", raw('"max_tokens": ' + "9" * 4_000_000), 400, ""),
    Wrong("seed of 4 MB", raw('"seed": ' + "9" * 4_000_000), 400, ""),
    Wrong("NaN", raw('"temperature": NaN'), 400, "temperature"),
    Wrong("Infinity", raw('"temperature": Infinity'), 400, "temperature"),
    Wrong("minus Infinity", raw('"top_p": -Infinity'), 400, "top_p"),
    Wrong("1e999", raw('"temperature": 1e999'), 400, "temperature"),
    Wrong("NaN penalty", raw('"presence_penalty": NaN'), 400, "presence_penalty is not supported"),
    Wrong("token out of range", hello(prompt=[256]), 400, "token ids are from 0 to 255"),
    Wrong("token negative", hello(prompt=[-1]), 400, "token ids are from 0 to 255"),
    Wrong("token huge", hello(prompt=[2**64]), 400, "token ids are from 0 to 255"),
    Wrong("prompt too long", hello(prompt="a" * 100_000), 400, "more than this server's context"),
    Wrong("prompt of many tokens", hello(prompt=[5] * 1_000_000), 400, "more than this server's context"),
]
MESSAGES = [
    Wrong(f"messages {value!r:.30}", {**SAY, "messages": value}, 400, "messages", CHAT)
    for value in (None, 5, "a", [], {}, [5], [None], [[]], [{}], [{"role": "user"}], [{"content": "a"}])
] + [
    Wrong("role", {**SAY, "messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", CHAT),
    Wrong("role a list", {**SAY, "messages": [{"role": ["user"], "content": "a"}]}, 400, "messages.0.role", CHAT),
    Wrong("more in a message", {**SAY, "messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages.0.name", CHAT),
    *(
        Wrong(f"content {value!r:.30}", says(value), 400, "messages.0.content", CHAT)
        for value in (None, 5, [5], {}, [{"type": "image_url"}])
    ),
    Wrong("refused by the template", says("no"), 400, "chat template refuses the messages: not this", CHAT),
    Wrong("too long", says("a" * 10_000), 400, "more than this server's context", CHAT),
    Wrong("tools", {**SAY, "tools": [{"type": "function"}]}, 400, "tools is not supported", CHAT),
    Wrong("a completion", HELLO, 400, "messages: Field required", CHAT),
]
NAMES = [
    Wrong("unknown model", hello(model="other"), 404, "the model 'other' does not exist; this server has 'tiny'"),
    Wrong("long model", hello(model="m" * 1_000_000), 404, "does not exist"),
    Wrong("model of two lines", hello(model="a\nb"), 404, "does not exist"),
    Wrong("unknown parameter", hello(tempertaure=1), 400, "tempertaure: there is no such parameter"),
    Wrong("long parameter", hello(**{"x" * 1_000_000: 1}), 400, "there is no such parameter"),
    Wrong("parameter of two lines", hello(**{"a\nb": 1}), 400, "there is no such parameter"),
    Wrong("many parameters", hello(**{f"p{i}": i for i in range(100_000)}), 400, "there is no such parameter"),
    Wrong("unknown path", HELLO, 404, "/v1/embeddings", "/v1/embeddings"),
    Wrong("path outside", HELLO, 404, "Not Found", "/v1/%2e%2e/%2e%2e/etc/passwd"),
    Wrong("long path", HELLO, 404, "Not Found", "/" + "x" * 5000),
    Wrong("GET", None, 405, "/v1/completions: Method Not Allowed", method="GET"),
    Wrong("DELETE", None, 405, "Method Not Allowed", method="DELETE"),
    Wrong("POST to GET", HELLO, 405, "/health", "/health"),
]
REQUESTS = [*NOT_JSON, *WRONG_TYPES, *NUMBERS, *MESSAGES, *NAMES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return write_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def server(tiny: tuple[Any, Path]) -> Iterator[str]:
    """The address of a server, which in the end answers as at first and has no traceback in its log."""
    log = tiny[1].parent / "log"
    flags = ("--served-model-name", "tiny", "--max-model-len", "512", "--max-queue", "4")
    with running(tiny[1], log, *flags) as (process, url):
        yield url
        assert httpx.post(url + COMPLETION, json=HELLO).json()["choices"][0]["text"] == greedy(tiny[0], "Hello there", 8)
        assert process.poll() is None
        assert "Traceback" not in log.read_text()


def body_of(wrong: Wrong) -> bytes | None:
    return wrong.body if wrong.body is None or isinstance(wrong.body, bytes) else json.dumps(wrong.body).encode()


@pytest.mark.parametrize("wrong", REQUESTS, ids=str)
def test_a_request_is_refused_in_one_line(server: str, wrong: Wrong) -> None:
    headers = wrong.headers or {"Content-Type": "application/x-www-form-urlencoded"}
    answered = httpx.request(wrong.method, server + wrong.path, content=body_of(wrong), headers=dict(headers), timeout=20)
    error = answered.json()["error"]
    assert answered.status_code == wrong.status, error
    assert wrong.line in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert len(answered.text) <= 2 * LONGEST


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1e-320},
        {"temperature": 1e-9},
        {"temperature": 2, "top_p": 1e-320},
        {"temperature": 1, "seed": -(10**30)},
        {"temperature": 1, "seed": 2**63},
        {"stop": ["\x00", "x" * 1_000_000]},
        {"prompt": "\x00\u202e\U0001f600" * 20},
        {"prompt": [0] * 100},
        {"metadata": {"a": "b" * 100_000}, "user": ["whatever"]},
    ],
)
def test_what_is_odd_and_allowed_is_answered(server: str, changes: dict[str, Any]) -> None:
    answered = httpx.post(server + COMPLETION, json=hello(**changes), timeout=20)
    assert answered.status_code == 200, answered.text
    assert answered.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"Hello there\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"x" * 10_000_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 10_000_000,
    ],
    ids=["tls", "no-http", "no-version", "length-negative", "length-twice", "chunk", "head-10-mb", "path-10-mb"],
)
def test_what_is_no_http_is_refused(server: str, sent: bytes) -> None:
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        answer = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert httpx.get(server + "/health").status_code == 200


def test_clients_that_go_away_leave_their_places(server: str) -> None:
    """In a body, before an answer, and in a stream."""
    address = urlsplit(server)
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    whole = json.dumps(hello(max_tokens=400, stream=True)).encode()
    for sent in (head.format(1000).encode(), head.format(1000).encode() + b'{"prompt"', head.format(len(whole)).encode() + whole):
        for _ in range(12):  # more than there are places
            with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
                connection.sendall(sent)
                if sent.endswith(whole):
                    connection.recv(1)
        deadline = time.monotonic() + 20
        while (answered := httpx.post(server + COMPLETION, json=HELLO, timeout=20)).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert answered.status_code == 200


def test_what_waits_has_a_bound_in_bodies_too(server: str) -> None:
    """Clients that send half of a body hold places; one more is told to come again."""
    address = urlsplit(server)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20)).sendall(head)
        deadline = time.monotonic() + 20
        while (answered := httpx.post(server + COMPLETION, json=HELLO, timeout=20)).status_code == 200:
            assert time.monotonic() < deadline
        assert (answered.status_code, answered.headers["Retry-After"]) == (503, "5")
        assert answered.json()["error"]["code"] == "queue_full"
        assert httpx.get(server + "/health").status_code == 200


def test_ctrl_c_ends_it_within_seconds_whatever_clients_do(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    with (
        running(tiny[1], tmp_path / "log", "--max-model-len", str(CONTEXT), "--max-queue", "8") as (process, url),
        ExitStack() as stack,
    ):
        address = urlsplit(url)
        body = json.dumps(hello(max_tokens=CONTEXT - 100, stream=True)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        for length, sent in ((len(body), body), (1000, b"{"), (len(body), body), (1000, b"")):  # one is answered, three wait
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20))
            connection.sendall(head.format(length).encode() + sent)
        stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20))
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 15  # beside other tests; alone it takes two
    assert "Traceback" not in (tmp_path / "log").read_text()
