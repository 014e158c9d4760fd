"""Packs what a bare GPU machine lacks: wheels, the project with its tests, and nothing that is there.

    python -m tests.gpu.pack [DIRECTORY] [--python 3.12] [--machine aarch64] [--there NAME ...]

DIRECTORY (build/gpu, ignored by git) then holds `wheels/`, `project.tar` and `run.sh`, together below 64 MiB. Wheels are of the
versions installed here; of packages that are compiled, those for the other machine's Python.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
#: Bytes that may travel.
MOST = 64 << 20
#: What the project and its tests import, directly, and what builds it: a new environment may hold an old one.
WANTED = ("llmcompressor", "compressed-tensors", "pydantic", "pyyaml", "regex", "rich", "safetensors", "huggingface-hub",
          "jinja2", "matplotlib", "pytest", "setuptools")  # fmt: skip
#: Packages of a usual image with PyTorch and transformers; their own dependencies are there with them.
THERE = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "accelerate", "numpy", "scipy"),
    *("pandas", "pyarrow", "fsspec", "aiohttp", "httpx", "xxhash", "requests", "tqdm", "packaging", "filelock", "regex"),
    *("pyyaml", "jinja2", "rich", "matplotlib", "pillow", "pytest", "psutil", "py-cpuinfo"),
    *("typing-extensions", "nvidia-ml-py", "sympy", "networkx", "markdown-it-py", "pygments", "threadpoolctl"),
)  # fmt: skip


def lacking(there: Collection[str]) -> dict[str, str]:
    """Package -> version installed here, of all that WANTED need and that is not `there`."""
    present, found = {canonicalize_name(name) for name in there}, dict[str, str]()

    def visit(name: str) -> None:
        name = canonicalize_name(name)
        if name in present or name in found:
            return
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # of another platform
            return
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                visit(needed.name)

    for name in WANTED:
        visit(name)
    return found


def download(packages: dict[str, str], python: str, machine: str, wheels: Path) -> None:
    """Fetches one wheel of each package for Linux on `machine` (as `uname -m` says it). Raises CalledProcessError."""
    platforms = [f"--platform=manylinux{release}_{machine}" for release in ("_2_28", "_2_27", "_2_17", "2014")]
    named = [f"{name}=={number}" for name, number in sorted(packages.items())]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation=cp",
    ]
    subprocess.run([*command, f"--python-version={python}", *platforms, "--dest", str(wheels), *named], check=True)


def pack(directory: Path, python: str, there: Collection[str], machine: str = "x86_64") -> int:
    """Writes the pack; returns its bytes. Raises SystemExit if it is too large."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "wheels").mkdir(parents=True)
    packages = lacking(there)
    download(packages, python, machine, directory / "wheels")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    with tarfile.open(directory / "project.tar", "w") as tar:
        for name in sorted(set(files)):
            if (ROOT / name).is_file():
                tar.add(ROOT / name, name)
    shutil.copyfile(ROOT / "tests" / "gpu" / "run.sh", directory / "run.sh")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if size > MOST:
        raise SystemExit(f"{directory}: {size:,} bytes, at most {MOST:,} may travel; name more of what is --there")
    return size


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / "gpu")
    parser.add_argument("--python", default="3.12", help="the version of the other machine's Python")
    parser.add_argument(
        "--machine", default="x86_64", help="the other machine's processor: aarch64 for GH200 and GB200"
    )
    parser.add_argument("--there", nargs="*", default=THERE, help="packages that the other machine has")
    given = parser.parse_args()
    size = pack(given.directory, given.python, given.there, given.machine)
    names = ", ".join(path.name.partition("-")[0] for path in sorted((given.directory / "wheels").iterdir()))
    print(f"{given.directory}: {size / 2**20:.1f} MiB; wheels: {names}")


if __name__ == "__main__":
    main()
