"""A process that trains one network after the other on a cluster of its own, and sends a record of each."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from distributed import Client

import pipeline
from pipeline._torchvision import make_importable
from pipeline.errors import InputError, first_line
from tests.zoo.judging import TOLERANCE, Record, farthest, judge, worse, worst
from tests.zoo.networks import NETWORKS
from tests.zoo.specimen import Specimen
from tests.zoo.training import (
    DEVICES,
    STRATEGIES,
    by_engine,
    by_moved_loops,
    by_plain_loop,
    captured,
    opaque_parts,
    split_part,
)


def train(names: Sequence[str], records: Connection) -> None:
    """Send a record of each network, in order; stops after one that crashed, as the cluster may not be whole then."""
    os.setpgrp()
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_importable()  # timm imports torchvision
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with pipeline.local_cluster(DEVICES, dashboard=False) as client:
        for name in names:
            record = record_of(NETWORKS[name], client)
            records.send(record)
            if record["verdict"] == "crashed":
                break
    records.close()


def record_of(specimen: Specimen, client: Client) -> Record:
    """What comes of training a network both ways; an error is a verdict, too."""
    record: Record = {
        "network": specimen.name, "package": specimen.package, "version": specimen.version, "note": specimen.note,
        "difference": {}, "moved": {}, "split": {}, "farthest": {},
    }  # fmt: skip
    by = "before the engine"
    try:
        record["parameters"] = sum(parameter.numel() for parameter in specimen.build().parameters())
        right = by_plain_loop(specimen)
        by = "by the engine"
        graph, record["capture_s"] = captured(specimen)
        verdicts = []
        moved: dict[str, float] = {}
        for strategy in STRATEGIES:
            trained, plan = by_engine(specimen, client, strategy)
            record["split"][strategy] = split_part(graph, plan)
            record["opaque"] = opaque_parts(graph, plan)
            apart = trained.apart(right)
            record["difference"][strategy] = worst(apart)
            record["farthest"][strategy] = farthest(apart)
            if not worst(apart) <= TOLERANCE:
                moved = moved or by_moved_loops(specimen, right)
                record["moved"][strategy] = moved.get(farthest(apart), 0.0)
            verdicts.append(judge(apart, moved))
        record["verdict"] = worse(verdicts)
    except InputError as error:
        record |= {"verdict": "refused", "sentence": str(error)}
    except Exception as error:  # noqa: BLE001 -- whatever a network meets is the finding
        record |= {"verdict": "crashed", "sentence": f"{by}: {type(error).__name__}: {first_line(error)}"}
    return record
