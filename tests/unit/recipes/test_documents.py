"""YAML of a user or a stranger: nothing surprising is taken, nothing explodes, nothing raises but a RecipeError."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import documents
from recipes.errors import RecipeError
from recipes.loader import load_recipe
from recipes.schema import Recipe

MINIMAL = """source: {checkpoint: models/source}
output: models/output
modifiers:
  - QuantizationModifier:
      config_groups:
        experts: {targets: ['re:^layers.*experts.*w[123]$'], scheme: NVFP4}
calibration: {dataset: bundled, num_samples: 8}
"""


def load(directory: Path, text: str | bytes, *overrides: str) -> Recipe:
    path = directory / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return load_recipe(path, overrides)


def refused(directory: Path, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(directory, text, *overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("1:30", "1:30 is no plain number in YAML; write it in decimal digits"),
        ("010", "010 is no plain number"),
        ("0x10", "0x10 is no plain number"),
        ("0b11", "0b11 is no plain number"),
        ("1_000", "1_000 is no plain number"),
        ("-010", "-010 is no plain number"),
        ("1:30.5", "must be a finite number"),
        ("1_0.5", "must be a finite number"),
        (".inf", "must be a finite number"),
        (".NaN", "must be a finite number"),
        ("yes", "yes is no plain truth value in YAML; write true or false"),
        ("Off", "Off is no plain truth value"),
        ("!!timestamp x", "the tag !!timestamp is not taken"),
        ("!!bool x", "the tag !!bool is not taken"),
        ("!!int '5'", "the tag !!int is not taken"),
        ("!!binary aGk=", "the tag !!binary is not taken"),
        ("!!python/object/apply:os.system [id]", "the tag !!python/object/apply:os.system is not taken"),
        ("!mine {}", "the tag !mine is not taken"),
        ("! 5", "the tag ! is not taken"),
        ('"a\\0b"', "holds the control character '\\x00'"),
        ('"\\e[31m"', "holds the control character '\\x1b'"),
        ('"\\ud800"', "holds the control character '\\ud800'"),
        ("9" * 5000, "is not "),
        ("2001-12-14t21:59:43.10-99:99", "is not "),
    ],
)
def test_surprising_values_are_refused_in_a_file_and_on_the_command_line(value: str, says: str, tmp_path: Path) -> None:
    in_file = refused(tmp_path, MINIMAL + f"convert: {{input_amax: {value}}}\n")
    on_line = refused(tmp_path, MINIMAL, f"convert.input_amax={value}")
    for problems, where in ((in_file, f"{tmp_path}/recipe.yaml"), (on_line, "--set convert.input_amax=")):
        assert any(problem.startswith(where) and says in problem for problem in problems), problems


def test_a_surprising_number_names_line_and_key_beside_the_other_problems(tmp_path: Path) -> None:
    problems = refused(tmp_path, MINIMAL.replace("num_samples: 8", "num_samples: 010, seed: -1, 0x1: 2"))
    assert len(problems) == 4 and all(p.startswith(f"{tmp_path}/recipe.yaml:7: calibration.") for p in problems)


@pytest.mark.parametrize(("value", "read"), [("5", 5), ("+5", 5), ("0", 0), ("'010'", "010"), ("1e3", "1e3"), ("-2.50", -2.5),
                                             ("1.5e+3", 1500.0), ("True", True), ("~", None), ("'yes'", "yes")])  # fmt: skip
def test_plain_values_are_read(value: str, read: Any) -> None:
    document = documents.parse(f"a: {value}")
    assert document.data == {"a": read} and document.problems == []


def laughs(levels: int) -> str:
    lines = ["x0: &x0 [lol, lol]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, levels))]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["x0: &x0 {k: 1}", *(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (laughs(30), "holds more than 100,000 values once its aliases are written out"),
        (merges(30), "holds more than 100,000 values once its aliases are written out"),
        ("a: " + "[" * 100_000, "nested more than 40 deep"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "nested more than 40 deep"),
        ("- " * 100_000, "nested more than 40 deep"),
        ("a: " + "x" * 600_000, "holds more than 524,288 bytes"),
        ("? {a: b}\n: c\n", "is not valid YAML"),
        ("a: {<<: 3}\n", "is not valid YAML"),
        ("a: *nobody\n", "is not valid YAML"),
    ],
    ids=range(9),
)
def test_what_explodes_is_refused_at_once(text: str, says: str, tmp_path: Path) -> None:
    started = time.process_time()
    assert says in refused(tmp_path, text)[0]
    assert time.process_time() - started < 5


def test_anchors_and_merge_keys_of_honest_recipes_are_taken(tmp_path: Path) -> None:
    text = MINIMAL.replace("experts: {", "experts: &group {").replace(
        "calibration:", "        more: {<<: *group, targets: ['re:^head$']}\ncalibration:"
    )
    groups = load(tmp_path, text).quantization_modifier.config_groups
    assert groups["more"].scheme == "NVFP4" and groups["more"].targets == ["re:^head$"]


def test_a_recipe_that_is_a_fifo_or_a_device_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    found: list[str] = []

    def attempt(path: Path) -> None:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        found.extend(caught.value.problems)

    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), Path("a\0b")):
        thread = threading.Thread(target=attempt, args=(path,), daemon=True)
        thread.start()
        thread.join(10)
    assert [says in problem for says, problem in zip(("a FIFO", "a device", "embedded null"), found, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/", "must end in the name of a directory"),
        (".", "must end in the name of a directory"),
        ("a/..", "must end in the name of a directory"),
        ("a\0b", "must not hold the control character '\\x00'"),
        ("a\nb", "must not hold the control character '\\n'"),
        ("a" * 241, "is longer than a path may be"),
        ("a/" * 2500, "is longer than a path may be"),
    ],
    ids=range(7),
)
def test_an_output_that_can_be_no_directory_is_refused(output: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"^--output: output: ") as caught:
        load_recipe(tmp_path / "recipe.yaml", output=output)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["g[/]", "", "a\tb", "x" * 65, "kept_fp8", "[bold]"])
def test_a_group_name_that_is_no_plain_word_is_refused(name: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(MINIMAL)
    groups = raw["modifiers"][0]["QuantizationModifier"]["config_groups"]
    groups[name] = groups.pop("experts")
    problems = refused(tmp_path, yaml.safe_dump(raw))
    assert len(problems) == 1 and "rename the group" in problems[0]


def test_mutated_recipes_load_or_are_refused(tmp_path: Path) -> None:
    """Whatever bytes a recipe is damaged to, the loader returns or raises RecipeError, with messages that can be printed."""
    shipped = Path(documents.__file__).parent / "quickstart.yaml"
    bodies = [MINIMAL.encode(), shipped.read_bytes()]
    pieces = [
        *(b"!!timestamp ", b"!!python/name:os.system ", b"&a ", b"*a", b"<<: ", b"? ", b"- ", b"{", b"[", b"'", b'"'),
        *(b"\\x00", b"|", b": ", b"\n", b"\xff", b"~", b"1:30", b"=", b"%", b"2001-01-01", b"\xed\xa0\x80", b"9" * 21),
    ]
    random.seed(7)
    for _ in range(300):
        body = bytearray(random.choice(bodies))
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(body))
            body[at : at + random.randint(0, 6)] = random.choice(pieces)
        try:
            load(tmp_path, bytes(body))
        except RecipeError as error:
            assert "".join(error.problems).encode("utf-8")
