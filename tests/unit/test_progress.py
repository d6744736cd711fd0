"""What a run still has to do and how long that takes: counted by files, corrected by what the run itself took."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.accuracy import CONTROL
from pipeline.config import Config, calibrations, groups, load_config, slug
from pipeline.rounds import LONG_STEP_S, rounds_of
from pipeline.workflow import progress
from pipeline.workflow.parts import Part, parts_of

BEGAN_S = 1_000_000.0


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    """Two calibrations of 60 s and three cells of 120 s, none of them there."""
    kinds = [("calibrations", 60.0)] * 2 + [("cells", 120.0)] * 3
    return [
        Part(kind=kind, file=tmp_path / str(place), expected_s=expected_s)
        for place, (kind, expected_s) in enumerate(kinds)
    ]


def finish(part: Part, at_s: float) -> None:
    part.file.touch()
    os.utime(part.file, (at_s, at_s))


def test_before_anything_is_done_the_expected_times_count(parts):
    outlook = progress.Outlook(parts, BEGAN_S)
    assert not outlook.look()
    assert outlook.line(BEGAN_S) == "Done: 0 of 2 calibrations, 0 of 3 cells; about 8 min left."


def test_a_run_that_takes_twice_as_long_as_expected_will_go_on_to(parts):
    outlook = progress.Outlook(parts, BEGAN_S)
    for part in parts[:3]:
        finish(part, BEGAN_S + 1)
    assert outlook.look()
    assert outlook.left_s(BEGAN_S + 2 * 240) == pytest.approx(2 * 240, rel=0.12)
    assert outlook.line(BEGAN_S + 480) == "Done: 2 of 2 calibrations, 1 of 3 cells; about 8 min left."
    assert not outlook.look(), "the same parts were finished twice"


def test_what_an_earlier_run_left_is_not_done(parts):
    finish(parts[0], BEGAN_S - 1)
    outlook = progress.Outlook(parts, BEGAN_S)
    assert not outlook.look()
    finish(parts[0], BEGAN_S + 5)
    assert outlook.look()


def test_a_run_is_done_when_all_its_parts_are(parts):
    outlook = progress.Outlook(parts, BEGAN_S)
    for part in parts:
        finish(part, BEGAN_S + 1)
    outlook.look()
    assert outlook.done
    assert outlook.line(BEGAN_S + 9) == "Done: 2 of 2 calibrations, 3 of 3 cells; nothing left."


@pytest.mark.parametrize(
    ("seconds", "words"), [(20, "less than a minute"), (95, "about 2 min"), (7_900, "about 2 h 12 min")]
)
def test_a_duration_is_told_no_finer_than_it_is_known(seconds, words):
    assert progress._duration(seconds) == words


class TestParts:
    """The parts of each kind of job, by the files that it writes."""

    def test_each_strategy_of_a_group_is_a_cell(self):
        study = Config()
        name, group = next((name, group) for name, group in groups(study).items() if len(group.cells) > 1)
        parts = parts_of(study, "benchmark", {"group": name}, [f"outputs/timing/{name}"])
        assert [part.file for part in parts] == [
            Path(f"outputs/timing/{name}/{cell.strategy}.zarr.zip") for cell in group.cells
        ]
        assert {part.kind for part in parts} == {"cells"}

    def test_each_seed_and_strategy_and_the_control_is_a_training(self):
        study = load_config({"accuracy": {"seeds": [3, 4], "strategies": ["single", "kernel"]}})
        files = [str(part.file) for part in parts_of(study, "accuracy", {}, ["outputs/accuracy.zarr"])]
        assert files == [
            f"outputs/accuracy/seed-{seed}/{name}.zarr.zip" for seed in (3, 4) for name in ("single", "kernel", CONTROL)
        ]

    def test_other_jobs_are_one_part_and_those_without_an_output_none(self):
        (part,) = parts_of(Config(), "timing", {}, ["outputs/timing.zarr"])
        assert (part.kind, part.file) == ("other jobs", Path("outputs/timing.zarr"))
        assert parts_of(Config(), "all", {}, []) == []

    def test_slower_devices_larger_networks_and_more_steps_are_expected_to_take_longer(self):
        def expected_s(devices: str, network: str = "50:500", **experiment: object) -> float:
            one = {"networks": [network], "batch_sizes": [64], "device_sets": [devices], "strategies": ["single"]}
            study = load_config({"experiments": {"x": one | experiment}})
            (name,) = groups(study)
            (part,) = parts_of(study, "benchmark", {"group": name}, [name])
            return part.expected_s

        usual = expected_s("cpu")
        assert usual < expected_s("cpu@0.5")
        assert usual < expected_s("cpu", "500:1500")
        assert usual < expected_s("cpu", repetitions=50)
        assert usual > expected_s("cpu*8t")

    @pytest.mark.parametrize(
        ("strategies", "several"),
        [(["kernel"], True), (["single"], False), (["single", "kernel"], True)],
        ids=["steps of 1.2 s", "steps of 2.3 s", "both at one place, whose shortest decides"],
    )
    def test_a_place_has_the_rounds_that_it_will_be_timed_in(self, strategies, several):
        def expected_s(asked: int) -> list[float]:
            one = {"networks": ["300:1000"], "batch_sizes": [64], "device_sets": ["2 x cpu@0.75"]}
            study = load_config({"timing": {"rounds": asked}, "experiments": {"x": one | {"strategies": strategies}}})
            (name,) = groups(study)
            return [part.expected_s for part in parts_of(study, "benchmark", {"group": name}, [name])]

        for once, asked in zip(expected_s(1), expected_s(3), strict=True):
            assert asked > once + 4 if several else asked == once

    def test_no_more_rounds_are_expected_than_there_are_steps_to_time(self):
        assert rounds_of(LONG_STEP_S, 3, 5) == 3
        assert rounds_of(LONG_STEP_S, 3, 2) == 2
        assert rounds_of(1.01 * LONG_STEP_S, 3, 5) == 1

    def test_the_default_study_takes_some_minutes_on_two_cores(self):
        study = Config()
        jobs = [("calibrate", {"calibration": f"{slug(n)}/{slug(d)}"}) for n, d in calibrations(study)]
        jobs += [("benchmark", {"group": name}) for name in groups(study)] + [("accuracy", {})]
        expected = sum(part.expected_s for job in jobs for part in parts_of(study, *job, ["x"]))
        assert 300 < expected < 1500
