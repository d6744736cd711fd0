"""The configuration of the study: one source of its defaults, its JSON schema and its checks.

A configuration names experiments; each is a product of networks, batch sizes, device sets, links and strategies, and
the timing grid is their union. What the paper leaves open (learning rate, batch sizes, devices, ...) is our own choice.
After a change here, `python -m pipeline.workflow.schema` writes the schema and the default configuration file anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.cluster.devices import format_device_set, parse_device_set, visible_gpus
from pipeline.errors import InputError
from pipeline.links import canonical_link
from pipeline.refusals import sentence
from pipeline.simulation.mixes import parse_mix

Strategy = Literal["single", "ddp", "equal", "paper", "kernel", "batch", "auto"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_STUDY_NETWORK = re.compile(r"[1-9]\d*:[1-9]\d*")


def _network_name(value: object) -> object:
    if isinstance(value, int):
        raise InputError(
            f"a network is text such as '50:500', not {value}: YAML reads a bare 8:16 as a number of base 60"
        )
    if isinstance(value, str) and not _STUDY_NETWORK.fullmatch(value):
        from pipeline.networks import check_name  # imports torch, which the study's own networks need not wait for

        check_name(value)
    return value


def _device_set(text: str) -> str:
    return format_device_set(parse_device_set(text))


Network = Annotated[str, BeforeValidator(_network_name)]


def _mix(text: str) -> str:
    parse_mix(text)
    return text


def _each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if twice := [one for one in values if values.count(one) > 1]:
        raise InputError(f"{twice[0]} stands there twice: name each once")
    return values


Mix = Annotated[str, AfterValidator(_mix)]
DeviceSet = Annotated[str, AfterValidator(_device_set)]
Link = Annotated[str, AfterValidator(canonical_link)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Calibration(Section):
    """How the time of each network segment is measured on each device."""

    batch_size: Positive = 64
    """Most images per measured segment; networks with much work per image are measured with fewer."""
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=2)] = (0.03125, 0.125, 0.25, 0.5, 1.0)
    """Shares of a layer's kernels that are measured; the cost curve runs through them."""
    repetitions: Positive = 2
    """Measurements of each share, all of them kept; there are more where they differ."""


class Timing(Section):
    """The clock of the timing grid."""

    warmup: Annotated[int, Field(ge=0)] = 2
    """Steps before the clock starts, in each round."""
    rounds: Positive = 3
    """The strategies of one place are timed in turn, so often; once where all steps take long."""
    repetitions: Positive = 5
    """Timed steps per cell at least, over all rounds, all of them kept."""
    seconds: Annotated[float, Field(ge=0, le=600)] = 3.0
    """Short steps are repeated for about so many s, not too often, as other work of a host comes in bursts."""
    seed: int = 0
    """Seed of the initial weights and of the order of the images."""


class Training(Section):
    """Hyper-parameters of stochastic gradient descent: our own choice, the paper's are not known."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""


class Experiment(Section):
    """One named part of the timing grid: every combination of what it lists."""

    question: str = ""
    """What the experiment is to answer."""
    networks: Annotated[tuple[Network, ...], Field(min_length=1)]
    """Kernels of the two convolutions, as in '50:500', torchvision names, or your own as 'package.module:factory'."""
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Images per step over all devices."""
    device_sets: Annotated[tuple[DeviceSet, ...], Field(min_length=1)]
    """Devices that train together, as in '4 x cpu@0.45' or 'gpu + 2 x cpu'; 'default' takes those of this machine."""
    links: Annotated[tuple[Link, ...], Field(min_length=1)] = ("loopback",)
    """Links between the devices: loopback as it is, or emulated ones such as 1Gbit/s+0.1ms."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)]
    """How the network is split over the devices."""
    repetitions: Positive | None = None
    """Timed steps per cell of this experiment at least; null takes timing.repetitions."""


class Accuracy(Section):
    """Training one network on one device and split, for several seeds, to compare the test accuracy."""

    network: Network = "16:64"
    """Network that is trained; a small one, so that many trainings take little time: our own choice."""
    batch_size: Positive = 64
    """Images per step over all devices."""
    device_set: DeviceSet = "cpu + cpu@0.5"
    """Devices that train together."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1), AfterValidator(_each_once)] = STRATEGIES
    """Strategies compared, on the same images, in the same order, from the same weights."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_each_once)] = (0, 1, 2)
    """Seeds, each of the initial weights and of the order of the images."""
    epochs: Positive = 3
    """Passes over the training images."""
    train_images: Positive | None = 1_920
    """Most training images used; null takes all."""
    test_images: Positive | None = 1_000
    """Most test images used; null takes all."""


class Miscalibration(Section):
    """Steps planned from a calibration in which one device is judged too slow or too fast, run as they are."""

    network: Network = "50:500"
    """Network that is trained."""
    batch_size: Positive = 64
    """Images per step over all devices."""
    device_set: DeviceSet = "cpu + cpu@0.5"
    """Devices that train together."""
    device: Annotated[int, Field(ge=0)] = 1
    """The device that is misjudged, by its place in the set; 0 is the first."""
    errors: Annotated[tuple[Annotated[float, Field(gt=-1)], ...], Field(min_length=1)] = (
        -0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5,
    )  # fmt: skip
    """Errors of the device's judged time: 0.5 judges it to take half as long again, -0.5 half as long."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("paper", "kernel")
    """Strategies that plan by the calibration."""


