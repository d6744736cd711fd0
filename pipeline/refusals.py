"""What is wrong with the content of a configuration, in one sentence that names the place and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

from pipeline.errors import InputError


def sentence(error: ValidationError, name: str, root: type[BaseModel]) -> str:
    """The first problem of the content called `name` in one sentence, where `root` is the model that refused it.

    An unknown key goes first, as it often causes the others.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    place = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"Unknown key {place} in {name}: {_suggestion(str(problem['loc'][-1]), problem['loc'][:-1], root)}"
    if problem["type"] == "missing":
        return f"The key {place} is missing in {name}."
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return f"{f'{place} in {name}' if place else name}: {str(cause).rstrip('.')}."
    if not place:
        return f"{name} is {problem['input']!r}, where a mapping of keys to values belongs."
    reason = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{place} in {name} is {problem['input']!r}, but {reason.replace('input should', 'it should')}."


def _place(location: tuple[int | str, ...]) -> str:
    """('experiments', 'small', 'batch_sizes', 0) as 'experiments.small.batch_sizes[0]'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _suggestion(key: str, parents: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """What was probably meant: a like key at the same place, else one elsewhere, else all that the place may have."""
    known = list(_section_at(parents, root).model_fields)
    if near := get_close_matches(key, known, n=3):
        return f"did you mean {' or '.join(near)}?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in _key_paths(root)}
    if near := get_close_matches(key, elsewhere, n=1):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known there are {', '.join(known)}."


def _section_at(parents: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    section = root
    for parent in parents:
        field = section.model_fields.get(str(parent))
        # A name within a mapping is no field: the mapping's own section stays.
        section = (_as_section(field.annotation) if field else None) or section
    return section


def _key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and (part := _as_section(field.annotation)):
            yield from _key_paths(part, f"{prefix}{name}.")


def _as_section(annotation: object) -> type[BaseModel] | None:
    """The model that a field holds, itself or as the values of a mapping."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None
