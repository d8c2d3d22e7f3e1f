"""The server of an ONNX graph: real requests to a process of its own, and its queue around an engine that never ends."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI
from serving.tiny_graph import CONTEXT, chat_prompt, greedy, running, tokenizer, write_graph

from lrserve.engines.sampling import Sampling, Step
from lrserve.errors import ArtifactError, EngineError, InputError
from lrserve.serving.answers import Service
from lrserve.serving.onnx_server import build_app, parser, serve


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return write_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def server(tiny: tuple[Any, Path]) -> Iterator[str]:
    with running(tiny[1], tiny[1].parent / "log", "--served-model-name", "tiny", "--max-model-len", "512") as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0, timeout=60)


GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


def complete(client: OpenAI, prompt: str, tokens: int, **options: Any) -> Any:
    return client.completions.create(prompt=prompt, max_tokens=tokens, **{**GREEDY, **options})


def chat(client: OpenAI, content: Any, tokens: int, **options: Any) -> Any:
    return client.chat.completions.create(
        messages=[{"role": "user", "content": content}], max_completion_tokens=tokens, **{**GREEDY, **options}
    )


def test_answers_are_those_of_transformers(tiny: tuple[Any, Path], client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = complete(client, "Hello there", 24)
    assert (made.object, made.model, made.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert made.choices[0].text == greedy(tiny[0], "Hello there", 24)
    assert made.usage.model_dump(exclude_none=True) == {"prompt_tokens": 12, "completion_tokens": 24, "total_tokens": 36}
    said = chat(client, "Hello there", 24)
    assert (said.object, said.choices[0].message.role) == ("chat.completion", "assistant")
    assert said.choices[0].message.content == greedy(tiny[0], chat_prompt("Hello there"), 24, bos=False)
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert chat(client, parts, 24).choices[0].message == said.choices[0].message
    ids = tokenizer()("Hello there")["input_ids"]
    for prompt in (ids, [ids], ["Hello there"]):
        assert complete(client, prompt, 24).choices[0].text == made.choices[0].text  # type: ignore[arg-type]
    assert complete(client, "Hello there", None).usage.completion_tokens == 16  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [None, 1])
def test_a_stream_is_the_same_answer_in_pieces(tiny: tuple[Any, Path], client: OpenAI, stop: int | None) -> None:
    texts = {}
    for ask, prompt in ((complete, "Tell me"), (chat, "Tell me")):
        options: dict[str, Any] = {"stop": next(iter(texts.values()))[9:11]} if stop and texts else {}
        whole = ask(client, prompt, 60, **options)
        events = list(ask(client, prompt, 60, stream=True, stream_options={"include_usage": True}, **options))
        *pieces, last = events
        assert last.choices == []
        assert last.usage == whole.usage
        assert {event.id for event in events} == {last.id}
        choices = [piece.choices[0] for piece in pieces]
        assert len(choices) == whole.usage.completion_tokens
        if ask is complete:
            text, streamed = whole.choices[0].text, "".join(choice.text for choice in choices)
        else:
            text, streamed = whole.choices[0].message.content, "".join(choice.delta.content for choice in choices)
            assert choices[0].delta.role == "assistant"
        assert text == streamed
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]
        texts[ask] = text


def test_a_stop_string_ends_the_answer_before_it(tiny: tuple[Any, Path], client: OpenAI) -> None:
    text = complete(client, "Hello there", 40).choices[0].text
    place = next(place for place in range(8, 30) if "\ufffd" not in text[place : place + 4])
    stop = text[place : place + 4]
    for stops in (stop, ["not in it", stop]):
        made = complete(client, "Hello there", 40, stop=stops)
        assert made.choices[0].text == text.partition(stop)[0]
        assert made.choices[0].finish_reason == "stop"
        assert 0 < made.usage.completion_tokens < 40
        streamed = complete(client, "Hello there", 40, stop=stops, stream=True)
        assert "".join(event.choices[0].text for event in streamed) == made.choices[0].text


def test_a_seed_makes_draws_again(client: OpenAI) -> None:
    def drawn(**options: Any) -> str:
        text: str = complete(client, "Hello there", 24, **{"temperature": 1.5, **options}).choices[0].text
        return text

    assert drawn(seed=3) == drawn(seed=3)
    assert len({drawn(seed=1), drawn(seed=2), drawn(), drawn()}) == 4
    assert drawn(seed=1, top_p=1e-6) == drawn(seed=2, top_p=1e-6) == drawn(temperature=0)


def test_twenty_requests_at_once_are_answered_as_one_by_one(client: OpenAI) -> None:
    prompts = [f"Number {index} of many" for index in range(20)]

    def ask(prompt: str) -> str:
        if prompt.startswith("Number 1"):
            return "".join(event.choices[0].text for event in complete(client, prompt, 16, stream=True))
        text: str = complete(client, prompt, 16).choices[0].text
        return text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert len(set(alone)) > 10


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
WRONG: list[tuple[str, Any, int, str]] = [
    (COMPLETION, b"{", 400, "Invalid JSON"),
    (COMPLETION, b"", 400, "Invalid JSON"),
    (COMPLETION, b"[]", 400, "JSON object"),
    (COMPLETION, b'{"prompt": "\xff"}', 400, "Invalid JSON"),
    (COMPLETION, b"[" * 100_000, 400, "Invalid JSON"),
    (COMPLETION, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    (COMPLETION, {}, 400, "prompt: Field required"),
    (COMPLETION, {"prompt": 5}, 400, "prompt: must be one text"),
    (COMPLETION, {"prompt": ["a", "b"]}, 400, "several prompts as several requests"),
    (COMPLETION, {"prompt": []}, 400, "prompt: must be one text"),
    (COMPLETION, {"prompt": [1, "a"]}, 400, "prompt: must be one text"),
    (COMPLETION, {"prompt": [256]}, 400, "token ids are from 0 to 255"),
    (COMPLETION, {"prompt": [-1]}, 400, "token ids are from 0 to 255"),
    (COMPLETION, {"prompt": "a" * 600}, 400, "601 tokens of the prompt and 16 of the answer are more than"),
    (COMPLETION, {"prompt": "a", "max_tokens": 10**30}, 400, "more than this server's context of 512 tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 1"),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens: Input should be a valid integer"),
    (COMPLETION, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    (COMPLETION, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    (COMPLETION, {"prompt": "a", "seed": "x"}, 400, "seed"),
    (COMPLETION, {"prompt": "a", "stream": "yes"}, 400, "stream"),
    (COMPLETION, {"prompt": "a", "stop": ""}, 400, "stop: must be a text or a list"),
    (COMPLETION, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop: must be a text or a list"),
    (COMPLETION, {"prompt": "a", "n": 10**9}, 400, "n is not supported, except 1"),
    (COMPLETION, {"prompt": "a", "logprobs": 5}, 400, "logprobs is not supported"),
    (COMPLETION, {"prompt": "a", "echo": True}, 400, "echo is not supported"),
    (COMPLETION, {"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
    (COMPLETION, {"prompt": "a", "tempertaure": 1}, 400, "tempertaure: there is no such parameter"),
    (COMPLETION, {"prompt": "a", "model": "other"}, 404, "the model 'other' does not exist; this server has 'tiny'"),
    (COMPLETION, b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "the body is larger than"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": "no"}]}, 400, "chat template refuses the messages: not this"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/embeddings", {}, 404, "/v1/embeddings"),
    ("/health", {}, 405, "/health"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), WRONG)
def test_a_wrong_request_is_refused_in_one_line(server: str, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answered = httpx.post(server + path, content=content, headers={"Content-Type": "application/json"})
    error = answered.json()["error"]
    assert answered.status_code == status, error
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted(server: str) -> None:
    body = {
        "prompt": "a",
        "n": 1,
        "logprobs": None,
        "repetition_penalty": 1.0,
        "tools": [],
        "user": "me",
        "model": None,
        "stop": None,
    }
    answered = httpx.post(server + COMPLETION, json={**body, "max_tokens": 1})
    assert answered.status_code == 200, answered.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_the_middle_of_an_answer(tiny: tuple[Any, Path], tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    with running(tiny[1], log, "--api-key", "secret", "--max-model-len", str(CONTEXT)) as (process, url):
        body = {"prompt": "a", "max_tokens": CONTEXT - 10, "stream": True, "ignore_eos": True}
        assert httpx.post(url + COMPLETION, json=body).status_code == 401
        with (
            httpx.Client(headers={"Authorization": "Bearer secret"}) as http,
            http.stream("POST", url + COMPLETION, json=body) as answered,
        ):
            lines = answered.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            began = time.monotonic()
            *_, last, end = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is ending"
            assert end == "data: [DONE]"
        code = process.wait(timeout=20)
        assert time.monotonic() - began < 10  # beside other tests; alone it takes one or two
    assert code == (0 if number == signal.SIGINT else 143)
    said = log.read_text()
    assert "Traceback" not in said
    assert "secret" not in said
    assert "error" not in said.lower()


# Around an engine that is not there


class Endless:
    """An engine whose answers end with the client's patience only, or with an error."""

    def __init__(self) -> None:
        self.running, self.begun, self.ended, self.error = True, 0, 0, None

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Step]:
        self.begun += 1
        try:
            for _ in range(sampling.max_tokens):
                if self.error is not None:
                    raise self.error
                time.sleep(0.01)
                yield Step((70,))
            yield Step((71,), "length")
        finally:
            self.ended += 1


