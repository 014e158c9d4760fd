"""Several ranks write the bytes that one writes, and end together, whatever happens to one of them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from calibration.runs import torchrun as torchrun_module
from tests import forced
from tests.integration.attempts import (
    INTERRUPTED,
    KILLED,
    SOURCE,
    TARGETS,
    Attempt,
    Case,
    kill_behind,
    poison,
    same,
    slow_blocks,
)
from tests.integration.held_runs import Hold
from tests.integration.interrupted_runs import KillAt, finish, interrupt, wait_until
from tests.integration.rank_runs import block_begun, end_ranks, go, messages, met, send, start_ranks
from tests.models import deepseek_v4, standard
from workflows.run import calibrate as calibrate_stage

RECIPE, ENVIRONMENT = 2, 4
DEEPSEEK = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    finish(["--help"], root / "log")
    return root


@pytest.fixture(scope="module")
def case(root: Path) -> Case:
    """Qwen3-MoE with its head quantized too, which is packed behind the last block."""
    source = standard.write(root / "qwen3_moe", "qwen3_moe")
    return Case(root / "all", source, "QuantizationModifier", [*TARGETS, "lm_head"])


@pytest.fixture
def attempt(case: Case, request: pytest.FixtureRequest) -> Attempt:
    return Attempt(case, re.sub(r"\W", "-", request.node.name), run=False)


def test_qwen3_moe(case: Case, attempt: Attempt) -> None:
    """Three batches for two ranks; activations partly on disk."""
    attempt.write(case.body | {"offload": {"max_host_memory": "64KiB"}})
    assert go(attempt) == [0, 0], attempt.text
    assert attempt.text.count("calibrated 85 modules in 3 blocks") == 1
    attempt.write(case.body)
    assert attempt.go(None, "--from", "export") == 0, attempt.text  # the recipe stands in the output
    same(attempt, case)
    assert [line["block"] for line in attempt.journal()] == [0, 1, 2]


@pytest.mark.parametrize("experts", ["routed", "topped_up"])
def test_routed_tokens_only(root: Path, case: Case, experts: str) -> None:
    """Experts that saw nothing on one rank, or on both, take what the others saw on either, or are topped up with the best
    candidates of all ranks."""
    mode = {"experts": {"topped_up": 6}} if experts == "topped_up" else {"experts": experts, "min_tokens_per_expert": 6}
    calibration = case.body["calibration"] | mode | {"max_seq_length": 4, "batch_size": 1}
    routed = Case(root / experts, root / "qwen3_moe", "QuantizationModifier", TARGETS, calibration)
    counts = [line["result"]["tokens_per_expert"].values() for line in routed.reference.journal()]
    # With two tokens for three ranks one of them saw nothing.
    assert min(map(min, counts)) == 0 and any(0 < count < 3 for block in counts for count in block)
    for size in (2, 3):
        attempt = Attempt(routed, f"ranks-{size}", run=False)
        assert go(attempt, size) == [0] * size, attempt.text
        same(attempt, routed)
        for mine, one in zip(attempt.journal(), routed.reference.journal(), strict=True):
            for key in ("tokens_per_expert", "topped_up", "filled_experts", "modules", "parity"):
                assert mine["result"][key] == one["result"][key]
            assert bool(mine["result"]["topped_up"]) == (experts == "topped_up")


@pytest.mark.parametrize("experts", ["all", "routed"])
def test_gptq_of_quantized_inputs(root: Path, case: Case, experts: str) -> None:
    """Three batches for two ranks, or for three; q, k and v share a Hessian, and with all experts so do all gates. What two
    ranks have begun, three finish."""
    calibration = case.body["calibration"] | {"experts": experts, "max_seq_length": 12}
    arguments = {"quantized_inputs": True, "weight_observer": "nvfp4_weighted"}
    one = Case(root / f"gptq-{experts}", root / "qwen3_moe", "GPTQModifier", TARGETS, calibration, **arguments)
    for size in (2, 3):
        attempt = Attempt(one, f"ranks-{size}", run=False)
        assert go(attempt, size) == [0] * size, attempt.text
        same(attempt, one)
    killed = Attempt(one, "killed", run=False)
    assert go(killed, 2, {0: partial(kill_behind, 0)})[0] == KILLED
    assert go(killed, 3) == [0] * 3, killed.text
    assert [block for block in killed.loaded() if block is not None] == [1, 2]
    same(killed, one)
    in_parts, parts_of_one = (Attempt(one, f"parts-{size}", run=False) for size in (2, 1))
    assert go(in_parts, 2, dict.fromkeys((0, 1), small_parts)) == [0, 0], in_parts.text
    assert parts_of_one.go(small_parts) == 0, parts_of_one.text
    assert in_parts.files() == parts_of_one.files()


def small_parts() -> None:
    """All gates and ups of a block are quantized in several parts, which several ranks divide."""
    from calibration.engine import gptq

    gptq._CHUNK = 40_000


@pytest.mark.parametrize("all_experts", [True, False])
def test_deepseek_v4(root: Path, case: Case, all_experts: bool) -> None:
    source = root / "deepseek_v4"
    if not source.exists():
        deepseek_v4.write(source, "fp8_mxfp4", o_lora_rank=64)
    calibration = case.body["calibration"] | {"all_experts": all_experts}
    name = f"deepseek_v4-{all_experts}"
    one = Case(root / name, source, "QuantizationModifier", DEEPSEEK, calibration)
    attempt = Attempt(one, "ranks", run=False)
    assert go(attempt) == [0, 0], attempt.text
    same(attempt, one)


def kill_once(case: Case, name: str, moments: random.Random) -> None:
    """One rank killed at a random moment: the other stops with one message, and any number of ranks goes on."""
    for number in range(20):
        attempt = Attempt(case, f"{name}-{number}", run=False)
        ranks, victim = start_ranks(attempt), moments.randrange(2)
        # Before they have met, it is torchrun that ends the others; without it they wait five minutes for each other.
        wait_until(met(attempt), ranks)
        time.sleep(moments.uniform(0.1, 1.5) * case.seconds * 0.8**number)
        if not all(process.is_alive() for process in ranks):
            end_ranks(attempt, ranks)
            continue
        send(ranks[victim], signal.SIGKILL)
        codes = end_ranks(attempt, ranks)
        if 0 in codes:
            continue  # one was through with its part
        assert codes[victim] == KILLED
        assert codes[1 - victim] == ENVIRONMENT, attempt.text
        assert len(messages(attempt)) == 1 and "Traceback" not in attempt.text, attempt.text
        pid = ranks[victim].pid
        known = f"rank {victim} of 2 on .* \\(pid {pid}\\) is gone without a word"
        assert re.search(f"{known}|the ranks cannot meet", messages(attempt)[0])
        assert set(go(attempt, moments.choice((1, 2, 2, 3)))) == {0}, attempt.text
        same(attempt, case)
        return
    pytest.fail("every run was done before it could be killed")


@pytest.mark.parametrize(
    ("part", "kills"), [(0, 2), *(pytest.param(part, 10, marks=pytest.mark.slow) for part in range(1, 6))]
)
def test_one_rank_killed_at_random_moments(case: Case, part: int, kills: int) -> None:
    moments = random.Random(part)
    for number in range(kills):
        kill_once(case, f"random-{part}-{number}", moments)


def dies_where_the_ranks_meet() -> None:
    calibrate_stage.require_equal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def learns_of_it_while_it_fails_itself() -> None:
    agree = torchrun_module._Connected.agree

    def late(self: Any, error: Any) -> Any:
        torchrun_module._Connected.agree = agree  # type: ignore[method-assign]
        time.sleep(30)
        return agree(self, error)

    torchrun_module._Connected.agree = late  # type: ignore[method-assign]
    calibrate_stage.require_equal = lambda *_: 1 // 0


def test_a_rank_that_fails_while_another_is_lost_names_the_loss(case: Case, attempt: Attempt) -> None:
    codes = go(attempt, 2, {0: dies_where_the_ranks_meet, 1: learns_of_it_while_it_fails_itself})
    assert codes == [KILLED, ENVIRONMENT], attempt.text
    (message,) = messages(attempt)
    assert "Traceback" not in attempt.text and re.search(r"rank 0 of 2 on .* is gone without a word", message)


def meets_in_a_store_of_its_own(kill: bool) -> None:
    """torchrun's agent has the store; here a child of rank 0, which it kills where rank 1 waits for it."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if not kill:
        return
    host = "import sys, time, torch.distributed as d; s = d.TCPStore('localhost', int(sys.argv[1]), None, True); time.sleep(99)"
    store = subprocess.Popen([sys.executable, "-c", host, os.environ["MASTER_PORT"]])
    require_equal = calibrate_stage.require_equal

    def without_store(*arguments: Any) -> None:
        store.kill()
        store.wait()
        require_equal(*arguments)

    calibrate_stage.require_equal = without_store


