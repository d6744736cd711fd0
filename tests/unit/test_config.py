"""The configuration: what is refused and how, what the grid is, and that its files are written from its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml

from pipeline.config import (
    STRATEGIES,
    Cell,
    Config,
    calibration_source,
    calibrations,
    cells,
    device_sets,
    grid,
    left_out,
    load_config,
    slug,
    with_gpus_counted,
)
from pipeline.errors import InputError
from pipeline.links import parse_link
from pipeline.plan.plan import STRATEGIES as PLANNED_STRATEGIES
from pipeline.workflow.schema import DEFAULT_FILE, FOLDER, SCHEMA_FILE, default_yaml, json_schema

ONE = {"networks": ["5:1"], "batch_sizes": [8], "device_sets": ["cpu"], "strategies": ["single"]}


def study(**experiments: dict[str, Any]) -> Config:
    return load_config({"experiments": {name: ONE | changes for name, changes in experiments.items()}})


class TestFiles:
    def test_the_default_file_is_written_from_the_models(self) -> None:
        assert DEFAULT_FILE.read_text() == default_yaml(), "run `python -m pipeline.workflow.schema`"

    def test_the_schema_is_written_from_the_models(self) -> None:
        assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), "run `python -m pipeline.workflow.schema`"

    def test_the_default_file_says_what_the_models_do(self) -> None:
        assert load_config(DEFAULT_FILE) == Config()

    @pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
    def test_the_schema_accepts_every_configuration_of_the_project(self, file: Path) -> None:
        jsonschema.Draft202012Validator.check_schema(json_schema())
        jsonschema.validate(yaml.safe_load(file.read_text()), json_schema(), jsonschema.Draft202012Validator)
        load_config(file)

    @pytest.mark.parametrize(
        "content", [{"dta": "auto"}, {"timing": {"warm": 1}}, {"experiments": {"x": ONE | {"link": []}}}]
    )
    def test_the_schema_refuses_unknown_keys_at_any_depth(self, content: dict[str, Any]) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, json_schema(), jsonschema.Draft202012Validator)

    def test_every_field_is_described(self) -> None:
        definitions = json_schema()["$defs"]
        for section in (json_schema(), *definitions.values()):
            for name, field in section["properties"].items():
                # A section that is described as its own definition is, is described there alone.
                described = field if "description" in field else definitions[field["$ref"].rsplit("/", 1)[-1]]
                assert described["description"].endswith("."), f"{section['title']}.{name}"


BAD = {
    "an unknown key at the top": ({"trainin": {}}, "Unknown key trainin", "did you mean training"),
    "an unknown key in a section": ({"timing": {"warmpu": 1}}, "Unknown key timing.warmpu", "did you mean warmup?"),
    "a key of another section": ({"epochs": 3}, "Unknown key epochs", "did you mean accuracy.epochs?"),
    "an unknown key of an experiment": (
        {"experiments": {"x": ONE | {"network": []}}}, "Unknown key experiments.x.network", "did you mean networks?",
    ),
    "a key like no other": ({"zzz": 1}, "Unknown key zzz", "known there are data, image_size"),
    "a missing key": ({"experiments": {"x": {"networks": ["5:1"]}}}, "experiments.x.batch_sizes is missing", ""),
    "a batch size below 1": ({"experiments": {"x": ONE | {"batch_sizes": [8, 0]}}}, "x.batch_sizes[1]", "is 0"),
    "no device set": ({"experiments": {"x": ONE | {"device_sets": []}}}, "experiments.x.device_sets", "at least 1"),
    "an unknown device": ({"experiments": {"x": ONE | {"device_sets": ["cup"]}}}, "x.device_sets[0]", "'cup'"),
    "an unknown strategy": ({"experiments": {"x": ONE | {"strategies": ["sinle"]}}}, "'sinle'", "'single', 'ddp'"),
    "a width of 0": ({"experiments": {"x": ONE | {"networks": ["5:0"]}}}, "'5:0'", "at least 1"),
    "an unknown network": ({"accuracy": {"network": "resnet81"}}, "accuracy.network", "'resnet18'"),
    "a seed twice": ({"accuracy": {"seeds": [0, 1, 0]}}, "accuracy.seeds", "0 stands there twice"),
    "no seed": ({"accuracy": {"seeds": []}}, "accuracy.seeds", "at least 1"),
    "a network without quotes": ({"experiments": {"x": ONE | {"networks": [496]}}}, "not 496", "a bare 8:16"),
    "a section that is a number": ({"timing": 3}, "timing in the configuration is 3", ""),
    "text for a number": ({"timing": {"warmup": "two"}}, "timing.warmup", "'two'"),
    "an error that leaves no time": ({"miscalibration": {"errors": [0, -1]}}, "miscalibration.errors[1]", "-1"),
    "a device beyond the set": ({"miscalibration": {"device": 2}}, "miscalibration.device 2", "are 0 to 1"),
    "no GPU for an experiment": (
        {"gpus": 0, "experiments": {"x": ONE | {"device_sets": ["gpu + cpu"]}}}, "measure gpu + cpu", "no GPU here",
    ),
    "too few GPUs for the accuracy": (
        {"gpus": 1, "accuracy": {"device_set": "2 x gpu"}}, "accuracy.device_set", "needs 2 GPUs, but there are 1",
    ),
    "a simulated network without a calibration": (
        {"simulation": {"networks": ["5:1"]}}, "simulation.networks has 5:1", "no experiment measures",
    ),
    "a share above 1": ({"calibration": {"fractions": [0.5, 1.5]}}, "calibration.fractions[1]", "1.5"),
    "no mapping": ([1], "[1]", "a mapping of keys to values belongs"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "place", "remedy"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_in_one_sentence_that_names(content: Any, place: str, remedy: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_config(content)
    sentence = str(refusal.value)
    assert place in sentence
    assert remedy in sentence
    assert "\n" not in sentence
    assert sentence[-1] in ".?"


@pytest.mark.parametrize(("text", "reason"), [(None, "No such file"), ("a: [1", "not valid YAML")])
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "study.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=reason) as refusal:
        load_config(file)
    assert str(file) in str(refusal.value)


def test_an_empty_file_is_the_default_study(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("# nothing but a comment\n")
    assert load_config(file) == Config()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        Config().timing.warmup = 3


def test_strategies_are_those_of_the_planner() -> None:
    assert set(STRATEGIES) == set(PLANNED_STRATEGIES)


class TestQuestions:
    @pytest.mark.parametrize("number", [1, 2, 4, 5, 6, 9])
    @pytest.mark.parametrize("file", ["default.yaml", "paper.yaml"])
    def test_each_question_of_the_study_is_that_of_an_experiment(self, file: str, number: int) -> None:
        asked = [one.question for one in load_config(FOLDER / file).experiments.values()]
        assert any(str(number) in question.partition(".")[0].split(" and ") for question in asked)

    @pytest.mark.parametrize(("section", "number"), [("accuracy", "7"), ("miscalibration", "6"), ("simulation", "8")])
    def test_the_other_questions_are_those_of_a_section(self, section: str, number: str) -> None:
        assert number in str(Config.model_fields[section].description).partition(".")[0]

    def test_the_simulated_links_reach_from_10_mbit_to_100_gbit_and_to_50_ms(self) -> None:
        found = [parse_link(text) for text in Config().simulation.links]
        rates, delays = ({one[place] for one in found if one is not None} for place in (1, 0))
        assert (min(rates), max(rates)) == (10e6 / 8, 100e9 / 8)
        assert (min(delays), max(delays)) == (0, 0.05)

    @pytest.mark.parametrize("file", ["default.yaml", "paper.yaml"])
    def test_unequal_devices_reach_from_1_to_1_to_1_to_a_tenth_beside_equal_shares(self, file: str) -> None:
        one = load_config(FOLDER / file).experiments["unequal"]
        assert {"2 x cpu", "cpu + cpu@0.5", "cpu + cpu@0.25", "cpu + cpu@0.1"} <= set(one.device_sets)
        assert {"equal", "paper", "kernel", "auto"} <= set(one.strategies)


class TestGpus:
    SETS = ("gpu", "gpu + gpu1", "gpu + gpu1 + gpu2", "gpu + gpu1 + gpu2 + gpu3")

    def with_gpus(self, gpus: int | None) -> Config:
        content = yaml.safe_load((FOLDER / "gpu.yaml").read_text())
        return load_config(content | {"gpus": gpus})

    def test_sets_of_more_gpus_than_there_are_are_left_out_everywhere(self) -> None:
        config = self.with_gpus(2)
        assert left_out(config) == self.SETS[2:]
        assert not set(self.SETS[2:]) & {cell.device_set for cell in cells(config)}
        assert {"gpu", "gpu + gpu1", "gpu + cpu"} <= {cell.device_set for cell in cells(config)}
        assert calibration_source(config, "gpu") == "gpu + 4 x cpu"
        assert not {text for _, text in calibrations(config)} & set(self.SETS[2:])

    @pytest.mark.parametrize("gpus", [4, None], ids=["four", "a cluster that is not counted"])
    def test_nothing_is_left_out_where_there_are_enough(self, gpus: int | None) -> None:
        assert not left_out(self.with_gpus(gpus))
        assert set(self.SETS) <= {cell.device_set for cell in cells(self.with_gpus(gpus))}

    def test_they_are_counted_where_a_study_needs_them_and_no_cluster_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.config.visible_gpus", lambda: 3)
        assert with_gpus_counted(self.with_gpus(None)).gpus == 3
        assert with_gpus_counted(self.with_gpus(1)).gpus == 1
        assert with_gpus_counted(Config()).gpus is None
        elsewhere = self.with_gpus(None).model_copy(update={"scheduler": "tcp://elsewhere:8786"})
        assert with_gpus_counted(elsewhere).gpus is None

    def test_a_machine_without_one_refuses_the_study_in_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.config.visible_gpus", lambda: 0)
        with pytest.raises(InputError, match=r"measure gpu, .* but there is no GPU here: run the study where one is"):
            with_gpus_counted(self.with_gpus(None))


class TestGrid:
    def test_it_is_the_product_of_each_experiment(self) -> None:
        config = study(x={"networks": ["5:1", "5:2"], "batch_sizes": [8, 16], "strategies": ["single", "kernel"]})
        assert len(cells(config)) == 8
        assert Cell(network="5:2", batch_size=16, device_set="cpu", link="loopback", strategy="kernel") in cells(config)

    def test_a_cell_of_several_experiments_is_measured_once(self) -> None:
        config = study(x={"networks": ["5:1", "5:2"]}, y={"networks": ["5:2", "5:3"]})
        assert [cell.network for cell in cells(config)] == ["5:1", "5:2", "5:3"]

    def test_a_shared_cell_has_the_most_timed_steps_that_are_asked_for(self) -> None:
        config = study(x={"repetitions": 3}, y={"repetitions": 9}, z={"networks": ["5:2"]})
        assert list(grid(config).values()) == [9, config.timing.repetitions]

    def test_device_sets_are_in_their_canonical_form(self) -> None:
        config = study(x={"device_sets": ["2xcpu@0.50 +cpu", "cpu@0.5 + cpu@0.5 + cpu"]})
        assert [cell.device_set for cell in cells(config)] == ["2 x cpu@0.5 + cpu"]

    def test_paths_are_unique_and_ordinary_file_names(self) -> None:
        paths = [f"{cell.folder}/{cell.strategy}" for cell in cells(load_config(FOLDER / "paper.yaml"))]
        assert len(set(paths)) == len(paths)
        assert "500-1500/batch-1024/4xcpu@0.45/loopback/kernel" in paths
        assert not set("".join(paths)) & set(" :*\"'\\$&()")

    @pytest.mark.parametrize(
        ("text", "name"),
        [("50:500", "50-500"), ("2 x cpu*2t@0.5 + gpu1", "2xcpu-2t@0.5+gpu1"), ("resnet18", "resnet18")],
    )
    def test_a_slug_stays_readable(self, text: str, name: str) -> None:
        assert slug(text) == name


class TestCalibration:
    def test_devices_serve_themselves_and_the_largest_set_with_it_serves_one_alone(self) -> None:
        config = study(x={"device_sets": ["cpu@0.45", "2 x cpu@0.45", "4 x cpu@0.45", "cpu + cpu@0.5"]})
        sources = {text: calibration_source(config, text) for text in device_sets(config)}
        assert sources == {
            "cpu@0.45": "4 x cpu@0.45",
            "2 x cpu@0.45": "2 x cpu@0.45",
            "4 x cpu@0.45": "4 x cpu@0.45",
            "cpu + cpu@0.5": "cpu + cpu@0.5",
        }

    def test_the_order_of_devices_does_not_matter(self) -> None:
        config = study(x={"device_sets": ["cpu + cpu@0.5", "cpu@0.5 + cpu"]})
        assert calibration_source(config, "cpu@0.5 + cpu") == "cpu + cpu@0.5"

    def test_each_network_is_calibrated_once_per_source(self) -> None:
        config = study(x={"networks": ["5:1", "5:2"], "device_sets": ["cpu@0.45", "3 x cpu@0.45"]})
        wanted = {
            ("5:1", "3 x cpu@0.45"),
            ("5:2", "3 x cpu@0.45"),
            (config.accuracy.network, config.accuracy.device_set),
            (config.miscalibration.network, config.miscalibration.device_set),
        }
        assert set(calibrations(config)) == wanted
