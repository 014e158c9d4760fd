"""The dress rehearsal: the whole way in miniature, in front of the first block, without a trace in the output."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from calibration.runs.journal import RunDirectory
from tests.exported import EXPERTS
from tests.integration.attempts import KILLED, Attempt, Case, same
from tests.integration.interrupted_runs import finish
from tests.integration.mornings import long_night
from tests.integration.whole_runs import SERVING
from tests.models import deepseek_v4, standard


class Dressed(Attempt):
    def go(self, prepare: Any = long_night, *options: str) -> int:
        self.code, self.text = finish([str(self.recipe), *options], self.log, prepare)
        return self.code

    @property
    def proof(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_directory / "rehearsal.json").read_text())
        return found

    def events(self) -> list[str]:
        return [event["event"] for event in RunDirectory(self.output).events()]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("dress")
    source = standard.write(root / "source", "glm4_moe")
    finish(["--help"], root / "log")
    return Case(root / "case", source, "QuantizationModifier")


@pytest.fixture
def attempt(case: Case, request: pytest.FixtureRequest) -> Dressed:
    return Dressed(case, request.node.name.partition("[")[0], run=False)


def nothing_began(attempt: Attempt) -> None:
    assert not attempt.output.exists() and not attempt.journal() and attempt.loaded() == []
    assert not list(attempt.run_directory.glob("miniature*"))
    assert "Traceback" not in attempt.text


def test_changes_no_byte_and_leaves_its_proof(case: Case, attempt: Dressed) -> None:
    attempt.go()
    same(attempt, case)
    assert "dress rehearsal: blocks 0, 1 as a model of their own: " in attempt.text, attempt.text
    assert "dress rehearsal: structure PASS" in attempt.text
    assert attempt.proof["complete"] is True and attempt.proof["blocks"] == [0, 1]
    assert {check["verdict"] for check in attempt.proof["checks"]} == {"PASS"}
    assert not list(attempt.run_directory.glob("miniature*"))


def test_is_left_out_before_a_short_run_and_says_so(case: Case, attempt: Dressed) -> None:
    attempt.go(None)
    same(attempt, case)
    assert "no dress rehearsal: the run is predicted to take" in attempt.text
    assert not (attempt.run_directory / "rehearsal.json").exists()


def test_a_resumed_run_of_the_same_plan_does_not_rehearse_again(case: Case, attempt: Dressed) -> None:
    assert attempt.go(long_night, "--stages", "inspect,rehearse") == 0
    nothing_began(attempt)
    attempt.go()
    same(attempt, case)
    assert "rehearsed before, by the same plan, recipe and versions" in attempt.text
    assert attempt.events().count("dress_rehearsal") == 1


@pytest.mark.slow
def test_another_recipe_rehearses_again(case: Case, attempt: Dressed) -> None:
    assert attempt.go(long_night, "--stages", "inspect,rehearse") == 0
    attempt.write(case.body | {"calibration": case.body["calibration"] | {"all_experts": False}})
    assert attempt.go(long_night, "--stages", "inspect,rehearse") == 0
    assert attempt.events().count("dress_rehearsal") == 2


def test_runs_that_share_a_directory_rehearse_each_plan_once(case: Case, attempt: Dressed) -> None:
    shared = ("--stages", "inspect,rehearse", "--rehearsals", str(attempt.directory / "rehearsals"))
    assert attempt.go(long_night, *shared) == 0 and "dress rehearsal: structure PASS" in attempt.text
    other = Dressed(case, "other_output", run=False)
    other.write(
        case.body | {"calibration": case.body["calibration"] | {"num_samples": 5}}
    )  # the same plan on other text
    assert other.go(long_night, *shared) == 0
    assert "rehearsed before, by the same plan" in other.text and "dress_rehearsal" not in other.events()


def kill_in_the_miniature() -> None:
    long_night()
    from workflows.run import dress_rehearsal

    def dies(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    dress_rehearsal.verify_levels = dies  # type: ignore[assignment]


def test_what_a_kill_left_is_removed_by_the_next_start(case: Case, attempt: Dressed) -> None:
    assert attempt.go(kill_in_the_miniature) == KILLED
    assert (attempt.run_directory / "miniature" / "output").is_dir()
    attempt.go(None, "--no-rehearsal")
    same(attempt, case)
    assert not list(attempt.run_directory.glob("miniature*"))


def no_disk() -> None:
    long_night()
    from calibration.runs import disk
    from workflows.run import dress_rehearsal

    def full(needs: list[disk.Need]) -> list[str]:
        return [f"{needs[0].what}: no room"]

    dress_rehearsal.space_problems = full  # type: ignore[assignment]


def no_memory() -> None:
    long_night()
    from workflows.run import dress_rehearsal

    dress_rehearsal.available_memory = lambda: 1000  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (no_disk, "the miniature: no room"),
        pytest.param(no_memory, "bytes of memory and 1,000 are free", marks=pytest.mark.slow),
    ],
)
def test_where_there_is_no_room_the_run_begins_unrehearsed_and_says_so(
    case: Case, tmp_path: Path, prepare: Any, why: str
) -> None:
    attempt = Dressed(case, f"no_room_{prepare.__name__}", prepare)
    same(attempt, case)
    assert "dress rehearsal: serving.rehearsal UNCHECKED: " in attempt.text and why in attempt.text
    assert attempt.proof["complete"] is False


def test_a_conversion_is_rehearsed_too(case: Case, attempt: Dressed) -> None:
    body = {name: section for name, section in case.body.items() if name != "calibration"}
    attempt.write(body | {"method": "convert"})
    assert attempt.go() == 0, attempt.text
    assert "dress rehearsal: structure PASS" in attempt.text and attempt.proof["blocks"] == [0, 1]


def test_gptq_is_rehearsed_with_its_own_targets(case: Case, tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3")
    attempt = Dressed(case, "gptq", run=False)
    entry = {"GPTQModifier": {"targets": [r"re:^model\.layers\.[01]\..*proj$"], "scheme": "NVFP4"}}
    attempt.write(case.body | {"source": {"checkpoint": str(source)}, "modifiers": [entry]})
    assert attempt.go() == 0, attempt.text
    assert attempt.proof["blocks"] == [0, 2] and attempt.proof["complete"] is True


@pytest.mark.slow
def test_vllm_serves_the_miniature_of_deepseek_v4(case: Case, attempt: Dressed, tmp_path: Path) -> None:
    source = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4", layers=5)
    modifiers = [{"QuantizationModifier": {"targets": EXPERTS, "scheme": "NVFP4"}}]
    sections = {"verify": {"serving": SERVING}, "rehearse": {"serving": True}, "modifiers": modifiers}
    attempt.write(case.body | {"source": {"checkpoint": str(source)}, **sections})
    assert attempt.go(None, "--stages", "inspect,rehearse") == 0, attempt.text
    verdicts = {check["id"]: check["verdict"] for check in attempt.proof["checks"]}
    assert attempt.proof["blocks"] == [0, 1, 2, 3] and attempt.proof["seconds"] < 300
    for name in ("load", "tensors", "w4a4", "finite", "logprobs", "generate"):
        assert verdicts[f"serving.{name}"] == "PASS", attempt.proof
    nothing_began(attempt)
