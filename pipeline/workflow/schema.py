"""The schema and the default configuration as files, both written from the models of `pipeline.config`.

`python -m pipeline.workflow.schema` writes them; a test fails when they no longer agree with the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from pipeline.config import Config, Section

FOLDER = Path(__file__).parent / "config"
DEFAULT_FILE = FOLDER / "default.yaml"
SCHEMA_FILE = FOLDER / "schema.json"

_HEAD = (
    "The default study, for two cores and some fifteen minutes, written from pipeline/config.py by `python -m "
    "pipeline.workflow.schema`. Change single values with `snakemake --cores all --config data=FOLDER`, or name a file "
    "of your own with --configfile, in which you write what differs: experiments in it replace all of these."
)


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) that an editor or a validator checks a configuration file with."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def default_yaml() -> str:
    """The default configuration as commented YAML."""
    lines = ["# yaml-language-server: $schema=schema.json", *_comment(_HEAD), *_lines(Config())]
    return "\n".join(lines) + "\n"


def _lines(section: Section, indent: str = "") -> Iterator[str]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        yield from _comment(field.description or "", indent)
        match getattr(section, name):
            case Section() as part:
                yield f"{indent}{name}:"
                yield from _lines(part, f"{indent}  ")
            case Mapping() as entries if any(isinstance(one, Section) for one in entries.values()):
                yield f"{indent}{name}:"
                yield from _experiments(values[name], f"{indent}  ")
            case _:
                yield f"{indent}{name}: {json.dumps(values[name])}"


def _experiments(experiments: Mapping[str, Mapping[str, Any]], indent: str) -> Iterator[str]:
    for name, experiment in experiments.items():
        yield f"{indent}{name}:"
        yield from (f"{indent}  {key}: {json.dumps(value)}" for key, value in experiment.items() if value is not None)


def _comment(text: str, indent: str = "") -> list[str]:
    return wrap(text, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=2) + "\n")
    DEFAULT_FILE.write_text(default_yaml())
