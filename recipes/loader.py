"""Loads a YAML file and `--set` overrides as a validated `Recipe`, and dumps a recipe as YAML.

All problems are reported in one `RecipeError`, one line per problem: `file:line: key.path: rule, value; remedy`. The
line of an override is the override itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes import documents
from recipes.documents import Location, dotted
from recipes.errors import RecipeError
from recipes.fields import did_you_mean
from recipes.schema import Recipe

S = TypeVar("S", bound=BaseModel)

# The rule for each pydantic error type; `{...}` comes from the error's context.
_RULES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping (key: value)",
    "float_type": "must be a number (write 1000.0, not 1e3)",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "invalid-json-value": "must be plain data: text, number, true, false, null, list or mapping",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list, [a, b] or one '- ' per entry",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping (key: value)",
    "string_too_short": "must not be empty",
    "string_type": "must be text, in quotes where YAML reads a number, date or true",
    "too_short": "must have at least {min_length} entry",
}


def load_recipe(path: Path, overrides: Sequence[str] = (), output: str | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, UTF-8.
        overrides: `a.b.c=value` each; the value is YAML, a list entry is named by its index
            (`modifiers.0.QuantizationModifier.ignore=[lm_head]`). A name that contains a dot cannot be addressed.
        output: replaces the key `output`.

    Raises:
        RecipeError: with every problem of the file and of the overrides.
    """
    root, data, problems = read_yaml(path)
    stages, labels = _take_stages(path, root, data), dict[Location, str]()
    if stages and not {"source", "output"} <= data.keys():
        problems.append(
            f"{stages['modifiers',]}: llm-compressor's part of a recipe; add source, output and calibration"
        )
    for text in overrides:
        try:
            labels[_override(data, text)] = f"--set {text}"
        except ValueError as error:
            problems.append(f"--set {text}: {error}")
    if output is not None:
        data["output"] = output
        labels[("output",)] = "--output"
    for place, label in stages.items():
        labels.setdefault(place, label)
    return _validated(Recipe, path, root, data, labels, problems)


def _take_stages(path: Path, root: yaml.Node, data: dict[Any, Any]) -> dict[Location, str]:
    """Converts llm-compressor's own forms, stages (`quant_stage: {quant_modifiers: {NAME: {...}}}`) and a mapping of
    modifiers, to the list `modifiers`. Returns their locations in the file, for messages."""
    stages = [
        (stage, key, modifiers)
        for stage, groups in data.items()
        if stage not in Recipe.model_fields and isinstance(groups, dict)
        for key, modifiers in groups.items()
        if str(key).endswith("_modifiers") and isinstance(modifiers, dict)
    ]
    if isinstance(data.get("modifiers"), dict):
        data["modifiers"] = [{name: arguments} for name, arguments in data["modifiers"].items()]
        return {("modifiers",): f"{path}:{_line(root, ('modifiers',))[0]}"}
    if not stages or "modifiers" in data:
        return {}
    for stage, key, _ in stages:
        del data[stage][key]
        if not data[stage]:
            del data[stage]
    data["modifiers"] = [{name: arguments} for *_, modifiers in stages for name, arguments in modifiers.items()]
    first = stages[0][:2]
    return {("modifiers",): f"{path}:{_line(root, first)[0]}: {dotted(first)}, read as the list modifiers"}


def load_section(model: type[S], path: Path) -> S:
    """Read a YAML file that contains a single section, such as a matrix. Raises RecipeError with every problem."""
    root, data, problems = read_yaml(path)
    return _validated(model, path, root, data, {}, problems)


def _validated(
    model: type[S], path: Path, root: yaml.Node, data: object, labels: dict[Location, str], problems: list[str]
) -> S:
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        for detail in _by_key(error.errors(include_url=False)):
            problems.append(f"{_where(path, root, labels, detail['loc'])}: {_explain(detail, model)}")
        raise RecipeError(problems) from None
    if problems:
        raise RecipeError(problems)
    return found