class Simulation(Section):
    """A grid that is simulated from the calibrations: devices and links that need not be there."""

    networks: tuple[Network, ...] | None = None
    """Networks, each of which some experiment calibrates; null takes all of these."""
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64, 256, 1024)
    """Images per step over all devices."""
    device_sets: tuple[Mix, ...] | None = None
    """Devices that train together, up to 1,024, as in 'gpu + 8 x cpu'; null takes 1 to 1,024 of each calibrated and of
    the first described one, and each described one alone and beside one and four calibrated CPUs."""
    links: Annotated[tuple[Link, ...], Field(min_length=1)] = (
        "loopback",
        *(
            f"{rate}bit/s{delay}"
            for rate in ("10M", "100M", "1G", "10G", "100G")
            for delay in ("", "+100us", "+1ms", "+10ms", "+50ms")
        ),
    )
    """Links between the devices: loopback as measured, or a rate and a delay."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = (
        "single", "ddp", "paper", "kernel", "batch", "auto",
    )  # fmt: skip
    """How the network is split over the devices."""
    described: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {
            "gpu": 5000.0, "gpu-0.3T": 300.0, "gpu-0.5T": 500.0, "gpu-1T": 1000.0, "gpu-2T": 2000.0, "gpu-3T": 3000.0,
            "gpu-10T": 10000.0, "gpu-20T": 20000.0, "gpu-50T": 50000.0, "gpu-200T": 200000.0,
        }
    )  # fmt: skip
    """Devices that are not there, by the GFLOP/s that they reach in convolutions: an assumption, not a measurement."""


def _default_experiments() -> dict[str, Experiment]:
    """The study in small, for two cores: four devices fit there at 0.45 of a core's speed each."""
    small, batch_sizes = ("50:500", "150:800"), (64,)
    return {
        "convolution": Experiment(
            question="1. How much of a step on one device is convolution?",
            networks=small,
            batch_sizes=batch_sizes,
            device_sets=("cpu", "cpu@0.45"),
            strategies=("single",),
        ),
        "devices": Experiment(
            question="2. What do two, three and four equal devices gain?",
            networks=("150:800",),
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu@0.45", "3 x cpu@0.45", "4 x cpu@0.45"),
            strategies=("paper", "kernel"),
        ),
        "devices_small": Experiment(
            question="2 and 4. And what do they gain for a smaller network?",
            networks=("50:500",),
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu@0.45", "4 x cpu@0.45"),
            strategies=("paper", "kernel"),
        ),
        "headline": Experiment(
            question="2. What do four devices gain for the paper's largest network?",
            networks=("500:1500",),
            batch_sizes=(32,),
            device_sets=("4 x cpu@0.45",),
            strategies=("paper", "kernel"),
        ),
        "headline_baseline": Experiment(
            question="1 and 2. How long does one such device take for that network, and how much is convolution?",
            networks=("500:1500",),
            batch_sizes=(32,),
            device_sets=("cpu@0.45",),
            strategies=("single",),
        ),
        "size": Experiment(
            question="4. Where does splitting start to pay, over network size and batch size?",
            networks=small,
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu",),
            strategies=("ddp", "equal", "paper", "kernel", "batch", "auto"),
        ),
        "links": Experiment(
            question="5. What does a slower link cost?",
            networks=("50:500",),
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu",),
            links=("1Gbit/s+100us",),
            strategies=("paper", "kernel", "batch", "auto"),
        ),
        "unequal": Experiment(
            question="6. What do calibrated shares gain over equal ones, from devices of one speed to 1:0.1?",
            networks=("50:500",),
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu", "cpu + cpu@0.5", "cpu + cpu@0.25", "cpu + cpu@0.1"),
            strategies=("equal", "paper", "kernel", "auto"),
        ),
        "ideas": Experiment(
            question="9. What does each idea bring, from paper to auto, on unequal devices?",
            networks=small[:1],
            batch_sizes=batch_sizes,
            device_sets=("cpu + cpu@0.5",),
            strategies=("equal", "paper", "kernel", "batch", "auto"),
        ),
    }


