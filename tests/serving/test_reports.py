"""Where --report may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrserve.errors import InputError
from lrserve.serving.reports import make_report_folder


def test_a_folder_beside_the_artifact_is_made(tmp_path: Path) -> None:
    report = tmp_path / "a" / "artifact.bench"
    for _ in range(2):
        make_report_folder(report, tmp_path / "a" / "artifact")
    assert report.is_dir()


@pytest.mark.parametrize("place", ["", "bench", "lrserve/bench", "../artifact/bench"])
def test_a_report_never_becomes_a_part_of_the_artifact(place: str, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    with pytest.raises(InputError, match="lies in the artifact"):
        make_report_folder(artifact / place, artifact)
    assert not list(artifact.iterdir())


def test_a_link_into_the_artifact_is_no_way_around(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "link").symlink_to("artifact")
    with pytest.raises(InputError, match="lies in the artifact"):
        make_report_folder(tmp_path / "link" / "bench", tmp_path / "artifact")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder .* can be made for --report"):
        make_report_folder(tmp_path / "file" / "bench", tmp_path / "artifact")
