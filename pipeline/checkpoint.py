"""Trained weights as a file that other programs read: a state dict, by torch or as safetensors.

The file also says what the weights belong to: see `Description`. In a safetensors file that is its metadata; in one of
torch it is the attribute ``description`` of the ordered dictionary, which ``torch.load(..., weights_only=True)`` gives.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import InputError, first_line
from pipeline.files import written_whole
from pipeline.version import package_version

SAFETENSORS = ".safetensors"
_ATTRIBUTE = "description"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What weights say of themselves, so that images can be classified with them; None for what is not known."""

    network: str | None = None
    """As `train` takes it: K1:K2, a torchvision name, or package.module:factory."""
    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, ..."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, height and width."""
    resized: bool | None = None
    """Whether images of other sizes were resized to that."""
    mean: tuple[float, ...] | None = None
    """Per channel, of pixel values taken as 0 to 1; subtracted from them."""
    std: tuple[float, ...] | None = None
    """Per channel; what is then divided by."""
    version: str | None = None
    """Of this package, that wrote the weights."""

    @classmethod
    def of(cls, dataset: Any, network: str | None, image: Any = None) -> Description:
        """What a data set tells: by its attributes ``classes``, ``image_shape``, ``resized`` and ``normalisation``.

        ``image`` is a batch ``x_BCHW`` for a data set that does not tell the shape.
        """
        classes = getattr(dataset, "classes", None)
        named = isinstance(classes, Sequence) and all(isinstance(one, str) for one in classes) and len(classes) > 0
        shape = getattr(dataset, "image_shape", None)
        if shape is None and isinstance(image, torch.Tensor) and image.dim() == 4:
            shape = tuple(image.shape[1:])
        mean, std = getattr(dataset, "normalisation", None) or (None, None)
        return cls(
            network=network,
            classes=tuple(classes) if classes is not None and named else None,
            image_shape=shape,
            resized=getattr(dataset, "resized", None),
            mean=None if mean is None else tuple(map(float, mean)),
            std=None if std is None else tuple(map(float, std)),
            version=package_version(),
        )

    def texts(self) -> dict[str, str]:
        """Each known value as JSON, by its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: json.dumps(value) for name, value in values.items() if value is not None}

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> Description:
        """What ``texts`` gave; raises ``ValueError`` for what it cannot have given."""
        read = {field.name: json.loads(texts[field.name]) for field in fields(cls) if field.name in texts}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in read.items()
        }
        return cls(**values)


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


def write_weights(weights: Mapping[str, torch.Tensor], path: Path, description: Description | None = None) -> None:
    """Write a state dict, and what it belongs to, so that the file is either whole or not there.

    As safetensors where the name ends so, else by torch for ``torch.load(..., weights_only=True)``.
    """
    texts = (description or Description(version=package_version())).texts()
    with written_whole(path) as aside:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import save

            # The format knows no shared memory: tied weights are written once for each of their names.
            apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
            aside.write_bytes(save(apart, metadata={"format": "pt", **texts}))  # `save_file`: only the owner reads it.
        else:
            described = OrderedDict(weights)
            setattr(described, _ATTRIBUTE, texts)
            torch.save(described, aside)


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], Description]:
    """A state dict and what its file says of it, which is nothing where another program wrote it.

    Raises:
        InputError: The file does not exist, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights '{path}' do not exist: give a file that `train --checkpoint` wrote")
    weights: Any
    try:
        if path.suffix == SAFETENSORS:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                texts = dict(file.metadata() or ())
        else:
            weights = torch.load(path, weights_only=True, map_location="cpu")
            texts = getattr(weights, _ATTRIBUTE, {})
        if not isinstance(weights, dict) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
            raise InputError(f"weights '{path}' cannot be read: the file holds no state dict")
        return dict(weights), Description.of_texts(texts)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"weights '{path}' cannot be read: {first_line(error)}") from error