def test_the_loss_of_torchrun_is_no_defect_of_a_rank(case: Case, attempt: Attempt) -> None:
    codes = go(attempt, 2, {rank: partial(meets_in_a_store_of_its_own, rank == 0) for rank in range(2)})
    assert codes == [ENVIRONMENT, ENVIRONMENT], attempt.text
    said = messages(attempt)
    assert "Traceback" not in attempt.text and all("store at localhost:" in message for message in said), attempt.text
    assert 1 <= len(said) <= 2  # they cannot agree who says it


def test_torch_logs_nothing_beside_the_message_unless_asked(case: Case, attempt: Attempt) -> None:
    """Two of three ranks, in interpreters of their own, wait in a store that ends."""
    store = TCPStore("localhost", 0, None, True, wait_for_workers=False)
    ranks = {"RANK": "1"}, {"RANK": "2", "TORCH_CPP_LOG_LEVEL": "WARNING"}
    place = {"LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    command = [sys.executable, *forced.command("workflows.run"), str(attempt.recipe)]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | place | own
        )
        for own in ranks
    ]
    while not store.check([f"workflows/meeting 1 {rank}" for rank in (1, 2)]):
        assert [process.poll() for process in running] == [None, None]
        time.sleep(0.02)
    del store
    quiet, asked = (process.communicate(timeout=60)[0] for process in running)
    assert [process.returncode for process in running] == [ENVIRONMENT, ENVIRONMENT]
    assert re.fullmatch("error: WORLD_SIZE is 3 and the ranks cannot meet .*\n", quiet), quiet
    assert "TCPStore.cpp" in asked and asked.endswith(quiet)