class Config(Section):
    """The whole configuration of the workflow."""

    data: str = "auto"
    """Images to train on: auto (CIFAR-10 or digits), cifar10, digits, a folder, or torchvision:NAME:FOLDER."""
    image_size: Positive | None = None
    """Height and width that images of a folder are resized to; null keeps them."""
    outputs: Annotated[str, Field(min_length=1)] = "outputs"
    """Folder the results are written to."""
    scheduler: str | None = None
    """Address or scheduler file of a running Dask cluster; null starts one on this machine for each job."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """How many GPUs there are: device sets that need more are left out; null counts those of this machine when a study
    with GPUs starts, or leaves nothing out where a scheduler is named."""
    calibration: Calibration = Calibration()
    """How the time of each network segment is measured on each device."""
    timing: Timing = Timing()
    """The clock of the timing grid."""
    training: Training = Training()
    """Hyper-parameters of stochastic gradient descent: our own choice, the paper's are not known."""
    experiments: Annotated[Mapping[str, Experiment], Field(min_length=1)] = Field(default_factory=_default_experiments)
    """Named parts of the timing grid, which is their union. The numbers are those of the study's questions: 3 is
    answered by gpu.yaml where there are GPUs and by the simulation elsewhere, 7 by accuracy, 8 by the simulation."""
    accuracy: Accuracy = Accuracy()
    """7. Is the classification unchanged? One network trained on one device and split, for several
    seeds, to compare the test accuracy."""
    miscalibration: Miscalibration = Miscalibration()
    """6. What does a wrong calibration lose? Steps planned from one that misjudges a device."""
    simulation: Simulation = Simulation()
    """3, 5 and 8. More devices, GPUs and other links: a grid that is simulated from the calibrations."""

    @model_validator(mode="after")
    def _needs_no_more_gpus_than_there_are(self) -> Self:
        if self.gpus == 0 and (without := left_out(self)):
            raise InputError(
                f"the experiments measure {', '.join(without)}, but there is no GPU here: run the study where one is "
                "visible, or name the scheduler of a cluster that has one"
            )
        for name, device_set in {
            "accuracy": self.accuracy.device_set,
            "miscalibration": self.miscalibration.device_set,
        }.items():
            if not is_there(self, device_set):
                raise InputError(
                    f"{name}.device_set {device_set} needs {gpus_needed(device_set)} GPUs, but there are {self.gpus}"
                )
        return self

    @model_validator(mode="after")
    def _misjudges_a_device_of_the_set(self) -> Self:
        if self.miscalibration.device >= (ranks := len(parse_device_set(self.miscalibration.device_set))):
            raise InputError(
                f"miscalibration.device {self.miscalibration.device} is not in {self.miscalibration.device_set}, whose "
                f"devices are 0 to {ranks - 1}"
            )
        return self

    @model_validator(mode="after")
    def _simulates_what_is_calibrated(self) -> Self:
        known = dict.fromkeys(network for network, _ in calibrations(self))
        for network in self.simulation.networks or ():
            if network not in known:
                raise InputError(
                    f"simulation.networks has {network}, which no experiment measures; there are {', '.join(known)}"
                )
        return self


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the timing grid."""

    network: str
    batch_size: int
    device_set: str
    link: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.strategy} on {self.device_set}: {self.network}, batch {self.batch_size}, {self.link}"

    @property
    def folder(self) -> str:
        """Relative path of the folder that holds the cell's file, named by its strategy: one level per coordinate."""
        return f"{slug(self.network)}/batch-{self.batch_size}/{slug(self.device_set)}/{slug(self.link)}"


def slug(text: str) -> str:
    """The text as a file name: '50:500' becomes '50-500', '2 x cpu@0.45 + gpu' becomes '2xcpu@0.45+gpu'."""
    return "".join(c if c.isalnum() or c in "@.+_" else "-" for c in text.replace(" ", ""))


def gpus_needed(device_set: str) -> int:
    """How many GPUs a machine needs for the device set: ordinals count from 0."""
    return max((device.index + 1 for device in parse_device_set(device_set) if device.kind == "gpu"), default=0)


def is_there(config: Config, device_set: str) -> bool:
    """Whether there are GPUs enough for the device set."""
    return config.gpus is None or gpus_needed(device_set) <= config.gpus


