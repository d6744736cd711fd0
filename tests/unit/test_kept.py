"""Finished parts are taken up again exactly where they would be made the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xarray as xr

from pipeline.results.kept import Kept

PART = xr.Dataset({"loss": ("step", [2.0, 1.0])}, {"step": [0, 1]})


def test_a_part_of_the_same_origin_comes_back_and_its_file_is_as_new(tmp_path: Path):
    Kept(tmp_path, "code 1").put("seed-0/kernel", PART)
    (file,) = tmp_path.rglob("*.zip")
    os.utime(file, (0, 0))
    found = Kept(tmp_path, "code 1").get("seed-0/kernel")
    assert found is not None
    assert found["loss"].values.tolist() == [2.0, 1.0]
    assert file.stat().st_mtime > 0


def test_a_part_of_another_origin_is_not_used_and_is_replaced(tmp_path: Path):
    Kept(tmp_path, "code 1").put("part", PART)
    later = Kept(tmp_path, "code 2")
    assert later.get("part") is None
    later.put("part", PART * 2)
    again = later.get("part")
    assert again is not None
    assert again["loss"].values.tolist() == [4.0, 2.0]


@pytest.mark.parametrize("content", [None, b"", b"half a file"], ids=["missing", "empty", "damaged"])
def test_a_part_that_is_not_whole_is_made_anew(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "part.zarr.zip").write_bytes(content)
    assert Kept(tmp_path, "code").get("part") is None
