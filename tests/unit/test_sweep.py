"""The links of a simulated grid."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.graph.trace import trace
from pipeline.links import parse_link
from pipeline.networks import network
from pipeline.simulation.sweep import _uniform
from tests.synthetic import calibration_of


def test_a_link_by_its_rate_takes_what_sending_takes_besides() -> None:
    graph = trace(network("4:8"), torch.zeros(2, 3, 32, 32))
    calibration = calibration_of(graph, ["cpu", "cpu", "cpu"])
    calibration.link_latency[0, 1] *= 0.5
    calibration.link_bandwidth[0, 2] *= 4
    apart = ~np.eye(3, dtype=bool)
    latency, per_byte = calibration.link_latency.values[apart], 1 / calibration.link_bandwidth.values[apart]
    links = _uniform([calibration], {name: parse_link(name) for name in ("loopback", "1Gbit/s+1ms")})
    assert links.latency.ravel().tolist() == [np.median(latency), 1e-3 + latency.min()]
    assert links.seconds_per_byte.ravel().tolist() == [np.median(per_byte), 8e-9 + per_byte.min() / 2]
    assert links.has_software, "so that a prediction does not add it once more"
