"""Checkpoints: read by plain torch or safetensors, whole or not there, refused before a training is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint import check_checkpoint, write_weights
from pipeline.errors import InputError


class Tied(nn.Module):
    """Two names for one weight, a number without an axis, and a weight that does not lie in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights"])
def test_a_checkpoint_holds_the_state_dict_for_ordinary_tools(tmp_path: Path, name: str) -> None:
    model, path = Tied(), tmp_path / name
    write_weights(model.state_dict(), path)
    loaded = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    Tied().load_state_dict(loaded)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_one_as_it_was(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"an earlier one")

    def full(*given: object) -> None:
        target = next(one for one in given if isinstance(one, Path))
        with target.open("wb") as file:
            file.write(b"half of i")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights({"weight": torch.zeros(3)}, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier one"]


@pytest.mark.parametrize(("name", "reason"), [("", "it is a folder"), ("no/where.pt", "its folder does not exist")])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_checkpoint(tmp_path / name)


def test_a_folder_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="read-only"):
        check_checkpoint(tmp_path / "weights.pt")
