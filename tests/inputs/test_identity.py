"""What files of weights are told by."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lrserve.inputs import identity
from lrserve.inputs.identity import content_id


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is too large to be read whole."""
    monkeypatch.setattr(identity, "_WHOLE", 2**16)
    monkeypatch.setattr(identity, "_SAMPLE", 2**6)
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2**18 + 5))
    return path


def test_a_small_file_is_told_by_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    assert content_id(path) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_large_file_is_told_from_one_that_differs_in_a_tensor(large: Path, place: str) -> None:
    before, content = content_id(large), bytearray(large.read_bytes())
    assert content_id(large) == before
    start = {"first": 0, "middle": len(content) // 2, "last": len(content) - 2048}[place]
    content[start : start + 2048] = os.urandom(2048)
    large.write_bytes(content)
    assert content_id(large) != before


def test_a_large_file_is_told_from_a_longer_one(large: Path) -> None:
    before = content_id(large)
    with large.open("ab") as file:
        file.write(b"0")
    assert content_id(large) != before


def test_of_a_large_file_only_samples_are_read(large: Path) -> None:
    os.truncate(large, 2**40)  # a hole: to read it all would take hours
    assert content_id(large).startswith("sampled-")


def test_the_name_of_the_hubs_blob_is_taken(tmp_path: Path) -> None:
    name = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"what nobody reads")
    link = tmp_path / "snapshots" / "main" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "blobs" / name)
    assert content_id(link) == name
    small = tmp_path / "blobs" / ("0" * 40)  # git's own hash, of a file that is no large one
    small.write_bytes(b"{}")
    config = link.with_name("config.json")
    config.symlink_to(small)
    assert content_id(config) == hashlib.sha256(b"{}").hexdigest()