@pytest.mark.slow
def test_one_rank_of_gptq_killed_at_random_moments(root: Path, case: Case) -> None:
    arguments = {"quantized_inputs": True, "weight_observer": "nvfp4_weighted"}
    one = Case(root / "gptq", root / "qwen3_moe", "GPTQModifier", TARGETS, case.body["calibration"], **arguments)
    moments = random.Random("gptq")
    for number in range(6):
        kill_once(one, f"random-{number}", moments)


@pytest.mark.parametrize(("victim", "size"), [(0, 3), (1, 1)])
def test_another_number_of_ranks_goes_on(case: Case, victim: int, size: int) -> None:
    """From the saved activations, whichever rank wrote them."""
    attempt = Attempt(case, f"other-{victim}-{size}", run=False)
    codes = go(attempt, 2, {victim: partial(kill_behind, 1) if victim == 0 else KillAt(10)})
    assert codes[victim] == KILLED and codes[1 - victim] == ENVIRONMENT
    finished = {line["block"] for line in attempt.journal()}
    assert set(go(attempt, size)) == {0}, attempt.text
    assert [block for block in attempt.loaded() if block is not None] == [b for b in range(3) if b not in finished]
    same(attempt, case)


def unreadable(block: int) -> None:
    """This rank's disk gives an error where the weights of `block` are read."""
    from calibration.checkpoint.index import Checkpoint
    from recipes.errors import SourceError

    read = Checkpoint.read

    def failing(self: Checkpoint, name: str, *args: Any) -> Any:
        if f"layers.{block}." in name:
            raise SourceError(f"{self.path(name)}: cannot be read: Input/output error")
        return read(self, name, *args)

    Checkpoint.read = failing  # type: ignore[method-assign]


@pytest.mark.parametrize(("harm", "victim"), [(poison, 1), (unreadable, 0)])
def test_an_error_on_one_rank_ends_all(case: Case, harm: Any, victim: int) -> None:
    attempt = Attempt(case, f"{harm.__name__}-{victim}", run=False)
    # The rehearsal would find it before the first block is done.
    assert go(attempt, 2, {victim: partial(harm, 1)}, "--no-rehearsal") == [SOURCE, SOURCE], attempt.text
    (message,) = messages(attempt)
    assert ("rank 1 of 2 on " in message) == (victim == 1)
    assert ("hidden states are not finite" if harm is poison else "Input/output error") in message
    assert "Traceback" not in attempt.text
    assert [line["block"] for line in attempt.journal()] == [0]
    assert go(attempt) == [0, 0], attempt.text
    assert attempt.loaded() == [1, 2]
    same(attempt, case)


def broken(block: int) -> None:
    """A defect of this program on this rank."""
    from calibration.engine import walk as sequential

    work = sequential.Walk._work

    def fails(self: Any, part: Any, started: float) -> Any:
        if part.number == block:
            raise IndexError("list index out of range")
        return work(self, part, started)

    sequential.Walk._work = fails  # type: ignore[method-assign]


