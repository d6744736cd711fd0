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
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.cluster.devices import format_device_set, parse_device_set
from pipeline.errors import InputError
from pipeline.links import canonical_link
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
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=2)] = (0.03125, 0.125, 0.25, 0.5, 0.75, 1.0)
    """Shares of a layer's kernels that are measured; the cost curve runs through them."""
    repetitions: Positive = 2
    """Measurements of each share, all of them kept; there are more where they differ."""


class Timing(Section):
    """The clock of the timing grid."""

    warmup: Annotated[int, Field(ge=0)] = 2
    """Steps before the clock starts."""
    repetitions: Positive = 5
    """Timed steps per cell, all of them kept."""
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
    """Timed steps per cell of this experiment; null takes timing.repetitions."""


class Accuracy(Section):
    """Training one network on one device and split, to compare the test accuracy."""

    network: Network = "50:500"
    """Network that is trained."""
    batch_size: Positive = 64
    """Images per step over all devices."""
    device_set: DeviceSet = "cpu + cpu@0.5"
    """Devices that train together."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("single", "kernel")
    """Strategies compared, on the same images, in the same order, from the same weights."""
    epochs: Positive = 3
    """Passes over the training images."""
    train_images: Positive | None = 4_000
    """Most training images used; null takes all."""
    test_images: Positive | None = 2_000
    """Most test images used; null takes all."""
    seed: int = 0
    """Seed of the initial weights and of the order of the images."""


class Simulation(Section):
    """A grid that is simulated from the calibrations: devices and links that need not be there."""

    networks: tuple[Network, ...] | None = None
    """Networks, each of which some experiment calibrates; null takes all of these."""
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32, 64, 256, 1024)
    """Images per step over all devices."""
    device_sets: tuple[Mix, ...] | None = None
    """Devices that train together, up to 1,024, as in 'gpu + 8 x cpu'; null takes 1 to 1,024 of each calibrated one."""
    links: Annotated[tuple[Link, ...], Field(min_length=1)] = (
        "loopback", "100Mbit/s+1ms", "1Gbit/s+0.1ms", "10Gbit/s+0.05ms", "100Gbit/s+0.01ms",
    )  # fmt: skip
    """Links between the devices: loopback as measured, or a rate and a delay."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = (
        "single", "ddp", "paper", "kernel", "batch", "auto",
    )  # fmt: skip
    """How the network is split over the devices."""
    described: Mapping[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"gpu": 5000.0})
    """Devices that are not there, by the GFLOP/s that they reach in convolutions: an assumption, not a measurement."""


