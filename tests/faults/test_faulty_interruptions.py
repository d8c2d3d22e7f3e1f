"""After any interruption the next run finishes, cleans up and says what it did; what stops it is said in one line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import pytest
import torch
from allocation.searching import SETTINGS, SPEED, evaluate, goal, space
from faults.killing import Place
from faults.refusing import Fault
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import dense_model, write_dense, write_text

from lrserve.allocation import database
from lrserve.allocation.database import study_errors_named, without_password
from lrserve.allocation.study import open_study, run_study, run_trial, study_of
from lrserve.compression.calibrate import calibrate, memory_map, read_statistics
from lrserve.compression.groups import find_groups
from lrserve.compression.recover import _save
from lrserve.errors import ArtifactError
from lrserve.recipe import Target
from lrserve.storage import temporary
from lrserve.storage.store import (
    disk_errors_named,
    read_manifest,
    staged,
    verify_files,
    write_json,
    write_manifest,
    write_tensors,
)
from lrserve.storage.temporary import temporary_leftovers
from lrserve.storage.work import WorkFolder, work_folder

# --- damaged work files --------------------------------------------------------------------------------------------------


def cut(name: str, share: float = 0.5) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def folder_instead(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name / "inside").mkdir(parents=True)

    return damage


DAMAGES = [
    Fault("json cut short", cut("probes.json"), ("probes.json is damaged: no JSON",)),
    Fault("json of zeros", overwrite("probes.json", bytes(64)), ("probes.json is damaged: no JSON",)),
    Fault("json empty", overwrite("probes.json", b""), ("probes.json is empty",)),
    Fault("json not text", overwrite("probes.json", b"\xff\xfe{"), ("probes.json is damaged: no JSON",)),
    Fault("json nested", overwrite("probes.json", b"[" * 100_000), ("probes.json is damaged: no JSON",)),
    Fault("inputs cut short", cut("inputs.json"), ("inputs.json is damaged: no JSON",)),
    Fault("tensors cut short", cut("factors.safetensors"), ("factors.safetensors is cut short",)),
    Fault("tensors' last byte lost", cut("factors.safetensors", 0.999), ("factors.safetensors is cut short",)),
    Fault("tensors' header cut", cut("factors.safetensors", 0.001), ("factors.safetensors is cut short",)),
    Fault("tensors of zeros", overwrite("factors.safetensors", bytes(4096)), ("factors.safetensors is cut short or damaged",)),
    Fault("tensors empty", overwrite("factors.safetensors", b""), ("factors.safetensors is empty",)),
    Fault("tensors a folder", folder_instead("factors.safetensors"), ("factors.safetensors is no file",)),
    Fault("study cut short", cut("study.sqlite3"), ("study.sqlite3 is damaged: ",)),
    Fault("study's last page lost", cut("study.sqlite3", 0.9), ("study.sqlite3 is damaged: ",)),
    Fault("study of zeros", overwrite("study.sqlite3", bytes(4096)), ("study.sqlite3 is damaged: ",)),
    Fault("study of text", overwrite("study.sqlite3", b"no database" * 99), ("study.sqlite3 is damaged: ",)),
    Fault("study empty", overwrite("study.sqlite3", b""), ("study.sqlite3 is empty",)),
    Fault("training state cut short", cut("state.pt"), ("state.pt is cut short",)),
    Fault("training state empty", overwrite("state.pt", b""), ("state.pt is empty",)),
]


def fill(folder: Path) -> None:
    """Write a file of each kind that stages hold."""
    write_json(folder / "probes.json", {"group": list(range(100))})
    write_tensors(folder / "factors.safetensors", {"A": torch.randn(32, 32)})
    torch.save({"A": torch.randn(32, 32)}, folder / "state.pt")
    with closing(sqlite3.connect(folder / "study.sqlite3")) as study:
        study.execute("CREATE TABLE trials (number INTEGER PRIMARY KEY, text)")
        study.executemany("INSERT INTO trials (text) VALUES (?)", [("x" * 500,)] * 100)
        study.commit()


@pytest.mark.parametrize("fault", DAMAGES, ids=str)
def test_a_damaged_work_file_is_named_and_made_anew_and_no_other(fault: Fault, tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    other, stage = work.stage("spectra", {}), work.stage("probe", {"seed": 0})
    fill(other)
    fill(stage)
    names = {path.name for path in stage.iterdir()}
    before = {path: path.read_bytes() for path in other.iterdir()}
    fault.damage(stage)
    assert work.stage("probe", {"seed": 0}) == stage
    assert work.stage("spectra", {}) == other
    (line,) = said
    assert line.startswith(f"probe: {stage}")
    assert line.endswith("; it is made anew")
    assert all(part in line for part in fault.line), line
    assert (names - {path.name for path in stage.iterdir()}) == {line.split()[1].rpartition("/")[2]} - {"inputs.json"}
    assert json.loads((stage / "inputs.json").read_text())["seed"] == 0
    assert {path: path.read_bytes() for path in other.iterdir()} == before
    assert work.stage("probe", {"seed": 0}) == stage
    assert len(said) == 1


def test_sound_work_files_stay(tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    fill(work.stage("probe", {}))
    names = sorted(path.name for path in work.stage("probe", {}).iterdir())
    assert names == ["factors.safetensors", "inputs.json", "probes.json", "state.pt", "study.sqlite3"]
    assert said == []


def test_damaged_inputs_of_another_run_do_not_stop_this_one(tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    (work.stage("probe", {"seed": 0}) / "inputs.json").write_bytes(b"\0" * 20)
    assert work.stage("probe", {"seed": 1}).is_dir()
    assert said == []


def test_hidden_states_cut_short_are_not_used(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=3)
    groups, windows = find_groups(model), torch.arange(128).view(4, 32) % 256

    def collect(name: str, progress: Callable[[int], None] = lambda done: None) -> None:
        calibrate(model, groups, windows, tmp_path / name, pool_sequences=2, batch_tokens=64, progress=progress)

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    collect("whole")
    with pytest.raises(KeyboardInterrupt):
        collect("cut", stop)
    (states,) = (tmp_path / "cut").glob("hidden*")
    os.truncate(states, states.stat().st_size // 2)
    collect("cut")
    for group in groups:
        assert torch.equal(read_statistics(tmp_path / "cut", group).C, read_statistics(tmp_path / "whole", group).C)


# --- the disk ------------------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writing fail as on a full disk, but with EFBIG: beyond so many bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def search_in(path: Path) -> object:
    target = Target(ratio=0.3)
    settings = SETTINGS.model_copy(update={"sampler": "random", "trials": 3})
    return run_study(space(target), goal(target), SPEED, evaluate, settings, path, seed=0)


def train_to(path: Path) -> None:
    from lrserve.compression.recover import _Progress

    learning = {"A": torch.nn.Parameter(torch.zeros(64, 1024))}
    _save(path, learning, torch.optim.SGD(learning.values()), _Progress(seconds=0.0, divergences=[]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda folder: write_json(folder / "probes.json", list(range(50_000))),
    "tensors": lambda folder: write_tensors(folder / "factors.safetensors", {"A": torch.zeros(64, 1024)}),
    "training state": lambda folder: train_to(folder / "state.pt"),
    "hidden states": lambda folder: memory_map(folder / "hidden.partial", (64, 1024), torch.float32),
    "study": lambda folder: search_in(folder / "study.sqlite3"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(writer: str, size: int, tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    stage = work.stage("probe", {})
    with (
        pytest.raises(ArtifactError, match=r"; make room[^\n]*$") as caught,
        disk_errors_named(tmp_path),
        study_errors_named(f"the work folder {tmp_path}"),
        files_of_at_most(size),
    ):
        WRITERS[writer](stage)
    assert str(tmp_path) in str(caught.value)
    assert [path for path in stage.iterdir() if ".partial-" in path.name] == []
    WRITERS[writer](work.stage("probe", {}))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_is_asked_for_where_it_is_the_cause(code: int, tmp_path: Path) -> None:
    for error in (OSError(code, os.strerror(code)), SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")):
        with pytest.raises(ArtifactError, match="make room or choose another place, then run again$"), disk_errors_named(tmp_path):
            raise error


@pytest.mark.parametrize(
    ("code", "step"),
    [(errno.EROFS, "make it writable"), (errno.EACCES, "make it writable"), (errno.EIO, "check the disk"), (errno.ESTALE, "check")],
)
def test_room_is_not_asked_for_where_it_is_not_the_cause(code: int, step: str, tmp_path: Path) -> None:
    for error in (OSError(code, os.strerror(code)), SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")):
        with pytest.raises(ArtifactError, match=step) as caught, disk_errors_named(tmp_path):
            raise error
        assert "make room" not in str(caught.value)


def test_a_tensor_file_that_is_damaged_while_it_is_used_is_not_a_full_disk(tmp_path: Path) -> None:
    save_file({"A": torch.zeros(8)}, tmp_path / "a.safetensors")
    cut("a.safetensors")(tmp_path)
    with pytest.raises(ArtifactError, match="is damaged: .*; run again, which makes it anew$"), disk_errors_named(tmp_path):
        load_file(tmp_path / "a.safetensors")


# --- locks and databases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_as_such(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ArtifactError, match=r"has no locks .*; choose a --work on a local disk$"), work_folder(tmp_path, print):
        pass


@contextmanager
def held(path: Path, seconds: float) -> Iterator[None]:
    """Hold a database exclusively for a time."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(seconds, database.close)
    release.start()
    try:
        yield
    finally:
        release.join()


