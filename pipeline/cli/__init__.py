"""The command line, `python -m pipeline`: one command per stage of the study.

Bad input ends with exit code 2, a failed run with 1, Ctrl-C with 130; each says why in one sentence on standard error.
What a command imports beyond this package it imports when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

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
app.command()(devices.devices)
app.command()(data.data)
app.command()(calibrate.calibrate)
app.command()(plan.plan)
app.command()(train.train)
app.command()(predict.predict)
app.command()(predict.evaluate)
app.command()(simulate.simulate)
app.command()(parity.parity)
app.command()(benchmark.benchmark)
app.command()(accuracy.accuracy)
app.command()(miscalibration.miscalibration)
app.command()(results.combine)
app.command()(results.figures)
app.command()(results.report)
app.command()(results.notebook)


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
