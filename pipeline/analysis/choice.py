"""What `auto` takes beside the fastest other strategy, how far measurements differ, and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.results.contracts import INDEX, OK

Samples = npt.NDArray[np.float64]

TOLERATED = 1.03
"""So many times the fastest other strategy `auto` may take."""


class Choice(NamedTuple):
    """What `auto` came to at one place of the grid."""

    network: str
    batch_size: int
    device_set: str
    link: str
    chosen: str
    """The strategy whose plan `auto` took, `auto` where it mixed several; '' where that was not recorded."""
    fastest: str
    """The other strategy with the least median step."""
    ratio: float
    """Median step of `auto` over that of the fastest."""
    low: float
    high: float
    """Ends of the bootstrap interval of the ratio."""
    rounds: int
    """In how many rounds both were timed; of one, the interval holds nothing of what differs between launches."""
    medians: Mapping[str, float]
    """Median step of every strategy in s."""
    same: bool
    """Whether `auto` came to the very plan of the fastest, and both are the same steps."""

    @property
    def exceeds(self) -> bool:
        """Whether `auto` takes more than is tolerated, beyond the spread of the repetitions."""
        return self.low > TOLERATED


def auto_against_fastest(
    timing: xr.Dataset, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Choice]:
    """What `auto` takes over the fastest other strategy, wherever it was measured beside one.

    For the interval whole rounds are drawn, the same of both strategies, and steps within each: a host that is slower
    for a while is so for all strategies of a round.
    """
    steps = timing["step_time"].where(timing["status"] == OK).transpose(*INDEX, "repetition")
    rounds = _rounds(timing).transpose(*INDEX, "repetition")
    found: list[Choice] = []
    for place in np.ndindex(steps.shape[:4]):
        times = {
            str(name): _by_round(steps.values[place][index], rounds.values[place][index])
            for index, name in enumerate(steps["strategy"].values)
            if np.isfinite(steps.values[place][index]).any()
        }
        medians = {name: float(np.median(np.concatenate(list(some.values())))) for name, some in times.items()}
        others = {name: took for name, took in medians.items() if name != "auto"}
        if "auto" not in medians or not others:
            continue
        fastest = min(others, key=lambda name: others[name])
        low, high = _interval(times["auto"], times[fastest], level, resamples, seed)
        network, batch_size, device_set, link = (
            steps[name].values[at] for name, at in zip(INDEX[:4], place, strict=True)
        )
        here = {"network": network, "batch_size": batch_size, "device_set": device_set, "link": link}
        found.append(
            Choice(
                network=str(network),
                batch_size=int(batch_size),
                device_set=str(device_set),
                link=str(link),
                chosen=str(timing["chosen"].sel(here | {"strategy": "auto"}).item()) if "chosen" in timing else "",
                fastest=fastest,
                ratio=medians["auto"] / medians[fastest],
                low=low,
                high=high,
                rounds=len(times["auto"].keys() & times[fastest].keys()),
                medians=medians,
                same=all(np.array_equal(times["auto"][one], times[fastest].get(one, ())) for one in times["auto"]),
            )
        )
    return found


def repeatability(timing: xr.Dataset) -> xr.Dataset:
    """How far the rounds of each cell differ, over the cells of the grid; NaN where there are fewer than two.

    `forecast_error` is what a forecast of a round's median step by that of the cell's other rounds is off by, whichever
    its sign, the mean over the rounds. It is no bound: a round has fewer steps than the cell that a prediction is held
    against, so that may be off by less. `between_rounds` is the highest less the lowest median of a round over the
    median of the cell.
    """
    steps = timing["step_time"].where(timing["status"] == OK).transpose(*INDEX, "repetition")
    rounds = _rounds(timing).transpose(*INDEX, "repetition").values
    found = np.full((2, *steps.shape[:5]), np.nan)
    for place in np.ndindex(steps.shape[:5]):
        times = _by_round(steps.values[place], rounds[place])
        if len(times) > 1:
            medians = [float(np.median(one)) for one in times.values()]
            others = [np.concatenate([some for at, some in times.items() if at != one]) for one in times]
            off = [abs(float(np.median(rest)) / median - 1) for rest, median in zip(others, medians, strict=True)]
            cell = float(np.median(np.concatenate(list(times.values()))))
            found[(slice(None), *place)] = np.mean(off), (max(medians) - min(medians)) / cell
    names = {"forecast_error": "error of a forecast by the other rounds", "between_rounds": "spread of the rounds"}
    result = xr.Dataset({name: (INDEX, one) for name, one in zip(names, found, strict=True)}, steps.coords)
    for name, long_name in names.items():
        result[name].attrs = {"units": "1", "long_name": long_name}
    return result.drop_vars("repetition", errors="ignore")


def step_interval(timing: xr.Dataset, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """`low` and `high`, the ends of the bootstrap interval of the median step of every cell in s.

    Whole rounds are drawn, and steps within them. NaN where nothing was measured.
    """
    steps = timing["step_time"].where(timing["status"] == OK).transpose(*INDEX, "repetition")
    rounds = _rounds(timing).transpose(*INDEX, "repetition").values
    ends = np.full((2, *steps.shape[:5]), np.nan)
    tail = (1 - level) / 2
    for place in np.ndindex(steps.shape[:5]):
        times = list(_by_round(steps.values[place], rounds[place]).values())
        if times:
            generator = np.random.default_rng(seed)
            drawn = generator.integers(0, len(times), (resamples, len(times)))
            ends[(slice(None), *place)] = np.quantile(_resampled(times, drawn, generator), [tail, 1 - tail])
    result = xr.Dataset({name: (INDEX, one) for name, one in zip(("low", "high"), ends, strict=True)}, steps.coords)
    for name, which in (("low", "lower"), ("high", "upper")):
        result[name].attrs = {"units": "s", "long_name": f"{which} end of the {level:.0%} interval of the median step"}
    return result.drop_vars("repetition", errors="ignore")


def _rounds(timing: xr.Dataset) -> xr.DataArray:
    """The round of each step; all in one where none was told."""
    return timing["round"] if "round" in timing else xr.zeros_like(timing["step_time"])


def _by_round(steps: Samples, rounds: Samples) -> dict[int, Samples]:
    """The steps of one cell that were made, by round."""
    made = np.isfinite(steps)
    return {int(one): steps[made & (rounds == one)] for one in np.unique(rounds[made])}


def _interval(
    auto: Mapping[int, Samples], other: Mapping[int, Samples], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    both = sorted(auto.keys() & other.keys())
    if not both:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(both), (resamples, len(both)))
    medians = [_resampled([of[one] for one in both], drawn, generator) for of in (auto, other)]
    tail = (1 - level) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return float(low), float(high)


def _resampled(rounds: Sequence[Samples], drawn: npt.NDArray[np.int_], generator: np.random.Generator) -> Samples:
    """Medians of the steps of the ``drawn`` rounds (resample, round), as many of each as it has; (resample)."""
    sizes = np.array([one.size for one in rounds])
    steps = np.full((len(rounds), sizes.max()), np.nan)
    for index, one in enumerate(rounds):
        steps[index, : one.size] = one
    place = np.arange(sizes.max())
    chosen = (generator.random((*drawn.shape, sizes.max())) * sizes[drawn][..., None]).astype(int)
    found = np.where(place < sizes[drawn][..., None], steps[drawn[..., None], chosen], np.nan)
    medians: Samples = np.nanmedian(found.reshape(len(drawn), -1), axis=1)
    return medians
