"""Runs a command where both environments find a processor with AMX, on any processor with AVX-512.

    python -m tests.amx .venv/bin/python -m pytest tests/integration/test_ranks.py     (make test-amx: all of them)

oneDNN, torch and vLLM then take the kernels that they take on a Sapphire Rapids, and emulator.c executes their AMX
instructions. A library asks CPUID, which cannot be caught; so copies of the libraries, with 0x06 (no instruction) for the
first byte of every CPUID and XGETBV, are laid over the originals by bind mounts that only the command sees. MKL and NumPy's
BLAS are asked too if they lie in these libraries. As root, with gcc, binutils and util-linux.

With AMX_EMULATOR_RECORD=FILE, each process appends its command at its first AMX instruction.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "amx"
SOURCE = Path(__file__).with_name("emulator.c")
LIBRARIES = {
    ".venv": ("torch/lib/libtorch_cpu.so", "torch/lib/libc10.so"),
    ".venv-vllm": (
        "torch/lib/libtorch_cpu.so", "torch/lib/libc10.so",
        "vllm/_C.abi3.so", "vllm/_C_AVX512.abi3.so", "vllm/_C_AVX2.abi3.so",
    ),
}  # fmt: skip
ENCODED = {"cpuid": b"\x0f\xa2", "xgetbv": b"\x0f\x01\xd0"}
NO_INSTRUCTION = b"\x06"
CPU_FLAGS = "amx_bf16 amx_tile amx_int8 avx512_fp16"


def built() -> Path:
    """The emulator, compiled if it is older than its source. Raises CalledProcessError if gcc does not."""
    library = BUILD / "emulator.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"], check=True
        )
    return library


def asks(library: Path) -> list[tuple[int, bytes]]:
    """Each CPUID and XGETBV of a library as the disassembler finds them: its offset in the file and its bytes."""
    command = f"objdump -d -w --no-show-raw-insn {shlex.quote(str(library))} | grep -E '(cpuid|xgetbv)[[:space:]]*$'"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False).stdout
    table = subprocess.run(["readelf", "-S", "-W", library], capture_output=True, text=True, check=True).stdout
    sections = [
        [int(number, 16) for number in section]
        for section in re.findall(r"PROGBITS\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", table)
    ]
    places = []
    for line in found.splitlines():
        address, instruction = int(line.split(":")[0], 16), line.split()[-1]
        start, offset, _ = next(s for s in sections if s[0] <= address < s[0] + s[2])
        places.append((address - start + offset, ENCODED[instruction]))
    return places


def patched(library: Path) -> Path:
    """A copy that asks the emulator; made once for each content. Raises ValueError if the library asks nothing, or if other
    bytes stand where the disassembler saw an instruction."""
    with library.open("rb") as stream:
        copy = BUILD / f"{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}-{library.name}"
    if copy.exists():
        return copy
    if not (places := asks(library)):
        raise ValueError(f"{library}: no CPUID")
    content = bytearray(library.read_bytes())
    for offset, instruction in places:
        if content[offset : offset + len(instruction)] != instruction:
            raise ValueError(f"{library}: no instruction at {offset:#x}")
        content[offset : offset + 1] = NO_INSTRUCTION
    partial = copy.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.rename(copy)
    return copy


def cpuinfo() -> Path:
    """/proc/cpuinfo as it is on that processor."""
    said = {
        "vendor_id": "GenuineIntel",
        "cpu family": "6",
        "model": "143",
        "stepping": "8",
        "model name": "AMX emulated",
    }
    lines = []
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        value = said.get(key.strip(), value.strip() + (f" {CPU_FLAGS}" if key.strip() == "flags" else ""))
        lines.append(f"{key}: {value}" if key.strip() else "")
    path = BUILD / "cpuinfo"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(command: list[str]) -> None:
    """Does not return: becomes the command."""
    emulator = built()
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        sys.exit("python -m tests.amx: this processor has AMX; run the command without it")
    mounts = [(cpuinfo(), Path("/proc/cpuinfo"))]
    for environment, names in LIBRARIES.items():
        packages = next((ROOT / environment).glob("lib/python3*/site-packages"))
        mounts += [(patched(packages / name), packages / name) for name in names]
    script = "".join(f"mount --bind {shlex.quote(str(a))} {shlex.quote(str(b))} && " for a, b in mounts)
    os.environ["LD_PRELOAD"] = str(emulator)
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script + 'exec "$@"', "sh", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
