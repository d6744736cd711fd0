"""All networks of the zoo, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.zoo import (
    monai_networks,
    pytorchcv_networks,
    smp_networks,
    timm_networks,
    torchvision_networks,
    transformers_networks,
)
from tests.zoo.specimen import Specimen

_PACKAGES = (
    timm_networks,
    torchvision_networks,
    pytorchcv_networks,
    smp_networks,
    monai_networks,
    transformers_networks,
)


def _all() -> dict[str, Specimen]:
    found: dict[str, Specimen] = {}
    for package in _PACKAGES:
        for specimen in package.NETWORKS:
            if specimen.name in found:
                raise ValueError(f"two networks of the zoo are called {specimen.name}")
            found[specimen.name] = specimen
    return found


NETWORKS: Mapping[str, Specimen] = _all()
