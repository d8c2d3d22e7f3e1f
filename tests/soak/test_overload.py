"""Ten times the clients that a server has places for, for five minutes: every answer right, the server alive, its memory back.

Each client asks for greedy answers, whole and streamed, which are compared with those of the unloaded server. In between it sends
requests that are wrong, and goes away in the middle of streams. LRSERVE_SOAK_SECONDS sets another time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from faults.test_faulty_requests import COMPLETION, JSON, REQUESTS, Wrong, body_of, hello
from serving.tiny_graph import running, tokenizer, write_graph
from tiny import factorized_model, write_artifact

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("LRSERVE_SOAK_SECONDS", "300"))
WARM_SECONDS = min(30.0, SECONDS / 4)
OVER = 10  # clients for each place
PLACES = 17
PROMPTS = [f"Number {index} of many, {'and more ' * (index % 7)}" for index in range(40)]
TOKENS = 24
PATIENCE = 300.0  # seconds for one answer
IDLE_SECONDS = 60.0  # within which memory is back
MORE_MEMORY = 1.10
VLLM_NAMES = (
    *("text", "half", "list", "lists, deep", "text/plain", "10 MB of text", "prompt too long", "token negative", "NaN"),
    *("n huge", "n negative", "max_tokens huge", "messages []", "unknown model", "unknown path"),
)
VLLM = [wrong for wrong in REQUESTS if wrong.name in VLLM_NAMES]  # what is wrong there too, for it has more parameters


@dataclass
class Tally:
    """What the clients saw."""

    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.faults.append(what[:300])


@dataclass(frozen=True)
class Target:
    """A server under test.

    strict: wrong requests get the very status of their row; else any below 500.
    """

    process: subprocess.Popen[bytes]
    url: str
    model: str
    wrong: list[Wrong]
    strict: bool


def memory(process: subprocess.Popen[bytes]) -> float:
    """Return the megabytes of a process and its children; what they share counts once."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(each.memory_full_info().pss for each in tree) / 1e6


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def graph_server(place: Path) -> Iterator[Target]:
    _, out = write_graph(place)
    flags = ("--served-model-name", "tiny", "--max-model-len", "512", "--max-queue", str(PLACES - 1))
    with running(out, place / "log", *flags) as (process, url):
        yield Target(process, url, "tiny", REQUESTS, strict=True)


@contextmanager
def vllm_server(place: Path) -> Iterator[Target]:
    out = write_artifact(factorized_model("LlamaForCausalLM"), place / "out")
    tokenizer().save_pretrained(out)
    flags = ("--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", str(PLACES))
    with running(out, place / "log", *flags, engine="vllm", port=free_port(), patience=300) as (process, url):
        yield Target(process, url, "tiny", VLLM, strict=False)


def asked(target: Target, prompt: str, **more: Any) -> dict[str, Any]:
    return hello(prompt=prompt, max_tokens=TOKENS, model=target.model, **more)


class Client:
    """One of the many.

    Args:
        expected: the unloaded server's answers by prompt.
        tally: of all clients.
    """

    def __init__(self, target: Target, http: httpx.AsyncClient, expected: dict[str, str], tally: Tally, seed: int) -> None:
        self._target, self._http, self._expected, self._tally = target, http, expected, tally
        self._random = random.Random(seed)

    async def run(self, until: float) -> None:
        """Send one request after the other."""
        deeds = (self.ask, self.stream, self.leave, self.err)
        while time.monotonic() < until:
            (deed,) = self._random.choices(deeds, (60, 20, 10, 10))
            try:
                await deed(self._random.choice(PROMPTS))
            except httpx.TransportError as error:
                self._tally.fault(f"{deed.__name__}: {type(error).__name__}: {error}")

    async def ask(self, prompt: str) -> None:
        answered = await self._http.post(COMPLETION, json=asked(self._target, prompt))
        if await self._busy(answered):
            return
        if answered.status_code != 200:
            self._tally.fault(f"status {answered.status_code}: {answered.text}")
            return
        self._compare(prompt, answered.json()["choices"][0]["text"])

    async def stream(self, prompt: str) -> None:
        async with self._http.stream("POST", COMPLETION, json=asked(self._target, prompt, stream=True)) as answered:
            if await self._busy(answered):
                return
            text, last = "", ""
            async for line in answered.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        if last != "data: [DONE]":
            self._tally.fault(f"a stream ended with {last!r}")
        self._compare(prompt, text)

    async def leave(self, prompt: str) -> None:
        """Go away in the middle of a stream."""
        patience = self._random.randrange(1, TOKENS)
        async with self._http.stream("POST", COMPLETION, json=asked(self._target, prompt, stream=True)) as answered:
            if await self._busy(answered):
                return
            async for _ in answered.aiter_lines():
                patience -= 1
                if not patience:
                    break
        self._tally.seen["left"] += 1

    async def err(self, prompt: str) -> None:
        """Send what is wrong."""
        wrong = self._random.choice(self._target.wrong)
        headers = dict(wrong.headers) or {"Content-Type": "application/x-www-form-urlencoded"}
        answered = await self._http.request(wrong.method, wrong.path, content=body_of(wrong), headers=headers)
        if await self._busy(answered):
            return
        right = answered.status_code == wrong.status if self._target.strict else 400 <= answered.status_code < 500
        if not right:
            self._tally.fault(f"{wrong.name}: status {answered.status_code}: {answered.text}")
        self._tally.seen["wrong"] += 1

    async def _busy(self, answered: httpx.Response) -> bool:
        """Whether there was no place; a client comes again, sooner than it is told."""
        if answered.status_code != 503:
            return False
        if "Retry-After" not in answered.headers:
            self._tally.fault("503 without Retry-After")
        self._tally.seen["busy"] += 1
        await asyncio.sleep(self._random.uniform(0.1, 1))
        return True

    def _compare(self, prompt: str, text: str) -> None:
        self._tally.seen["answers"] += 1
        if text != self._expected[prompt]:
            self._tally.fault(f"{prompt!r} is answered with {text!r}, not {self._expected[prompt]!r}")


