"""Space and permissions, checked before the work starts: nothing is left behind, and a disk is counted once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lrserve.errors import ArtifactError
from lrserve.storage.space import Place, bytes_below, require_space, resolved


def test_a_full_disk_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    require_space([Place("the artifact (-o)", tmp_path / "new" / "out", 0, replaced=True)])
    with pytest.raises(ArtifactError, match=r"the artifact \(-o\) 1000000000\.00 GB in .*out; free some space"):
        require_space([Place("the artifact (-o)", tmp_path / "new" / "out", 10**18)])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"the cache \(LRSERVE_CACHE\): cannot write to .*file': Not a directory"):
        require_space([Place("the cache (LRSERVE_CACHE)", tmp_path / "file" / "out", 0)])
    with pytest.raises(ArtifactError, match="mount point"):
        require_space([Place("the artifact (-o)", Path("/"), 0, replaced=True)])
    require_space([Place("the work folder (--work)", Path("/"), 0)])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_places_on_one_disk_share_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.storage.space.shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    places = [Place("one", tmp_path / "one", 60), Place("two", tmp_path / "two", 30)]
    require_space(places)
    with pytest.raises(ArtifactError, match="one 0.00 GB in .*one, two 0.00 GB in"):
        require_space([*places, Place("three", tmp_path, 11)])


def test_a_path_that_no_file_system_has(tmp_path: Path) -> None:
    assert resolved("-o", tmp_path / "a" / ".." / "b") == tmp_path.resolve() / "b"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (Path("a\0b"), Path("x" * 400), tmp_path / "loop"):
        with pytest.raises(ArtifactError, match="-o .*choose another place"):
            resolved("-o", path)


def test_what_lies_below_a_folder_is_counted(tmp_path: Path) -> None:
    assert bytes_below(tmp_path / "nowhere") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to("nowhere")
    assert 5 <= bytes_below(tmp_path) < 100
