"""The version of this package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """As it was installed, such as 0.1.0; "unknown" where it was not."""
    try:
        return version("pipeline")
    except PackageNotFoundError:
        return "unknown"