async def overload(target: Target, expected: dict[str, str], tally: Tally, clients: int, seconds: float) -> None:
    """Run so many clients at once."""
    until = time.monotonic() + seconds
    # connections are kept for less than the 5 seconds of vLLM's server, which would close some just as they are used again
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=target.url, timeout=PATIENCE, limits=limits) as http:
        await asyncio.gather(*(Client(target, http, expected, tally, seed).run(until) for seed in range(clients)))


def answers(target: Target) -> dict[str, str]:
    """Ask every prompt, one after the other."""
    with httpx.Client(base_url=target.url, headers=JSON, timeout=PATIENCE) as http:
        replies = {prompt: http.post(COMPLETION, json=asked(target, prompt)) for prompt in PROMPTS}
    assert {reply.status_code for reply in replies.values()} == {200}
    return {prompt: reply.json()["choices"][0]["text"] for prompt, reply in replies.items()}


@pytest.mark.parametrize("serve", [graph_server, vllm_server], ids=["onnxruntime", "vllm"])
def test_ten_times_the_capacity(
    serve: Callable[[Path], Any], tmp_path: Path, soak_row: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    tally = Tally()
    with serve(tmp_path) as target:
        expected = answers(target)
        assert len(set(expected.values())) > len(PROMPTS) // 2
        asyncio.run(overload(target, expected, Tally(), PLACES, WARM_SECONDS))  # fills caches and pools
        before, started = memory(target.process), psutil.Process(target.process.pid).children(recursive=True)
        began = time.monotonic()
        asyncio.run(overload(target, expected, tally, OVER * PLACES, SECONDS))
        seconds = time.monotonic() - began
        for prompt, text in answers(target).items():
            if text != expected[prompt]:
                tally.fault(f"afterwards {prompt!r} is answered with {text!r}, not {expected[prompt]!r}")
        deadline = time.monotonic() + IDLE_SECONDS
        while (after := memory(target.process)) > MORE_MEMORY * before and time.monotonic() < deadline:
            time.sleep(2)
        if after > MORE_MEMORY * before:
            tally.fault(f"memory was {before:.0f} MB and is {after:.0f} MB")
        if target.process.poll() is not None or not all(each.is_running() for each in started):
            tally.fault("a process of the server has ended")
    if "Traceback" in (tmp_path / "log").read_text(errors="replace"):
        tally.fault("there is a traceback in the server's log")
    seen = tally.seen
    print(*Counter(tally.faults).most_common(20), sep="\n")
    assert seen["answers"]
    assert seen["wrong"]
    assert seen["left"]
    soak_row(
        f"overload, {request.node.callspec.id}: {OVER * PLACES} clients of {PLACES} places",
        sum(seen.values()),
        len(tally.faults),
        seconds,
        f"{seen['answers']:,} answers compared, {seen['wrong']:,} wrong requests, {seen['left']:,} streams left, "
        f"{seen['busy']:,} told to come again; memory {before:.0f} MB before, {after:.0f} MB after",
    )
