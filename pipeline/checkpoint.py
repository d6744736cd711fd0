"""Trained weights as a file that other programs read: a state dict, by torch or as safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.errors import InputError

SAFETENSORS = ".safetensors"


def check_checkpoint(path: str | Path) -> Path:
    """The path; raises InputError, before a training that would be lost, where no file can be written to it."""
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"checkpoint '{path}' cannot be written: it is a folder, give a file in it")
    if not folder.is_dir():
        raise InputError(f"checkpoint '{path}' cannot be written: its folder does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"checkpoint '{path}' cannot be written: its folder is read-only")
    return path


def write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict so that the file is either whole or not there.

    As safetensors where the name ends so, else by torch for ``torch.load(..., weights_only=True)``.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import save

            # The format knows no shared memory: tied weights are written once for each of their names.
            apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
            aside.write_bytes(save(apart, metadata={"format": "pt"}))  # Its own `save_file` lets only the owner read.
        else:
            torch.save(dict(weights), aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
