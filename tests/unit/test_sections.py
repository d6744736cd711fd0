"""The report answers each question with a number from the stores, and says so where a store or a figure is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline.analysis import paper, sections
from pipeline.analysis.figures import FIGURES, write_figures
from pipeline.analysis.sections import SECTIONS, Section, heading, write_page
from pipeline.analysis.tables import write_headline
from tests import synthetic

ASKED = [section for section in SECTIONS if section.number is not None]
DRAWN = [section for section in SECTIONS if any(name in FIGURES for name in section.figures)]


def section_of(page: str, section: Section) -> str:
    """What stands between the heading of the section and the next one."""
    after = page.split(f"{heading(section)}\n", 1)[1]
    return re.split(r"\n[^\n]+\n-{5,}\n", after.split("\n", 1)[1], maxsplit=1)[0]


def touch(_: Figure, stem: Path) -> tuple[Path, Path]:
    """In place of the pictures of a figure, of which the page only asks whether they are there."""
    paths = stem.with_suffix(".svg"), stem.with_suffix(".png")
    for path in paths:
        path.touch()
    return paths


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a small study."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.analysis.figures.save", touch)  # that they can be drawn is tested elsewhere
        write_figures(synthetic.study(), folder)
    write_headline(synthetic.study()["timing"], folder)
    return write_page(folder).read_text()


def test_the_nine_questions_stand_in_their_order_and_every_figure_in_one_section(page: str) -> None:
    assert [section.number for section in ASKED] == list(range(1, 10))
    places = [page.index(f"\n{heading(section)}\n---") for section in SECTIONS]
    assert places == sorted(places)
    listed = [name for section in SECTIONS for name in section.figures]
    assert len(listed) == len(set(listed))
    assert set(FIGURES) <= set(listed)


@pytest.mark.parametrize("section", SECTIONS, ids=heading)
def test_each_question_has_its_answer_with_a_number_its_figures_captions_and_data(page: str, section: Section) -> None:
    text = section_of(page, section)
    for name in section.figures:
        if name not in FIGURES:
            assert f"The figure *{name}* was not drawn in this study." in text
            continue
        assert f":file: {name}.svg" in text
        assert sections.caption(name).splitlines()[0] in text
        for store in FIGURES[name].stores:
            assert f'xarray.open_zarr("{store}.zarr")' in text
    if section in DRAWN:
        answer = text.split(".. container:: answer\n\n", 1)[1].split("\n\n", 1)[0]
        assert re.search(r"\d", re.sub(r"``[^`]*``", "", answer)), f"the answer has no number: {answer}"
        assert "nan" not in answer


def test_the_summary_repeats_the_answers_of_the_sections_it_is_made_of(page: str) -> None:
    summary = page.split("\n\n", 1)[0].splitlines()
    assert len(summary) == sum(section.in_summary for section in SECTIONS)
    assert all(line.startswith("- ") and page.count(line.removeprefix("- ")) == 2 for line in summary)


def test_the_page_of_a_study_without_some_stores_or_figures_says_so(tmp_path: Path) -> None:
    write_figures({"timing": synthetic.study()["timing"]}, tmp_path, ["scaling", "speedup"])
    page = write_page(tmp_path).read_text()
    scaling, waterfall = (next(s for s in SECTIONS if name in s.figures) for name in ("scaling", "waterfall"))
    assert "The study has no simulation.zarr" in section_of(page, scaling)
    assert "The figure *waterfall* was not drawn in this study." in section_of(page, waterfall)


def test_a_number_of_the_stores_changes_the_answer(tmp_path: Path) -> None:
    timing = synthetic.study()["timing"]
    write_figures({"timing": timing}, tmp_path, ["speedup"])
    before = write_page(tmp_path).read_text()
    slower = timing.copy(deep=True)
    slower["step_time"].loc[{"strategy": "kernel"}] *= 1.5
    write_figures({"timing": slower}, tmp_path, ["speedup"])
    speedup = next(section for section in SECTIONS if "speedup" in section.figures)
    assert section_of(write_page(tmp_path).read_text(), speedup) != section_of(before, speedup)


@pytest.mark.parametrize("path", sorted(sections.CAPTIONS.glob("*.rst")), ids=lambda path: path.stem)
def test_no_number_is_typed_in_a_caption_or_on_the_first_page(path: Path) -> None:
    text = path.read_text().replace(paper.SOURCE, "")
    assert not re.findall(r"(?<!\w)\d[\d.,]*", text)
