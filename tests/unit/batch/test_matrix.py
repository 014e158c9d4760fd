"""What a matrix and the command line name: runs, variants, values, resources, slots, the time of --until."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.errors import RecipeError
from recipes.loader import parse_value
from recipes.matrix import Matrix, Resources, load_matrix, parse_resources, variants
from tests.unit.batch.batches import recipe
from workflows.batch.__main__ import _until
from workflows.batch.attempt import Slot
from workflows.batch.preflight import preflight, wanted_runs
from workflows.batch.queue import parse_slots
from workflows.batch.state import BatchDirectory


def test_a_matrix_is_the_product_of_its_axes_with_readable_names(tmp_path: Path, source: Path) -> None:
    base = recipe(tmp_path, "base", source)
    body = {
        "base": str(base),
        "vary": {
            "convert.input_amax": [100.0, 200.0],
            "scheme": {"w4a4": {"modifiers.0.QuantizationModifier.scheme": "NVFP4"}, "w4a16": {}},
        },
        "set": {"export.max_shard_size": "1MB"},
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    matrix = load_matrix(tmp_path / "m.yaml")
    runs = wanted_runs([base], [(tmp_path / "m.yaml", matrix)], [])
    assert [run.name for run in runs] == [
        "base", "base-input_amax_100.0-w4a4", "base-input_amax_100.0-w4a16", "base-input_amax_200.0-w4a4",
        "base-input_amax_200.0-w4a16",
    ]  # fmt: skip
    assert runs[1].output == str(tmp_path / "out" / "base-input_amax_100.0-w4a4")
    assert 'export.max_shard_size="1MB"' in runs[1].overrides
    batch = BatchDirectory(tmp_path / "b.run")
    found = preflight(runs, batch, 1, False, lambda text: None)
    batch.close()
    assert not found.problems
    assert len({entry.recipe_digest for entry in found.entries}) == 5
    named = matrix.model_copy(update={"output": str(tmp_path / "models/{name}")})
    assert wanted_runs([], [(base, named)], [])[0].output == str(tmp_path / "models/base-input_amax_100.0-w4a4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vary": {"a": []}}, "vary: a: must be a list of values"),
        ({"vary": {"a": {"small": 3}}}, "vary: a: must be a list of values"),
        ({"varry": {}}, "varry: unknown key; did you mean 'vary'?"),
        ({"output": "/models/all"}, 'output: "/models/all" must contain {name}'),
        ({"resources": {"hours": 0}}, "resources.hours: must be more than 0"),
    ],
)
def test_a_wrong_matrix_is_refused_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"base": "r.yaml", "vary": {"a.b": [1]}} | change))
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        load_matrix(path)
    assert re.match(re.escape(str(path)) + r":\d+: ", str(error.value))


def test_resources_of_the_command_line_go_over_those_of_the_file() -> None:
    assert parse_resources(["hours=2"], Resources(nodes=3)) == Resources(nodes=3, hours=2)
    with pytest.raises(RecipeError, match=r"grace_seconds: .*at most half of the time limit"):
        parse_resources(["hours=0.1"], Resources())
    with pytest.raises(RecipeError, match=r"--resource gpus: .*keys are nodes"):
        parse_resources(["gpus=2"], Resources())


def test_variants_name_lists_and_words() -> None:
    matrix = Matrix(base="r.yaml", vary={"a.ignore": [["lm_head", "re:^x/y$"], []]})
    assert [name for name, _ in variants(matrix)] == ["ignore_lm_head_re_x_y", "ignore_none"]


def test_values_of_a_matrix_arrive_as_they_are_written(tmp_path: Path) -> None:
    values = [
        1e30,
        1e-7,
        3,
        None,
        True,
        "1e3",
        "no",
        "a b: c",
        "\U0001f600",
        [1e30, "x"],
        {"b": [1.5e9, None], "a": "010"},
    ]
    matrix = Matrix(base="r.yaml", vary={"a.b": values})
    found = [overrides[0].partition("=")[2] for _, overrides in variants(matrix)]
    assert [parse_value(text) for text in found] == values


def test_a_matrix_of_long_values_has_short_names_and_one_of_millions_of_runs_is_refused() -> None:
    matrix = Matrix(base="r.yaml", vary={"a.b": ["x" * 300 + "1", "x" * 300 + "2"]})
    one, two = (name for name, _ in variants(matrix))
    assert one != two and len(one) < 120
    with pytest.raises(RecipeError, match=r"vary: makes 10,000,000,000 runs, at most 10,000 are taken"):
        variants(Matrix(base="r.yaml", vary={f"a.k{axis}": list(range(10)) for axis in range(10)}))


def test_recipes_with_one_file_name_are_told_apart_by_their_directory(tmp_path: Path) -> None:
    assert [run.name for run in wanted_runs([Path("a/r.yaml"), Path("b/r.yaml")], [], [])] == ["a-r", "b-r"]
    with pytest.raises(RecipeError, match="a-r: two runs have this name; rename one recipe file"):
        wanted_runs([Path("a/r.yaml"), Path("b/a/r.yaml")], [], [])


def test_a_file_named_twice_is_called_so_whatever_its_spelling(tmp_path: Path) -> None:
    recipe, linked = tmp_path / "r.yaml", tmp_path / "link.yaml"
    linked.symlink_to(recipe)
    with pytest.raises(RecipeError) as caught:
        wanted_runs([recipe, Path(str(recipe)), linked, tmp_path / "new" / ".." / "r.yaml"], [], [])
    end = "name it once (--matrix runs variants of one recipe)"
    assert caught.value.problems == [
        f"{recipe}: this recipe file is named twice; {end}",
        f"{linked}: this recipe file is named twice, first as {recipe}; {end}",
        f"{tmp_path}/new/../r.yaml: this recipe file is named twice, first as {recipe}; {end}",
    ]
    with pytest.raises(RecipeError, match=r"m\.yaml: this matrix is named twice"):
        wanted_runs([], [(Path("m.yaml"), Matrix(base="r.yaml", vary={"a.b": [1]}))] * 2, [])


@pytest.mark.parametrize(
    ("text", "slots"),
    [("0-3,4-7", [(0, 1, 2, 3), (4, 5, 6, 7)]), ("0,2", [(0,), (2,)]), (None, [None])],
)
def test_slots(text: str | None, slots: list[Any]) -> None:
    assert parse_slots(text) == [Slot(gpus) for gpus in slots]


@pytest.mark.parametrize("text", ["0-3,3", "a", "3-1", "", "0-"])
def test_wrong_slots(text: str) -> None:
    with pytest.raises(RecipeError, match="--gpus"):
        parse_slots(text)


def test_until_is_the_next_time_the_clock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    now = 1_800_000_000.0
    import datetime

    clock = datetime.datetime.fromtimestamp(now)
    later, earlier = clock + datetime.timedelta(minutes=5), clock - datetime.timedelta(minutes=5)
    assert 0 < (_until(later.strftime("%H:%M")) or 0) - now <= 300
    assert 86_000 < (_until(earlier.strftime("%H:%M")) or 0) - now < 86_400
    with pytest.raises(RecipeError, match="time of day"):
        _until("7am")
