"""calibration.experts: its forms, what is refused, and what it changes of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calibration.forecast.cost import block_costs, shown_share
from calibration.runs.fingerprint import fingerprint
from recipes.loader import dump_recipe, load_recipe
from tests.exported import recipe, task_of
from tests.models import deepseek_v4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("experts") / "source", "bf16")


def calibration(source: Path, output: Path, **keys: Any) -> Any:
    return recipe(source, output, calibration={"dataset": "bundled"} | keys)


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({}, "all"),
        ({"experts": "all"}, "all"),
        ({"all_experts": True}, "all"),
        ({"all_experts": None}, "all"),
        ({"experts": "routed"}, "routed"),
        ({"all_experts": False}, "routed"),
        ({"all_experts": False, "experts": "routed"}, "routed"),
        ({"experts": {"topped_up": 64}}, 64),
    ],
)
def test_the_older_spelling_means_what_it_meant(
    source: Path, tmp_path: Path, keys: dict[str, Any], meant: str | int
) -> None:
    made = calibration(source, tmp_path / "output", **keys)
    assert (made.calibration.topped_up or made.calibration.experts) == meant
    (tmp_path / "again.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "again.yaml") == made


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"experts": "routed", "all_experts": True}, "all_experts: true means `experts: all`"),
        ({"experts": {"topped_up": 4}, "all_experts": False}, "all_experts: false means `experts: routed`"),
        ({"experts": {"topped_up": 4}, "min_tokens_per_expert": 2}, "min_tokens_per_expert: 2 is for"),
        *(({"experts": wrong}, "must be all, routed or {topped_up: N}")
          for wrong in ("some", 5, True, {"topped_up": 0}, {"topped_up": True}, {"topped_up": 65_537}, {"top": 3},
                        {"topped_up": 3, "more": 4}, None)),
    ],
)  # fmt: skip
def test_contradictions_are_refused(source: Path, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        calibration(source, tmp_path / "output", **keys)
    assert refused.value.error_count() == 1 and said in str(refused.value)


def test_a_run_from_before_the_key_resumes_and_another_mode_does_not(source: Path, tmp_path: Path) -> None:
    """The plan does not depend on it; the fingerprint spells the two older modes as ever."""
    modes = ("all", "routed", {"topped_up": 4}, {"topped_up": 5})
    tasks = [task_of(calibration(source, tmp_path / "output", experts=mode)) for mode in modes]
    assert len({task.plan.digest for task in tasks}) == 1
    parts = [fingerprint(task, "data", "cpu") for task in tasks]
    old, new = "recipe calibration.all_experts", "recipe calibration.experts.topped_up"
    assert [part[old] for part in parts] == [True, False, False, False]
    assert [part.get(new) for part in parts] == [None, None, 4, 5]
    assert not any(key.startswith("recipe calibration.experts") for part in parts[:2] for key in part)


def test_the_forecast_counts_the_tokens_that_experts_see(source: Path, tmp_path: Path) -> None:
    """Of 64 experts and 6 a token, a routed expert sees 6/64 of 640 tokens on average; topped up to 160, a quarter."""
    found = {}
    for name, mode in {"all": "all", "routed": "routed", "more": {"topped_up": 160}}.items():
        task = task_of(calibration(source, tmp_path / "output", experts=mode))
        block = block_costs(task.plan, task.formats, shown_share(task.recipe, 640))[0]
        found[name] = {product.use: (product.share, product.observed) for product in block.products}
    config = task.source.config
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    assert share < 0.25
    assert found["all"] == {"layer": (1, 1), "expert gate": (1, 1), "expert down": (share, 1)}
    assert found["routed"] == {"layer": (1, 1), "expert gate": (share, share), "expert down": (share, share)}
    assert found["more"] == {"layer": (1, 1), "expert gate": (0.25, 0.25), "expert down": (share, 0.25)}
