"""What the paper states, the only numbers of an analysis that are typed by hand.

Source: Marques, Falcao, Alexandre: Distributed learning of CNNs on heterogeneous CPU/GPU architectures,
arXiv 1712.02546, abstract.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 1712.02546"
CONVOLUTION_SHARE = (0.6, 0.9)
"""Fraction of the training time that convolutions take."""


class Claim(NamedTuple):
    """One speedup of the abstract, for the network of 500 and 1500 kernels; its batch size is not known."""

    device_kind: str
    device_count: int
    speedup: float
    network: str = "500:1500"


CLAIMS = (Claim("cpu", 4, 3.28), Claim("gpu", 3, 2.45))