def _default_experiments() -> dict[str, Experiment]:
    """The study in small, for two cores: four devices fit there at 0.45 of a core's speed each."""
    small, batch_sizes = ("50:500", "150:800"), (64,)
    return {
        "baseline": Experiment(
            question="How long is a step on one device, and how much of it is convolution?",
            networks=small,
            batch_sizes=batch_sizes,
            device_sets=("cpu", "cpu@0.45"),
            strategies=("single",),
        ),
        "devices": Experiment(
            question="What do two, three and four equal devices gain?",
            networks=small,
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu@0.45", "3 x cpu@0.45", "4 x cpu@0.45"),
            strategies=("paper", "kernel", "auto"),
        ),
        "strategies": Experiment(
            question="How do the strategies compare, on equal and on unequal devices?",
            networks=small,
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu", "cpu + cpu@0.5"),
            strategies=("ddp", "equal", "paper", "kernel", "batch", "auto"),
        ),
        "unequal": Experiment(
            question="What does the calibration gain where one device is much slower?",
            networks=("50:500",),
            batch_sizes=batch_sizes,
            device_sets=("cpu + cpu@0.25",),
            strategies=("equal", "paper", "kernel", "auto"),
        ),
        "links": Experiment(
            question="What does a slower link cost?",
            networks=("50:500",),
            batch_sizes=batch_sizes,
            device_sets=("2 x cpu",),
            links=("1Gbit/s+100us",),
            strategies=("paper", "kernel", "batch", "auto"),
        ),
        "headline": Experiment(
            question="What do four devices gain for the paper's largest network?",
            networks=("500:1500",),
            batch_sizes=(32,),
            device_sets=("4 x cpu@0.45",),
            strategies=("paper", "kernel", "auto"),
        ),
        "headline_baseline": Experiment(
            question="How long does one such device take for that network?",
            networks=("500:1500",),
            batch_sizes=(32,),
            device_sets=("cpu@0.45",),
            strategies=("single",),
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
    calibration: Calibration = Calibration()
    """How the time of each network segment is measured on each device."""
    timing: Timing = Timing()
    """The clock of the timing grid."""
    training: Training = Training()
    """Hyper-parameters of stochastic gradient descent: our own choice, the paper's are not known."""
    experiments: Annotated[Mapping[str, Experiment], Field(min_length=1)] = Field(default_factory=_default_experiments)
    """Named parts of the timing grid; the grid is their union."""
    accuracy: Accuracy = Accuracy()
    """Training one network on one device and split, to compare the test accuracy."""
    simulation: Simulation = Simulation()
    """A grid that is simulated from the calibrations."""

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


def grid(config: Config) -> dict[Cell, int]:
    """The timing grid: every cell of the experiments' union, in their order, with its number of timed steps.

    A cell that several experiments share is measured once, as often as the most demanding of them asks.
    """
    timed_steps: dict[Cell, int] = {}
    for experiment in config.experiments.values():
        for cell in _product(experiment):
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
    """Every device set of the configuration, each once, in its order."""
    listed = (text for experiment in config.experiments.values() for text in experiment.device_sets)
    return tuple(dict.fromkeys((*listed, config.accuracy.device_set)))


def calibration_source(config: Config, device_set: str) -> str:
    """The device set whose calibration serves `device_set`: the largest configured one that contains its devices.

    One calibration of '4 x cpu@0.45' so serves one to four such devices. The first of equally large sets wins.
    """
    needed = Counter(parse_device_set(device_set))
    candidates = (text for text in device_sets(config) if needed <= Counter(parse_device_set(text)))
    return max(candidates, key=lambda text: len(parse_device_set(text)), default=device_set)


def calibrations(config: Config) -> tuple[tuple[str, str], ...]:
    """Every (network, device set) that is calibrated: what the grid and the accuracy runs need, each once."""
    needed = [(cell.network, cell.device_set) for cell in cells(config)]
    needed.append((config.accuracy.network, config.accuracy.device_set))
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
        raise InputError(_sentence(error, name)) from error


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


def _sentence(error: ValidationError, name: str) -> str:
    """The first problem in one sentence; an unknown key goes first, as it often causes the others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    place = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"Unknown key {place} in {name}: {_suggestion(str(problem['loc'][-1]), problem['loc'][:-1])}"
    if problem["type"] == "missing":
        return f"The key {place} is missing in {name}."
    if not place:
        return f"{name} is {problem['input']!r}, where a mapping of keys to values belongs."
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return f"{place} in {name}: {str(cause).rstrip('.')}."
    reason = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{place} in {name} is {problem['input']!r}, but {reason.replace('input should', 'it should')}."


def _place(location: tuple[int | str, ...]) -> str:
    """('experiments', 'small', 'batch_sizes', 0) as 'experiments.small.batch_sizes[0]'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _suggestion(key: str, parents: tuple[int | str, ...]) -> str:
    """What was probably meant: a like key at the same place, else one elsewhere, else all that the place may have."""
    known = list(_section_at(parents).model_fields)
    if near := get_close_matches(key, known, n=3):
        return f"did you mean {' or '.join(near)}?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in _key_paths(Config)}
    if near := get_close_matches(key, elsewhere, n=1):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known there are {', '.join(known)}."


def _section_at(parents: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = Config
    for parent in parents:
        field = section.model_fields.get(str(parent))
        section = (_as_section(field.annotation) if field else None) or Experiment
    return section


def _key_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if part := _as_section(field.annotation):
            yield from _key_paths(part, f"{prefix}{name}.")


def _as_section(annotation: object) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