def test_a_defect_on_one_rank_ends_all(case: Case, attempt: Attempt) -> None:
    assert go(attempt, 2, {1: partial(broken, 1)}) == [1, 1]
    (message,) = messages(attempt)
    assert "rank 1 of 2 on " in message and "IndexError: list index out of range: a defect here" in message
    assert attempt.text.count("Traceback") == 1


@pytest.mark.parametrize("to", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_first_signal_finishes_the_block_on_all_ranks_the_second_does_not(case: Case, to: int) -> None:
    attempt = Attempt(case, f"signal-{to}", run=False)
    for signals in (1, 2):
        since = attempt.log.stat().st_size if attempt.log.exists() else 0
        hold = Hold(attempt.directory / str(signals), signals - 1)
        ranks = start_ranks(attempt, 2, dict.fromkeys((0, 1), hold.install))
        wait_until(partial(hold.reached, 2), ranks)
        for _ in range(signals):
            interrupt(ranks[to].pid or 0, signal.SIGINT)
        hold.let_go()
        assert end_ranks(attempt, ranks, since) == [INTERRUPTED, INTERRUPTED], attempt.text
        assert [line["block"] for line in attempt.journal()] == [0]
        (message,) = messages(attempt)
        assert ("stopped after block 1 of 3" if signals == 1 else "interrupted: what is finished stays") in message
    assert go(attempt) == [0, 0]
    same(attempt, case)


def impatient() -> None:
    torchrun_module.BEAT, torchrun_module.SILENCE = 0.5, 3.0


def sleepy() -> None:
    impatient()
    slow_blocks(5.0)


def test_a_slow_rank_is_waited_for(case: Case, attempt: Attempt) -> None:
    """Longer than a silent one would be."""
    assert go(attempt, 2, {0: impatient, 1: sleepy}, "--stages", "inspect,calibrate") == [0, 0], attempt.text


def test_a_silent_rank_ends_the_run(case: Case, attempt: Attempt) -> None:
    ranks = start_ranks(attempt, 2, {0: impatient, 1: sleepy})
    wait_until(block_begun(attempt, 1), ranks)
    send(ranks[1], signal.SIGSTOP)
    ranks[0].join(60)
    send(ranks[1], signal.SIGKILL)
    assert end_ranks(attempt, ranks)[0] == ENVIRONMENT
    (message,) = messages(attempt)
    assert re.search(r"rank 1 of 2 on .* has given no sign of life for 3 s", message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"calibration": {"dataset": "bundled", "num_samples": 2, "batch_size": 2}}, "1 batches for 2 ranks"),
        ({"modifiers": [{"GPTQModifier": {"targets": TARGETS, "scheme": "NVFP4"}}]}, "modifiers.0.GPTQModifier: sums"),
        ({"method": "convert", "calibration": None}, "method: convert uses all processors"),
    ],
)
def test_what_ranks_cannot_share_is_refused_before_anything_starts(
    case: Case, sections: dict[str, Any], message: str
) -> None:
    attempt = Attempt(case, "refused-" + re.sub(r"\W", "-", message), run=False)
    attempt.write(case.body | sections)
    assert go(attempt) == [RECIPE, RECIPE], attempt.text
    (said,) = messages(attempt)
    assert message in said and "Traceback" not in attempt.text
    assert attempt.journal("fingerprint") == [] and not attempt.output.exists()


def torchrun(attempt: Attempt) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *forced.command("workflows.run")]
    with attempt.log.open("ab") as log:
        return subprocess.Popen([*command, str(attempt.recipe)], stdout=log, stderr=log, env=os.environ)


def test_torchrun(case: Case, attempt: Attempt) -> None:
    """A rank of torchrun's own is killed while the first block is calibrated; then the same command."""
    launcher = torchrun(attempt)
    events = attempt.run_directory / "events.jsonl"
    while not events.exists() or '"event": "load", "block": 0' not in events.read_text():
        assert launcher.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {child: Path(f"/proc/{child}/environ").read_text().split("\0") for child in children}
    (victim,) = [int(child) for child, environment in environments.items() if "RANK=1" in environment]
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(120) == 1
    attempt.text = attempt.log.read_text()
    (message,) = messages(attempt)
    assert re.search(rf"rank 1 of 2 on .* \(pid {victim}\) is gone without a word", message)
    assert torchrun(attempt).wait(120) == 0, attempt.log.read_text()
    attempt.code = 0
    same(attempt, case)
