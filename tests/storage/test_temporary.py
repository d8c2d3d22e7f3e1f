"""Temporary things carry their owner's name; those of dead processes go, and those of living ones stay."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrserve.errors import ArtifactError
from lrserve.storage import temporary
from lrserve.storage.store import atomic_path, replace_folder, staged
from lrserve.storage.temporary import (
    exchange,
    neighbour,
    owner,
    remove_leftovers,
    restore_replaced,
    staging_folder,
    temporary_folder,
    temporary_log,
)


def make_as_another_process(code: str, *, ended: bool = True) -> subprocess.Popen[str]:
    """Run code in a process that says 'made' and then waits; it is killed if it is to have ended."""
    imports = "from pathlib import Path\nfrom lrserve.storage.store import *\nfrom lrserve.storage.temporary import *\n"
    script = f"{imports}{code}\nprint('made', flush=True)\nimport time; time.sleep(120)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    if ended:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process


ALL = """
import os
place = Path({place!r})
kept = temporary_folder(place), staging_folder(place / "out"), neighbour(place / "weights", "partial").touch()
os.environ["TMPDIR"] = str(place)
temporary_log()
"""
PATTERNS = ("lrserve-*", ".out.staging-*", "*.partial-*")


def sweep(place: Path) -> list[str]:
    said: list[str] = []
    remove_leftovers([(place, pattern) for pattern in PATTERNS], said.append)
    return said


def test_what_a_killed_process_left_goes_and_is_said_in_one_line(tmp_path: Path) -> None:
    make_as_another_process(ALL.format(place=str(tmp_path)))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    (line,) = sweep(tmp_path)
    assert line.startswith("removed what runs that were interrupted left: ")
    assert str(tmp_path) in line
    assert line.endswith("and 1 more")
    assert list(tmp_path.iterdir()) == []
    assert sweep(tmp_path) == []


def test_what_a_living_process_uses_stays(tmp_path: Path) -> None:
    process = make_as_another_process(ALL.format(place=str(tmp_path)), ended=False)
    try:
        before = sorted(tmp_path.iterdir())
        assert sweep(tmp_path) == []
        assert sorted(tmp_path.iterdir()) == before
    finally:
        process.kill()
        process.wait()


def test_names_of_users_stay(tmp_path: Path) -> None:
    for name in ("lrserve-main", f"lrserve-{os.getpid()}", "weights.partial-1", ".out.staging-old", f"lrserve-{owner()}-x"):
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("digits", [8, 12], ids=["a later process with this number", "another machine"])
def test_an_owner_is_more_than_a_number(digits: int, tmp_path: Path) -> None:
    end = owner()[-digits:]
    other = owner().removesuffix(end) + "".join("1" if digit == "0" else "0" for digit in end[:-1]) + "1"
    for ending in ("", "-abcdefgh"):
        (tmp_path / f"lrserve-{other}{ending}").mkdir()
    (line,) = sweep(tmp_path)
    elsewhere = digits == 12
    assert len(list(tmp_path.iterdir())) == (2 if elsewhere else 0)
    assert ("another machine or in another container; remove them" in line) == elsewhere


def test_a_process_that_nobody_waits_for_is_dead(tmp_path: Path) -> None:
    process = make_as_another_process(ALL.format(place=str(tmp_path)), ended=False)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    assert len(sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
    process.wait()


def test_what_may_not_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_as_another_process(ALL.format(place=str(tmp_path)))
    monkeypatch.setattr(temporary, "_remove", lambda path: None)
    (line,) = sweep(tmp_path)
    assert line.startswith("what runs that were interrupted left could not be removed: ")


def test_temporary_files_end_with_their_context(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert re.fullmatch(rf"lrserve-{owner()}-\w{{8}}", Path(folder).name)
        assert Path(folder).stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [temporary_log, temporary_folder])
def test_no_room_for_temporary_files_is_one_line(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(temporary.tempfile, "mkstemp", full)
    monkeypatch.setattr(temporary.tempfile, "TemporaryDirectory", full)
    with pytest.raises(ArtifactError, match="for temporary files: No space left on device; make room or set TMPDIR"):
        make()


def artifact(place: Path, name: str) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "weights").write_text(name)
    return folder


def test_two_folders_change_places_at_once(tmp_path: Path) -> None:
    new, out = artifact(tmp_path, "new"), artifact(tmp_path, "out")
    assert exchange(new, out)
    assert ((out / "weights").read_text(), (new / "weights").read_text()) == ("new", "out")
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "nowhere", out)


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange names: two renames take its place."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())


@pytest.mark.usefixtures("without_exchange")
def test_two_renames_where_there_is_no_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, out = artifact(tmp_path, "new"), artifact(tmp_path, "out")
    replace_folder(new, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "new"
    rename, failing = Path.rename, artifact(tmp_path, "failing")

    def fail(path: Path, target: Path) -> Path:
        if path == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(failing, out)
    assert (out / "weights").read_text() == "new"


KILLED_AT = """
import os, signal
from lrserve.storage import store
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
place = Path({place!r})
{patch}
with staged(place / "out", replace=True) as staging:
    (staging / "weights").write_text("new")
"""
MOMENTS = {
    "before the exchange": ("store.exchange = die", "out"),
    "after the exchange": ("store.shutil.rmtree = die", "new"),
    "half of the old one removed": ("store.shutil.rmtree = lambda old, **_: [(old / 'weights').unlink(), die()]", "new"),
}


def killed(place: Path, patch: str) -> None:
    code = KILLED_AT.format(place=str(place), patch=patch)
    imports = "from pathlib import Path\nfrom lrserve.storage.store import staged\n"
    assert subprocess.run([sys.executable, "-c", imports + code], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_of_both_is_there_whenever_overwriting_is_killed(moment: str, tmp_path: Path) -> None:
    patch, left = MOMENTS[moment]
    out = artifact(tmp_path, "out")
    killed(tmp_path, patch)
    assert (out / "weights").read_text() == left  # before any other run
    assert len(sweep(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_run_restores_what_was_moved_aside(tmp_path: Path) -> None:
    out = artifact(tmp_path, "out")
    between = "store.exchange = lambda *_: False\nmove = Path.rename\n"
    between += "Path.rename = lambda self, to: die() if 'staging' in self.name else move(self, to)"
    killed(tmp_path, between)
    assert not out.exists()
    said: list[str] = []
    restore_replaced(out, said.append)
    assert said == [f"{out} is back: a run that was killed had moved it aside"]
    assert (out / "weights").read_text() == "out"
    restore_replaced(out, said.append)
    assert len(said) == 1


def test_an_overwriting_that_fails_leaves_the_old_one_alone(tmp_path: Path) -> None:
    out = artifact(tmp_path, "out")
    with pytest.raises(RuntimeError), staged(out, replace=True) as staging:
        (staging / "weights").write_text("half")
        raise RuntimeError
    assert (out / "weights").read_text() == "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_on_the_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def move(partial: Path, path: Path) -> None:
        done.append("rename")
        replace(partial, path)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    with atomic_path(tmp_path / "probes.json") as partial:
        partial.write_text("{}")
        assert partial == neighbour(tmp_path / "probes.json", "partial")
    assert done == [f"flush {partial.name}", "rename", f"flush {tmp_path.name}"]


def test_a_staging_folder_says_whose_it_is(tmp_path: Path) -> None:
    assert re.fullmatch(rf"\.a b\[1\]\.staging-{owner()}-\w{{8}}", staging_folder(tmp_path / "a b[1]").name)
