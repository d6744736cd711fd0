"""The images a command trains on."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.stored_images import StoredImages


@contextmanager
def prepared_images(
    data: str,
    image_size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    *,
    network: str | None = None,
) -> Iterator[tuple[StoredImages, StoredImages]]:
    """Training and test images, at most so many: of a prepared file, or prepared for the length of the block.

    They are grey where the ``network`` of that name takes one channel.
    """
    from pipeline.datasets import prepare
    from pipeline.networks import takes_grey
    from pipeline.stored_images import StoredImages

    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        path = Path(data)
        if not path.is_file():
            path = Path(folder, "images.zarr.zip")
            prepare(data, path, root=download_folder(), image_size=image_size, progress=sys.stderr.isatty())
        train, test = StoredImages(path, "train", train_limit), StoredImages(path, "test", test_limit)
        if network is not None and train.image_shape[0] != 1 and takes_grey(network, len(train.classes)):
            train, test = train.in_grey(), test.in_grey()
        yield train, test


def download_folder() -> Path:
    """Where downloaded data sets are kept for all projects of this user."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "pipeline" if base else Path.home() / ".cache" / "pipeline"