def left_out(config: Config) -> tuple[str, ...]:
    """The device sets of the experiments that need more GPUs than there are."""
    listed = (text for experiment in config.experiments.values() for text in experiment.device_sets)
    return tuple(dict.fromkeys(text for text in listed if not is_there(config, text)))


def with_gpus_counted(config: Config) -> Config:
    """The configuration with the number of GPUs of this machine, if it names GPUs and neither that nor a cluster.

    Raises:
        InputError: It needs a GPU, and none is visible.
    """
    listed = (text for experiment in config.experiments.values() for text in experiment.device_sets)
    sets = (*listed, config.accuracy.device_set, config.miscalibration.device_set)
    if config.gpus is not None or config.scheduler is not None or not any(map(gpus_needed, sets)):
        return config
    return load_config(config.model_dump(mode="json") | {"gpus": visible_gpus()})


def grid(config: Config) -> dict[Cell, int]:
    """The timing grid: every cell of the experiments' union, in their order, with its number of timed steps.

    A cell that several experiments share is measured once, as often as the most demanding of them asks.
    """
    timed_steps: dict[Cell, int] = {}
    for experiment in config.experiments.values():
        for cell in _product(experiment):
            if not is_there(config, cell.device_set):
                continue
            steps = experiment.repetitions or config.timing.repetitions
            timed_steps[cell] = max(steps, timed_steps.get(cell, 0))
    return timed_steps


class Group(NamedTuple):
    """Cells that differ in their strategy alone: they are measured one after the other on the same cluster."""

    cells: tuple[Cell, ...]
    timed_steps: int
    """Of each, the most that any of them needs."""

    def __str__(self) -> str:
        return f"{', '.join(cell.strategy for cell in self.cells)}{str(self.cells[0])[len(self.cells[0].strategy) :]}"


def groups(config: Config) -> dict[str, Group]:
    """The cells of the grid by their folder."""
    found: dict[str, Group] = {}
    for cell, timed_steps in grid(config).items():
        before = found.get(cell.folder, Group((), 0))
        found[cell.folder] = Group((*before.cells, cell), max(before.timed_steps, timed_steps))
    return found


def cells(config: Config) -> tuple[Cell, ...]:
    """The cells of the timing grid."""
    return tuple(grid(config))


def device_sets(config: Config) -> tuple[str, ...]:
    """Every device set of the configuration that is there, each once, in its order."""
    listed = (text for experiment in config.experiments.values() for text in experiment.device_sets)
    every = (*listed, config.accuracy.device_set, config.miscalibration.device_set)
    return tuple(text for text in dict.fromkeys(every) if is_there(config, text))


def calibration_source(config: Config, device_set: str) -> str:
    """The device set whose calibration serves `device_set`: the first configured one of the same devices.

    What devices take from each other, and wait for each other, depends on how many they are. One device alone is
    measured in every calibration that it is in, so the largest configured set with it serves.
    """
    needed = Counter(parse_device_set(device_set))
    counted = {text: Counter(parse_device_set(text)) for text in device_sets(config)}
    if needed.total() > 1:
        return next((text for text, devices in counted.items() if devices == needed), device_set)
    candidates = (text for text, devices in counted.items() if needed <= devices)
    return max(candidates, key=lambda text: counted[text].total(), default=device_set)


def calibrations(config: Config) -> tuple[tuple[str, str], ...]:
    """Every (network, device set) that is calibrated: what the grid and the other runs need, each once."""
    needed = [(cell.network, cell.device_set) for cell in cells(config)]
    needed += [(one.network, one.device_set) for one in (config.accuracy, config.miscalibration)]
    return tuple(dict.fromkeys((network, calibration_source(config, text)) for network, text in needed))


def load_config(source: str | Path | Mapping[str, Any]) -> Config:
    """The checked configuration from a YAML file or a mapping, with defaults for what it leaves out.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value is wrong; names the key and its place.
    """
    if isinstance(source, str | Path):
        name, content = str(source), _read_yaml(Path(source))
    else:
        name, content = "the configuration", source
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(sentence(error, name, Config)) from error


def _product(experiment: Experiment) -> Iterator[Cell]:
    for network in experiment.networks:
        for batch_size in experiment.batch_sizes:
            for device_set in experiment.device_sets:
                for link in experiment.links:
                    for strategy in experiment.strategies:
                        yield Cell(
                            network=network, batch_size=batch_size, device_set=device_set, link=link, strategy=strategy
                        )


def _read_yaml(path: Path) -> object:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The configuration {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return {} if content is None else content
