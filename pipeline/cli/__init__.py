"""The command line, `python -m pipeline`: one command per stage of the study.

Bad input ends with exit code 2, a failed run with 1, Ctrl-C with 130; each says why in one sentence on standard error.
What a command imports beyond this package it imports when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pipeline.cli import (
    accuracy,
    benchmark,
    calibrate,
    data,
    devices,
    miscalibration,
    parity,
    plan,
    predict,
    results,
    simulate,
    train,
)
from pipeline.errors import InputError, PipelineError
from pipeline.version import package_version
from pipeline.workflow.session import end_with_snakemake
from pipeline.workflow.usage import noted_usage

app = typer.Typer(
    name="python -m pipeline",
    help="Train one CNN on all the machines you have: measure devices, split every layer over them, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: dict[Callable[..., Any], str] = {
    devices.devices: "--scheduler cluster.json",
    data.data: "/path/to/images --image-size 64 --output images.zarr.zip",
    calibrate.calibrate: "--network resnet18 --devices '2 x cpu' --output resnet18.zarr.zip",
    plan.plan: "--network resnet18 --calibration resnet18.zarr.zip --output plan.json",
    train.train: "--network resnet18 --data /path/to/images --image-size 64 --epochs 9 --checkpoint weights.pt",
    predict.predict: "photos/ cat.jpg --weights weights.safetensors --top 3 --output classes.csv",
    predict.evaluate: "--data /path/to/images --weights weights.safetensors --output evaluation",
    simulate.simulate: "--calibration resnet18.zarr.zip --devices '64 x cpu' --output simulation.zarr",
    parity.parity: "mynets:build",
    benchmark.benchmark: "--network 50:500 --devices '2 x cpu'",
    accuracy.accuracy: "--network 16:64 --strategy single --strategy kernel --output accuracy.zarr",
    miscalibration.miscalibration: "--network 50:500 --devices 'cpu + cpu@0.5' --output miscalibration.zarr",
    results.combine: "cells/*.zarr.zip --output timing.zarr",
    results.figures: "outputs",
    results.report: "outputs",
    results.notebook: "outputs",
}
"""Each command with the arguments of an example."""
for _command, _example in _COMMANDS.items():
    app.command(epilog=f"\b\nExample:\n  python -m pipeline {_command.__name__} {_example}")(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pipeline {package_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and end.")
    ] = False,
) -> None:
    pass


_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process if not given."""
    end_with_snakemake()
    with noted_usage(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(arguments, prog_name="python -m pipeline")
        except InputError as error:
            return _fail(error, 2)
        except PipelineError as error:
            return _fail(error, 1)
        except SystemExit as end:
            if end.code == _INTERRUPTED:  # by Typer, which says nothing
                print("Interrupted.", file=sys.stderr)
            return end.code if isinstance(end.code, int) else 0
    return 0


def _fail(reason: object, code: int) -> int:
    sentence = str(reason).strip()
    ending = "" if sentence.endswith(("?", ".")) else "."
    print(f"Error: {sentence}{ending}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a sentence: where in the code it was raised is of no use on a command line."""
    print(f"Warning: {message}", file=sys.stderr)
