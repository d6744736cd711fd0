"""Makes `import torchvision` work beside a CPU build of torch.

The wheel on PyPI needs CUDA libraries. Where its extension cannot load, `import torchvision` ends in "operator
torchvision::nms does not exist" (pytorch/vision#9337), although data sets, transforms and classification models need
no such operator. Declaring the two schemas it looks up is enough.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# A Library takes its definitions back when it is collected, so it stays referenced for the life of the process.
_declared: list[torch.library.Library] = []
_lock = threading.Lock()


def make_importable() -> None:
    """Call before any `import torchvision`, also where one is implied, such as unpickling one of its models.

    Does nothing where torchvision's extension loads or torchvision is not installed. May be called any number of times.
    """
    with _lock:
        if _declared or _extension_loads():
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + _NMS)
        _declared.append(library)


def _extension_loads() -> bool:
    """Try what torchvision itself does first; needed beforehand, since a failed import leaves half a package behind."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    finder = importlib.machinery.FileFinder(package.submodule_search_locations[0], loader)
    extension = finder.find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


class Importable:
    """Goes ahead of a torchvision model in a pickle, and makes torchvision importable where it is read."""

    def __reduce__(self) -> tuple[Callable[[], Importable], tuple[()]]:
        return _importable, ()


def _importable() -> Importable:
    make_importable()
    return Importable()
