"""The versions of the packages that an output's bytes depend on."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

#: Packages, including this one, whose arithmetic or file format the output depends on.
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "nvfp4-workflows")


def versions() -> dict[str, str]:
    """The version of each of PACKAGES."""
    found = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
