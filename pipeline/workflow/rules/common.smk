"""The checked configuration, how its values reach the commands, and an orderly start."""

import re
import sys
from pathlib import Path
from shlex import quote

import yaml

from pipeline.config import (
    calibration_source,
    calibrations,
    device_sets,
    gpus_needed,
    groups,
    left_out,
    load_config,
    slug,
    with_gpus_counted,
)
from pipeline.errors import InputError
from pipeline.workflow import progress, session
from pipeline.workflow.code import code_digest
from pipeline.workflow.parts import parts_of

try:
    STUDY = with_gpus_counted(load_config(config))
except InputError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
config.update(STUDY.model_dump(mode="json"))

session.adopt_jobs()
if workflow.is_main_process:
    session.clear_after_kill()
    if left_out(STUDY):
        print(f"Left out, as there are {STUDY.gpus} GPUs: {', '.join(left_out(STUDY))}.", file=sys.stderr)

OUT = STUDY.outputs
LOGS = f"{OUT}/logs"
ENVIRONMENT = f"../../../envs/{'gpu' if any(map(gpus_needed, device_sets(STUDY))) else 'cpu'}.yaml"

FOLDER = Path(workflow.basedir, "pipeline", "workflow")

GROUPS = groups(STUDY)
CALIBRATIONS = {f"{slug(network)}/{slug(devices)}": (network, devices) for network, devices in calibrations(STUDY)}

# Every figure has a caption of its name; the headline is a table, the study the first page.
FIGURES = sorted({path.stem for path in (FOLDER / "report").glob("*.rst")} - {"headline", "study"})


def options(**values):
    """The values as command line options: `image_size=32` is `--image-size 32`; none for None, several for a tuple."""
    listed = ((name, value if isinstance(value, tuple) else (value,)) for name, value in values.items())
    given = ((name, one) for name, several in listed for one in several if one is not None)
    return " ".join(f"--{name.replace('_', '-')} {quote(str(one))}" for name, one in given)


def parts_to_do():
    """What the jobs of this run will make, job by job."""
    jobs = workflow.dag.needrun_jobs()
    return [part for job in jobs for part in parts_of(STUDY, job.rule.name, job.wildcards_dict, list(job.output))]


def calibration_of(network, device_set):
    """The file of the calibration that serves the device set."""
    source = calibration_source(STUDY, device_set)
    return f"{OUT}/calibration/{slug(network)}/{slug(source)}.zarr.zip"


def simulation_calibrations():
    """The files of all calibrations of the networks that are simulated."""
    networks = STUDY.simulation.networks or {cell.network for group in GROUPS.values() for cell in group.cells}
    return [f"{OUT}/calibration/{name}.zarr.zip" for name, (network, _) in CALIBRATIONS.items() if network in networks]


def group_calibration(wildcards):
    """The file of the calibration that serves the devices of a group of cells."""
    cell = GROUPS[wildcards.group].cells[0]
    return calibration_of(cell.network, cell.device_set)


def group_options(wildcards):
    """All that the measurement of a group of cells depends on."""
    group = GROUPS[wildcards.group]
    cell = group.cells[0]
    return options(
        network=cell.network,
        batch_size=cell.batch_size,
        devices=cell.device_set,
        link=cell.link,
        strategy=tuple(one.strategy for one in group.cells),
        warmup=STUDY.timing.warmup,
        rounds=STUDY.timing.rounds,
        repetitions=group.timed_steps,
        seconds=STUDY.timing.seconds,
        seed=STUDY.timing.seed,
        learning_rate=STUDY.training.learning_rate,
        momentum=STUDY.training.momentum,
        scheduler=STUDY.scheduler,
    )


wildcard_constraints:
    group="|".join(map(re.escape, GROUPS)),
    calibration="|".join(map(re.escape, CALIBRATIONS)),
