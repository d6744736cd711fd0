"""The report, question by question: one table of its sections, and the page that is made of it.

A further figure is one name in SECTIONS, one line in `figures.FIGURES` and a caption of its name. A table that
belongs to a figure is NAME_table.rst beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.analysis.figures import FIGURES
from pipeline.analysis.wording import sentences_of

CAPTIONS = Path(__file__).parents[1] / "workflow" / "report"


class Section(NamedTuple):
    """One section of the report; its answer is the first sentence that is said of its first figure."""

    heading: str
    figures: tuple[str, ...]
    number: int | None = None
    """Of the question that it answers."""
    in_summary: bool = False


SECTIONS = (
    Section("How much of a step is convolution?", ("convolution_share",), 1),
    Section("How much faster are two, three and four CPUs?", ("speedup",), 2, in_summary=True),
    Section("How much faster are several GPUs, and does a CPU beside a GPU pay?", ("gpus",), 3),
    Section("From which network and batch size on does splitting pay?", ("break_even",), 4),
    Section("How fast must the link be?", ("links",), 5),
    Section("What does calibration bring to unequal devices?", ("unequal", "step_time"), 6, in_summary=True),
    Section("Is the classification unchanged?", ("accuracy",), 7, in_summary=True),
    Section("How far does it scale?", ("scaling",), 8),
    Section("What does each idea bring?", ("waterfall",), 9),
    Section(
        "How well can a step be told beforehand, and where does the prediction err?",
        ("prediction", "predicted_instructions", "predicted_timeline"),
    ),
    Section("How well does the planner choose, and from what?", ("choice", "calibration", "timeline", "activity")),
)


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write the page of the report as `folder`/study.rst, from what `write_figures` wrote to the same folder.

    It has the main answers, then a section for each of SECTIONS: the answer, every figure with its caption and the
    other sentences, and how to open the data. A figure that is not in the folder is said to be missing.
    """
    folder = Path(folder)
    parts = [
        _summary(folder),
        "The paper's figures and ours\n----------------------------",
        ".. include:: headline.rst",
    ]
    parts += [block for section in SECTIONS for block in _blocks(section, folder)]
    page = folder / "study.rst"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def heading(section: Section) -> str:
    """The heading as it stands in the report."""
    return section.heading if section.number is None else f"{section.number}. {section.heading}"


def caption(name: str) -> str:
    """The caption of a figure: the first paragraph of its file."""
    return (CAPTIONS / f"{name}.rst").read_text(encoding="utf-8").strip().split("\n\n")[0]


def _summary(folder: Path) -> str:
    answers = [_said(section, folder)[0] for section in SECTIONS if section.in_summary and _said(section, folder)]
    return "\n".join(f"- {answer}" for answer in answers)


def _said(section: Section, folder: Path) -> list[str]:
    """The sentences on the first figure of the section that is there."""
    drawn = [name for name in section.figures if (folder / f"{name}.svg").exists()]
    return _sentences(folder, drawn[0]) if drawn else []


def _sentences(folder: Path, name: str) -> list[str]:
    return sentences_of((folder / f"{name}.rst").read_text(encoding="utf-8"))


def _blocks(section: Section, folder: Path) -> list[str]:
    blocks = [_heading(heading(section))]
    answered = False
    for name in section.figures:
        if not (folder / f"{name}.svg").exists():
            blocks.append(f"The figure *{name.replace('_', ' ')}* was not drawn in this study.")
            continue
        answer, *others = _sentences(folder, name)
        if not answered:
            blocks.append(_container("answer", answer))
        elif answer:
            others = [answer, *others]
        answered = True
        blocks += [f".. raw:: html\n   :file: {name}.svg", _container("caption", caption(name))]
        if others:
            blocks.append("\n".join(f"- {sentence}" for sentence in others))
        if (folder / f"{name}_table.rst").exists():
            blocks.append(f".. include:: {name}_table.rst")
    stores = dict.fromkeys(store for name in section.figures if name in FIGURES for store in FIGURES[name].stores)
    if stores:
        links = (f'`{store}.zarr <{store}.zarr/>`__ (``xarray.open_zarr("{store}.zarr")``)' for store in stores)
        blocks.append(_container("data", f"Open the data, beside this report: {', '.join(links)}."))
    return blocks


def _heading(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def _container(name: str, text: str) -> str:
    lines = "\n".join(f"   {line}" for line in text.splitlines())
    return f".. container:: {name}\n\n{lines}"