class Letters:
    """A tokenizer without templates."""

    vocabulary, has_template = 256, False
    encode = staticmethod(lambda text: list(text.encode()))
    decode = staticmethod(lambda tokens: "".join(map(chr, tokens)))


@contextmanager
def around(engine: Any, most_waiting: int = 4, key: str | None = None) -> Iterator[tuple[Service, str]]:
    service = Service(engine, Letters(), "m", 100_000, most_waiting, key)  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(build_app(service), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 90_000}
SHORT: dict[str, Any] = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_client_that_goes_away_makes_room(stream: bool, waiting: bool) -> None:
    engine = Endless()
    with around(engine, most_waiting=1) as (_, url), ThreadPoolExecutor(4) as pool:
        body = {**LONG, "stream": stream}

        def leave(seconds: float) -> None:
            began = time.monotonic()
            with suppress(httpx.ReadTimeout), httpx.stream("POST", url + COMPLETION, json=body, timeout=seconds) as answered:
                for _ in answered.iter_bytes():
                    if time.monotonic() > began + seconds:
                        return
                pytest.fail("the answer has ended")

        first = pool.submit(leave, 1.5)
        wait_for(lambda: engine.begun == 1)
        second = pool.submit(leave, 0.7) if waiting else None
        if second:
            time.sleep(0.3)
            full = httpx.post(url + COMPLETION, json=SHORT)
            assert (full.status_code, full.headers["Retry-After"]) == (503, "5")
            assert full.json()["error"]["code"] == "queue_full"
        for left in (first, second):
            if left:
                left.result()
        assert httpx.post(url + COMPLETION, json=SHORT, timeout=5).json()["choices"][0]["text"] == "FFG"
        assert engine.begun == engine.ended == 2  # the one that waited was never begun