def recipe_digest(recipe: Recipe) -> str:
    """sha256 (hex) of the recipe's canonical JSON: sorted keys, defaults written out, no white space."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with its defaults written out; it loads to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def read_yaml(path: Path) -> tuple[yaml.Node, dict[Any, Any], list[str]]:
    """The nodes (for line numbers), the data and the problems of a YAML file that must contain a mapping. Raises
    RecipeError."""
    document = documents.read(path)
    if document.root is None or document.data is None:
        raise RecipeError(f"{path}: is empty; a recipe needs at least source, output, modifiers and calibration")
    if not isinstance(document.data, dict):
        raise RecipeError(
            f"{path}:1: must be a mapping with keys such as source and output, is {_shown(document.data)}"
        )
    problems = [f"{path}:{line}: {place}: {problem}" for line, place, problem in document.problems]
    return document.root, document.data, problems


def parse_value(text: str) -> Any:
    """The value of YAML text on a command line. Raises ValueError if it is not YAML."""
    try:
        document = documents.parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not YAML ({str(error).splitlines()[0]}); put it in quotes") from None
    if document.problems:
        raise ValueError("; ".join(problem for _, _, problem in document.problems))
    return document.data


def _override(data: dict[Any, Any], text: str) -> Location:
    """Apply one `a.b.c=value` to `data`; returns the location that it sets. Raises ValueError if there is no such
    key."""
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError("must be key.path=value, for example calibration.num_samples=32")
    value = parse_value(value_text)
    target: Any = data
    location: Location = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        index: int | str = part
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                raise ValueError(f"{dotted(location)} is a list; {part!r} must be an index below {len(target)}")
            index = int(part)
        elif not isinstance(target, dict):
            raise ValueError(f"{dotted(location)} is {_shown(target)}, it has no key {part!r}")
        elif part not in target and (section := _section(location)) and part not in section.model_fields:
            raise ValueError(f"there is no key {part!r}{did_you_mean(part, section.model_fields)}")
        location += (index,)
        if last:
            target[index] = value
        elif isinstance(target, list):
            target = target[int(part)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
    return location


def _section(location: Location, model: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """The model that the schema has at `location`; None if there is none (a value, or names of the user's choice)."""
    annotation: Any = model
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) in (list, dict):
            annotation = get_args(annotation)[-1]
        else:
            return None
        annotation = _plain_type(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _plain_type(annotation: Any) -> Any:
    """`X` of `X | None` and of `Annotated[X, ...]`."""
    while get_args(annotation) and get_origin(annotation) not in (list, dict):
        annotation = next(argument for argument in get_args(annotation) if argument is not type(None))
    return annotation


def _where(path: Path, root: yaml.Node, labels: dict[Location, str], location: Location) -> str:
    """The override that set `location`, or else the file and line of `location` or of its nearest parent."""
    for place, label in labels.items():
        if location[: len(place)] == place:
            return label
    line, found = _line(root, location)
    _, parent_found = _line(root, location[:-1])
    for place, label in labels.items():
        made_parent = not parent_found and place[: len(location) - 1] == location[:-1]
        if not found and (place[: len(location)] == location or made_parent):
            return label
    return f"{path}:{line}"


def _line(node: yaml.Node, location: Location) -> tuple[int, bool]:
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if str(key.value) == str(part)]
            if not pairs:
                return line, False
            # YAML keeps the last of two equal keys, so that is the one that was checked.
            key, node = pairs[-1]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line, False
    return line, True


def _by_key(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """One error per key: of `bool | Literal["auto"]` pydantic tells one for each of them, below a name of its own."""
    kept: list[ErrorDetails] = []
    for detail in details:
        *parent, last = detail["loc"] or ("",)
        if last != "bool" and not str(last).startswith("literal["):
            kept.append(detail)
            continue
        choice = "true, false" if last == "bool" else str(detail.get("ctx", {}).get("expected"))
        before = kept.pop()["msg"] if kept and kept[-1]["loc"] == tuple(parent) else ""
        message = f"{before} or {choice}" if before else f"must be {choice}"
        kept.append({**detail, "type": "choice", "loc": tuple(parent), "msg": message})
    return kept


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """`key.path: rule, value; remedy` of one pydantic error."""
    # pydantic adds "[key]" if the key itself is wrong.
    location = tuple(part for part in detail["loc"] if part != "[key]")
    kind, value = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    place = dotted(location)
    section = _section(location[:-1], model) if location else None
    fields = section.model_fields if section else {}
    if kind == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(str(location[-1]), fields)}"
    if kind == "missing":
        return f"{place}: is required and missing; add `{location[-1]}: ...`"
    if kind == "value_error":
        subject = "" if value is None or isinstance(value, (dict, list)) else f"{_shown(value)} "
        return f"{place}: {subject}{context['error']}"
    rule = _RULES[kind].format(**context) if kind in _RULES else detail["msg"]
    field = fields.get(str(location[-1])) if location else None
    default = field.get_default() if field and not field.is_required() else None
    remedy = f"; leave it out for the default {_shown(default)}" if isinstance(default, (bool, int, str)) else ""
    return f"{place}: {rule}, is {_shown(value)}{remedy}"


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = json.dumps(value) if value is None or isinstance(value, (bool, str)) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