def test_a_locked_study_is_waited_for_and_then_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "50% of #1?.sqlite3"
    search_in(path)
    with held(path, 1.5):
        began = time.monotonic()
        assert len(study_of(path).trials) == 3
        assert time.monotonic() - began > 1
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.2)
    line = r"^the study's database in W failed: database is locked; .*goes on$"
    with held(path, 1.5), pytest.raises(ArtifactError, match=line), study_errors_named("W"):
        search_in(path)
    assert len(search_in(path)) == 3  # type: ignore[arg-type]


def test_the_journal_of_a_damaged_study_is_not_played_into_the_next_one(tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    stage = work.stage("study", {})
    search_in(stage / "study.sqlite3")
    cut("study.sqlite3")(stage)
    (stage / "study.sqlite3-journal").write_bytes(b"of the database that is gone")
    assert [path.name for path in work.stage("study", {}).iterdir()] == ["inputs.json"]
    assert len(said) == 1


def test_a_database_is_named_without_its_password() -> None:
    shown = without_password("postgresql+psycopg://me:secret@host/studies")
    assert shown == "postgresql+psycopg://me:***@host/studies"


def test_a_locked_study_is_no_damaged_one(tmp_path: Path) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append)
    search_in(work.stage("study", {}) / "study.sqlite3")
    with held(work.stage("study", {}) / "study.sqlite3", 0.5):
        work.stage("study", {})
    assert said == []
    assert len(study_of(work.stage("study", {}) / "study.sqlite3").trials) == 3


