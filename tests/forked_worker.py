"""Workers of vLLM, forked from a process that has imported vLLM, which is two thirds of the start of an engine of a tiny model.

The fixture `forked_workers` starts that process, which listens on a socket. `command(socket, module)` is then what to start in the
place of `python -m module`. It hands its standard streams, environment and folder over, and ends as the worker that takes them
does; the worker ends with its standard input, as ever. Run as a program, this file is both of them.

Settings that are read while vLLM is imported are those of the test that started the process.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback

IMPORTED = (
    "lrserve.engines.vllm_worker",
    "torch._inductor.compile_fx",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
)
STREAMS = (0, 1, 2)
LARGEST = 2**20  # bytes of an environment


def command(address: str, module: str) -> tuple[str, ...]:
    """Return the command that starts a worker, the function `main` of a module."""
    return sys.executable, "-IS", __file__, address, module


def hand_over(address: str, module: str) -> int:
    """Hand this process's streams to a new worker, and return its exit code."""
    asked = json.dumps([module, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [asked], STREAMS)
        for stream in STREAMS:
            os.close(stream)
        return int(server.recv(16) or b"1")


def listen(address: str) -> None:
    """Import vLLM, say so by a byte on standard output, and fork workers until standard input ends."""
    for module in IMPORTED:
        importlib.import_module(module)
    importlib.import_module("torch._inductor.cpu_vec_isa").valid_vec_isa_list()  # which tries what this processor can do
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        print(end=".", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            asking, _ = server.accept()
            with asking:
                if os.fork() == 0:
                    server.close()
                    attend(asking)
    os._exit(0)


def attend(asking: socket.socket) -> None:
    """Fork once more, for the worker, and tell who asks for it how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, streams, _, _ = socket.recv_fds(asking, LARGEST, len(STREAMS))
    module, folder, environment = json.loads(asked)
    if worker := os.fork():
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        asking.send(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    asking.close()
    os.setsid()
    for own, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, own)
        os.close(given)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    work(module)


def work(module: str) -> None:
    """Be the worker."""
    tempfile.tempdir = None  # that of its environment
    try:
        importlib.import_module(module).main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen(sys.argv[2])
    else:
        os._exit(hand_over(*sys.argv[1:]))
