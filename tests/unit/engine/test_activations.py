"""Activations between blocks lie in mapped files, not in memory of the process's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from calibration.checkpoint.files import file_digest
from calibration.engine.activations import ActivationCache
from calibration.runs.resume import Boundary
from recipes.errors import EnvironmentProblem


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose pages a tensor's bytes are; empty where they are anonymous."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split()[5] if line.count("/") else ""
    raise AssertionError("no mapping")


def values(number: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden = torch.randn(1, 64, 512, generator=generator).to(torch.bfloat16)
    return {"hidden": hidden + number, "mask": torch.ones(1, 64, dtype=torch.int64)}


@pytest.mark.parametrize("limit", [None, 100_000, 10**9])
def test_a_boundary_is_mapped_beyond_the_limit(tmp_path: Path, limit: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    with ActivationCache(torch.device("cpu"), tmp_path, limit, lasting=True) as cache:
        for number in range(2):
            cache.add(values(number, generator))
        cache.aim(1, save=True)
        made = [values(number, generator) for number in range(2)]
        for number in range(2):
            cache.replace(number, {"hidden": made[number]["hidden"]}, [])
        held = {None: 0, 100_000: 1, 10**9: 2}[limit]
        assert cache.held_bytes == held * sum(value.nbytes for value in made[0].values())
        boundary = cache.commit()
        assert boundary is not None and list(boundary.files) == ["batch-000000.pt", "batch-000001.pt"]
        for _ in range(2):
            for number in range(2):
                found = cache.fetch(number)
                path = boundary.directory / f"batch-{number:06d}.pt"
                assert mapped_file(found["hidden"]) == ("" if number < held else str(path))
                assert torch.equal(found["hidden"], made[number]["hidden"])
                if number >= held:
                    found["hidden"].zero_()  # a copy of the page, for this fetch alone
                assert file_digest(path) == boundary.files[path.name]
            cache.restore(boundary)


def test_without_a_run_directory_memory_holds_them(tmp_path: Path) -> None:
    with ActivationCache(torch.device("cpu"), tmp_path) as cache:
        cache.add(values(0, torch.Generator().manual_seed(0)))
        assert cache.held_bytes and not cache.spilled and not list(tmp_path.iterdir())


class Order:
    """What a pickle of a stranger does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_saved_activations_from_elsewhere_run_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "activations" / "boundary-0001"
    folder.mkdir(parents=True)
    torch.save({"hidden": Order(tmp_path / "made")}, folder / "batch-000000.pt")
    with ActivationCache(torch.device("cpu"), tmp_path / "activations", 10**9, lasting=True) as cache:
        cache.numbers = [0]
        with pytest.raises(EnvironmentProblem, match=r"batch-000000\.pt: .* more than tensors and plain values"):
            cache.restore(Boundary(folder, {"batch-000000.pt": file_digest(folder / "batch-000000.pt")}))
    assert not (tmp_path / "made").exists()
