"""What the probe of matrix products finds, and what a run that goes on elsewhere is told."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint import native
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.model.skeleton import build_skeleton
from calibration.runs import row_invariance as products
from calibration.runs import torchrun
from calibration.runs.row_invariance import Products, device_name, try_products
from tests.models import deepseek_v4
from tests.uneven import uneven_products

SHAPES = [(96, 64), (64, 96), (96, 64)]


def test_row_counts_whose_bits_differ_are_found() -> None:
    even = try_products(SHAPES)
    assert even == try_products(reversed(SHAPES)) and even.device == device_name()
    with uneven_products():
        uneven = try_products(SHAPES)
    assert not uneven.row_invariant and set(uneven.differing) == {"[96, 64]", "[64, 96]"}
    assert uneven.digest != even.digest and uneven.facts["row_invariant"] is False


@pytest.mark.parametrize(
    ("differing", "invariant"), [({}, True), ({"[8, 64]": [1, 7]}, True), ({"[8, 64]": [1, 16]}, False)]
)
def test_fewer_rows_than_an_expert_ever_has_do_not_count(differing: dict[str, list[int]], invariant: bool) -> None:
    assert Products("cpu A", "12", differing).row_invariant is invariant


def test_another_order_of_adding_is_found_although_bf16_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with AMX: 1 of 10,000 common outputs showed that fewer rows are added up in two halves."""
    linear = torch.nn.functional.linear

    def halved(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(rows) > 16:
            return linear(rows, weight)
        half = rows.shape[1] // 2
        first, second = rows.float().split(half, 1), weight.float().split(half, 1)
        return (first[0] @ second[0].T + first[1] @ second[1].T).to(rows.dtype)

    few = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(halved(few, few[:8]), linear(few, few[:8]))
    monkeypatch.setattr(products.F, "linear", halved)
    assert try_products([(8, 512)]).differing["[8, 512]"][:3] == [1, 7, 16]


def test_the_device_names_a_processor_that_is_no_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls the instructions of an ARM without SVE as those of an old x86: DEFAULT."""
    monkeypatch.setattr(native, "accelerator", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for machine, name in (("x86_64", "cpu DEFAULT"), ("aarch64", "cpu aarch64 DEFAULT")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert device_name() == name


def test_a_torch_built_for_cuda_computes_on_the_cpu_where_no_gpu_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's default wheel names the accelerator that it was built for, whether or not one can be used."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    probe = try_products(SHAPES)
    assert probe.device == device_name() and probe.device.startswith("cpu ")
    assert object.__new__(torchrun._Connected).device is None
    source = Checkpoint.open(deepseek_v4.write(tmp_path / "source", "bf16"))
    assert build_skeleton(Formats(source), tmp_path, False).device == native.computing_device() == torch.device("cpu")
    assert native.computing_device(torch.device("meta")) == torch.device("meta")


def test_the_most_common_shapes_are_tried_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, linear = list[tuple[int, ...]](), torch.nn.functional.linear
    monkeypatch.setattr(
        products.F, "linear", lambda rows, weight: tried.append(tuple(weight.shape)) or linear(rows, weight)
    )
    shapes = [(4096, 16)] * 4 + [(8, 5, 16)] * 3 + [(16, 9000)] * 2 + [(3, 16)]
    assert not try_products(shapes).differing.get("[3, 16]")
    assert set(tried) == {(products.OUTPUTS, 16), (5, 16), (16, products.INPUTS)}
    assert try_products([]).row_invariant


def test_the_digest_tells_float32_products_and_with_hessians_factors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL has rules of its own: MKL_CBWR=COMPATIBLE, or another maker's processor, leaves every BF16 product as it is."""
    here, factored = try_products(SHAPES), try_products(SHAPES, hessians=True)
    assert here.digest == try_products(SHAPES).digest != factored.digest
    product, cholesky = torch.mm, torch.linalg.cholesky
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", lambda *factors: product(*factors).nextafter(torch.tensor(torch.inf)))
        assert try_products(SHAPES).digest != here.digest
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: cholesky(matrix).nextafter(torch.tensor(torch.inf)))
    assert try_products(SHAPES).digest == here.digest and try_products(SHAPES, hessians=True).digest != factored.digest


@pytest.mark.parametrize(
    ("recorded", "lost"),
    [
        ([], None),
        ([{"fact": "fingerprint", "parts": {"device": "cpu A"}}], None),
        (
            [{"fact": "fingerprint", "parts": {"device": "cpu B"}}],
            "on cpu B, and cpu A (products 12, 2 threads) rounds",
        ),
        ([{"fact": "products", "device": "cpu A", "digest": "12"}], None),
        ([{"fact": "products", "device": "cpu A", "digest": "12", "threads": 1}], None),
        (
            [{"fact": "products", "device": "cpu A", "digest": "34"}],
            "on cpu A (products 34), and cpu A (products 12, 2 threads) rounds",
        ),
        (
            [{"fact": "products", "device": "cpu A", "digest": "34", "threads": 1}],
            "on cpu A (products 34, 1 thread), and cpu A (products 12, 2 threads) rounds",
        ),
        ([{"fact": "products", "device": "cpu B", "digest": "12"}], "on cpu B (products 12), and cpu A"),
    ],
)
def test_a_run_that_goes_on_elsewhere_hears_what_it_loses(recorded: list[dict[str, Any]], lost: str | None) -> None:
    told = Products("cpu A", "12", threads=2).lost(recorded)
    assert told is None if lost is None else told is not None and lost in told and "--restart" in told


def test_another_number_of_threads_is_undone_by_a_setting() -> None:
    recorded = {"fact": "products", "device": "cpu A", "digest": "34", "threads": 1}
    told = Products("cpu A", "12", threads=2).lost([recorded])
    assert told is not None and "set OMP_NUM_THREADS=1; " in told
    for other in ({"device": "cpu B"}, {"threads": 2}):
        told = Products("cpu A", "12", threads=2).lost([recorded | other])
        assert told is not None and "OMP_NUM_THREADS" not in told
