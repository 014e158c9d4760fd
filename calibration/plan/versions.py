"""The versions of the packages that an output's bytes depend on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

#: Packages, including this one, whose arithmetic or file format the output depends on.
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "nvfp4-workflows")


def versions() -> dict[str, str]:
    """The version of each of PACKAGES."""
    return {package: _version(package) for package in PACKAGES}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