def test_a_request_that_fails_says_so_and_the_next_one_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    engine: Any = Endless()
    with around(engine) as (service, url):
        engine.error = EngineError("no room")
        failed = httpx.post(url + COMPLETION, json=SHORT)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "no room" in capfd.readouterr().err
        engine.error = None
        with httpx.stream("POST", url + COMPLETION, json={**LONG, "stream": True}) as answered:
            lines = answered.iter_lines()
            next(lines)
            engine.error = EngineError("no room again")
            last = [line for line in lines if line][-2:]
        assert "error" in json.loads(last[0].removeprefix("data: "))
        assert last[1] == "data: [DONE]"
        engine.error = None
        assert httpx.post(url + COMPLETION, json=SHORT).status_code == 200
        assert service.failure is None
        told: list[bool] = []
        service.on_failure = lambda: told.append(True)
        engine.error, engine.running = EngineError("it ended"), False
        assert httpx.post(url + COMPLETION, json=SHORT).status_code == 500
        assert (told, httpx.get(url + "/health").status_code) == ([True], 503)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Basic k\u00e9y", 401),
        ("Bearer k\u00e9y2", 401),
        ("Bearer k\u00e9y", 200),
        ("bearer k\u00e9y", 200),
    ],
)
def test_a_key_is_asked_for(header: str | None, status: int) -> None:
    with around(Endless(), key="k\u00e9y") as (_, url):
        headers = {} if header is None else {"Authorization": header.encode()}
        answered = [
            httpx.get(url + "/v1/models", headers=headers),
            httpx.post(url + COMPLETION, json=SHORT, headers=headers),
            httpx.post(url + CHAT, content=b"{", headers=headers),
        ]
        assert [each.status_code for each in answered] == [status, status, 401 if status == 401 else 400]
        assert httpx.get(url + "/health").status_code == 200


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    _, out = write_graph(tmp_path, template=False)
    from lrserve.serving.generation import Text

    text = Text(out / "onnx")
    assert not text.has_template
    with pytest.raises(InputError, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enforce-eager"], r"unrecognized arguments: --enforce-eager; its flags are --host, --port, --api-key, .*--threads"),
        (["--max-model"], "unrecognized arguments: --max-model"),
        (["--port", "99999"], "'99999' is no whole number from 0 to 65535"),
        (["--port", "http"], "'http' is no whole number from 0 to 65535"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--api-key", ""], "--api-key"),
        (["--max-model-len", "1000000"], "--max-model-len 1000000 is more than the model's context, 8192"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
    ],
)
def test_wrong_flags_are_refused_before_the_engine_starts(tiny: tuple[Any, Path], flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        serve(str(tiny[1]), flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "genai_config.json has no model.context_length that can be read"),
        ("[]", "has no model.context_length"),
        ('{"model": 5}', "has no model.context_length"),
        ("[" * 100_000, "has no model.context_length"),
        ('{"model": {"context_length": "4096"}}', "model.context_length is '4096', not a number of tokens"),
        ('{"model": {"context_length": -1}}', "model.context_length is -1, not a number"),
    ],
)
def test_a_damaged_graph_is_refused_before_the_engine_starts(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "genai_config.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        serve(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "key", "warned"),
    [([], "", False), (["--host", "0.0.0.0"], "", True), (["--host=::"], "", True), (["--host", "0.0.0.0"], "secret", False)],
)
def test_what_is_open_is_said_before_the_engine_starts(
    tiny: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    key: str,
    warned: bool,
) -> None:
    def no_engine(folder: Path, threads: int | None) -> None:
        raise EngineError("the engine starts")

    monkeypatch.setattr("lrserve.serving.onnx_server.GenaiEngine", no_engine)
    monkeypatch.setenv("LRSERVE_API_KEY", key)
    with pytest.raises(EngineError, match="the engine starts"):
        serve(str(tiny[1]), [*flags, "--port", "0"])
    said = capfd.readouterr().err
    assert "secret" not in said
    assert ("warning: this server has no key: everyone who reaches port " in said) == warned
    assert not warned or "may use the model. Set LRSERVE_API_KEY, or leave out --host" in said


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, key in (("secret", "secret"), ("", None)):
        monkeypatch.setenv("LRSERVE_API_KEY", value)
        assert parser().parse_args([]).api_key == key
    assert parser().parse_args(["--api-key", "other"]).api_key == "other"
    assert parser().parse_args([]).host == "127.0.0.1"


_FREES: str = """
import psutil
from lrserve.serving.onnx_server import _return_large_blocks
_return_large_blocks()
size = 2**20
del [bytearray(4 * size)][0]  # after which glibc would keep blocks of that size
before = psutil.Process().memory_full_info().uss
large, small = [], []
for _ in range(100):
    large.append(bytearray(b"x" * size))
    small.append(bytearray(100_000))
del large
print((psutil.Process().memory_full_info().uss - before) / size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no mallopt, and no such habit")
def test_memory_of_large_bodies_goes_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", _FREES], check=True, capture_output=True, text=True)
    assert float(found.stdout) < 30  # of 100, beside 10 that are still held
