"""`predict` and `evaluate`: what trained weights say of images, and how often they are right."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.images import download_folder
from pipeline.cli.options import BatchSizeOption
from pipeline.errors import InputError
from pipeline.files import written_whole
from pipeline.progress import Progress

if TYPE_CHECKING:
    import xarray as xr

    from pipeline.inference import Given

FORMATS = ("csv", "json")
_DIGITS = 6
_CLASSES_SHOWN = 30
_WIDE = 1000

WeightsOption = Annotated[Path, typer.Option("--weights", help="File that `train --checkpoint` wrote.")]
GivenNetworkOption = Annotated[
    str | None, typer.Option("--network", help="The network, as for `train`; as the weights say if not given.")
]
GivenSizeOption = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Resize the images; as in the training if not given.")
]
ClassesOption = Annotated[
    str | None, typer.Option("--classes", help="Names with commas between them; as the weights say if not given.")
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", help="Of each channel, pixels taken as 0 to 1; as the weights say if not given.")
]
StdOption = Annotated[str | None, typer.Option("--std", help="As --mean.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda:0, say; a GPU where there is one if not given.")
]


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    weights: WeightsOption,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write, .csv or .json; standard output if not given.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="csv or json; as the output is called, or csv, if not given.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to tell of each image.")] = 1,
    network: GivenNetworkOption = None,
    image_size: GivenSizeOption = None,
    classes: ClassesOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 64,
) -> None:
    """Tell the class of images, and how probable it is, with weights that `train` wrote."""
    chosen = _format(form, output)
    _check_output(output)
    from pipeline.inference import predict as classify

    with Progress("predict", shown=None if output is None else True) as progress:
        found = classify(
            list(images), weights, **_given(network, image_size, classes, mean, std, device), batch_size=batch_size,
            on_progress=lambda done, total: progress(done, {"total": total}),
        )  # fmt: skip
    text = _as_text(found, chosen, top)
    if output is None:
        print(text, end="")
        return
    with written_whole(output) as aside:
        aside.write_text(text)
    print(f"{found.sizes['image']} images classified, written to {output}.")


def evaluate(
    data: Annotated[
        str,
        typer.Option("--data", help="As for `train`: a folder of class folders, a file that `data` wrote, or a name."),
    ],
    weights: WeightsOption,
    split: Annotated[str, typer.Option("--split", help="Which of its images: test, train or all.")] = "test",
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for metrics.json, confusion.csv, confusion.png and .svg.")
    ] = None,
    network: GivenNetworkOption = None,
    image_size: GivenSizeOption = None,
    classes: ClassesOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 64,
) -> None:
    """Tell how often trained weights are right: metrics, and which class is taken for which."""
    from pipeline.inference import evaluate as judge

    if output is not None and (output.is_file() or not output.absolute().parent.is_dir()):
        raise InputError(f"output '{output}' cannot be written: give a folder in one that exists")
    with Progress(f"evaluate {data}") as progress:
        found = judge(
            data, weights, split=split,  # type: ignore[arg-type]
            **_given(network, image_size, classes, mean, std, device), batch_size=batch_size,
            root=download_folder(), on_progress=lambda done, total: progress(done, {"total": total}),
        )  # fmt: skip
    images = int(found.confusion.sum())
    print(
        f"{found.attrs['data']}: {images} images, accuracy {100 * float(found.accuracy):.1f} %, "
        f"loss {float(found.loss):.4f}"
    )
    _print_confusion(found)
    if output is not None:
        _write_evaluation(found, output)
        print(f"Metrics and confusion matrix written to {output}.")


def _format(form: str | None, output: Path | None) -> str:
    """What to write: as asked for, else as the file is called."""
    chosen = form or (output.suffix.removeprefix(".").lower() if output is not None and output.suffix else FORMATS[0])
    if chosen not in FORMATS:
        raise InputError(f"format '{chosen}' is unknown: give {' or '.join(FORMATS)}")
    return chosen


def _check_output(output: Path | None) -> None:
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise InputError(f"output '{output}' cannot be written: give a file in a folder that exists")


def _given(
    network: str | None,
    image_size: int | None,
    classes: str | None,
    mean: str | None,
    std: str | None,
    device: str | None,
) -> Given:
    """What counts instead of what the weights say."""
    return {
        "network": network, "image_size": image_size, "classes": _names(classes),
        "mean": _numbers("--mean", mean), "std": _numbers("--std", std), "device": device,
    }  # fmt: skip


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} '{text}' are not numbers with commas between them, such as 0.5,0.5,0.5") from None


def _as_text(found: xr.Dataset, form: str, top: int) -> str:
    """A record per image, or as many as there are to tell of each, the most probable first."""
    classes, records = found["class"].values, []
    for image, probabilities in zip(found.image.values, found.probability.values, strict=True):
        for place in (-probabilities).argsort(kind="stable")[:top]:
            told = round(float(probabilities[place]), _DIGITS)
            records.append({"image": str(image), "class": str(classes[place]), "probability": told})
    if form == "json":
        return json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "class", "probability"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**record, "probability": f"{record['probability']:.{_DIGITS}f}"} for record in records)
    return text.getvalue()


def _print_confusion(found: xr.Dataset) -> None:
    """The confusion matrix as a table, of not too many classes."""
    from rich.console import Console
    from rich.table import Table

    names = [str(name) for name in found["class"].values]
    shown = names if len(names) <= _CLASSES_SHOWN else []
    table = Table("class", *shown, "recall %", "precision %", title="Rows: the true class; columns: the told one")
    for place, name in enumerate(names):
        counts = [str(int(count)) for count in found.confusion.values[place]] if shown else []
        rates = (f"{100 * float(found[one].values[place]):.1f}" for one in ("recall", "precision"))
        table.add_row(name, *counts, *rates)
    console = Console()
    # A file has no width that names would have to be cut for.
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def _write_evaluation(found: xr.Dataset, folder: Path) -> None:
    from pipeline.analysis.confusion_figure import confusion_figure
    from pipeline.analysis.style import save

    folder.mkdir(exist_ok=True)
    by_class = {
        str(name): {one: _known(found[one].values[place]) for one in ("recall", "precision")}
        for place, name in enumerate(found["class"].values)
    }
    metrics = {
        "data": found.attrs["data"], "weights": found.attrs["weights"], "images": int(found.confusion.sum()),
        "accuracy": float(found.accuracy), "loss": _known(float(found.loss)), "classes": by_class,
    }  # fmt: skip
    with written_whole(folder / "metrics.json") as aside:
        aside.write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    with written_whole(folder / "confusion.csv") as aside:
        found.confusion.to_pandas().to_csv(aside)
    save(confusion_figure(found), folder / "confusion")


def _known(value: float) -> float | None:
    """A number for JSON, which has none for the recall of a class without images."""
    return None if math.isnan(value) else float(value)
