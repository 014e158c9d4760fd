"""The versions that an output depends on, as the installed packages state them."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from calibration.plan import versions as module
from calibration.plan.versions import PACKAGES, versions


def test_installed_packages_are_searched_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def search(package: str) -> str:
        asked.append(package)
        return version(package)

    monkeypatch.setattr(module, "version", search)
    module._version.cache_clear()
    found = [versions() for _ in range(3)]
    assert asked == list(PACKAGES)
    assert found == [{package: version(package) for package in PACKAGES}] * 3