def test_a_heartbeat_that_fails_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study("s", f"sqlite:///{tmp_path / 's.sqlite3'}")
    beats = []

    def beat(storage: object, trial: int) -> None:
        beats.append(trial)
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", beat)
    study._storage.record_heartbeat(3)  # type: ignore[attr-defined]
    assert beats == [3]


def test_a_worker_that_was_taken_for_dead_goes_on(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path / 's.sqlite3'}"
    study, other = open_study("s", place), open_study("s", place)

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            other.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        trial.set_user_attr("perplexity", 2.0)
        return 1.0

    for _ in range(2):
        run_trial(study, optuna.samplers.RandomSampler(seed=0), None, objective)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


# --- signals -------------------------------------------------------------------------------------------------------------

WAITING = """
import sys, time
from pathlib import Path
from lrserve import cli
from lrserve.storage.store import staged
from lrserve.storage.temporary import temporary_folder
def job():
    place = Path(sys.argv[1])
    with staged(place / "out", replace=True), temporary_folder(place):
        try:
            print("waiting", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            time.sleep(0.5)
cli.app = job
cli.main()
"""


def waiting(place: Path, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([*before, sys.executable, "-c", WAITING, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_clean_up_and_a_second_one_does_not_interrupt_that(number: signal.Signals, tmp_path: Path) -> None:
    process = waiting(tmp_path, "env", "--default-signal=HUP")  # which tests that run under nohup would hand on ignored
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_nohup_keeps_a_run_alive(tmp_path: Path) -> None:
    process = waiting(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_no_folder_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(temporary.tempfile, "gettempdir", nowhere)
    with pytest.raises(ArtifactError, match="for temporary files: No usable .*set TMPDIR to another folder$"):
        temporary_leftovers()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / ("long" * 60)):
        with pytest.raises(ArtifactError, match="choose another place$"), staged(out, replace=False):
            pass


# --- whole runs ----------------------------------------------------------------------------------------------------------

MOMENTS = ("1/6 open", "4/6 probe", "5/6 export")  # lines: calibration, trials with an engine, the proof beside a staging folder
BROKEN = {
    "calibration": "block-00001.safetensors",
    "gradients": "moments.safetensors",
    "spectra": "spectra-00000.safetensors",
    "probe": "probes.json",
    "study": "study.sqlite3",
    "validation": "windows.json",
    "dense": "model/onnx/model.onnx_data",
    "transcripts-onnxruntime": "engine.json",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("killed")
    write_dense(dense_model("LlamaForCausalLM"), root / "model")
    write_text(root / "text.jsonl", 200)
    windows = {"validation_tokens": 64, "validation_pool": 128, "validation_length": 32}
    return Place(
        root,
        {
            "model": str(root / "model"),
            "target": {"ratio": 0.2},
            "text": {"calibration": str(root / "text.jsonl")},
            "export": ["onnx"],
            "calibration": {"sequences": 8, "length": 32, "pool_sequences": 4, "batch_tokens": 64},
            "factorization": {"weights": [], "fisher_tokens": 128},
            "search": {"trials": 3, "rank_step": 32, "probe_tokens": 64, "measured_plans": 1, **windows},
            "workloads": {"decode": {"prompt_tokens": 2, "output_tokens": 4, "concurrency": 1}},
            "engine": {"runtime": "onnx", "repeats": 1},
            "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8, "new_tokens": 4},
        },
    )


@pytest.mark.engine
def test_the_run_after_a_kill_leaves_what_an_undisturbed_one_leaves(place: Place) -> None:
    place.run("reference")
    out = place.out("killed")
    shutil.copytree(place.out("reference"), out)  # an older artifact, to be overwritten
    manifest = read_manifest(out)
    write_manifest(out, manifest["created_by"], {"seed": 1})
    for line in MOMENTS:
        place.kill_at_line("killed", line, "reference")
        assert verify_files(out) == []
        assert read_manifest(out)["inputs"] == {"seed": 1}
    assert any("staging" in name for name in place.strays())
    lines = place.run("killed", "reference")
    assert any(line.startswith("removed what runs that were interrupted left: ") for line in lines)
    assert any(line.startswith("2/6 calibrate") and "all reused" in line for line in lines)
    assert read_manifest(out)["inputs"] == manifest["inputs"]
    assert place.unlike("killed", "reference") == []
    assert place.strays() == []

    shutil.rmtree(out)
    for stage, name in BROKEN.items():
        (folder,) = place.work("killed").glob(f"{stage}-????????????")
        cut(name)(folder)
    lines = place.run("killed", "reference")
    for stage in BROKEN:
        assert sum(line.startswith(f"{stage}: {place.work('killed')}") and "made anew" in line for line in lines) == 1, stage
    assert place.unlike("killed", "reference") == []
