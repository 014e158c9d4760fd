"""AMX instructions, the processor's own or the emulator's, do what Intel's manual says, to the last bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.amx.__main__ import BUILD, asks, built, patched

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
REAL = "amx_tile" in FLAGS
PRODUCTS = Path(__file__).with_name("products.c")
pytestmark = [
    pytest.mark.skipif("avx512bw" not in FLAGS, reason="the emulator multiplies with AVX-512"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc"),
]


def compiled(program: Path, source: Path, *options: str) -> Path:
    subprocess.run(["gcc", "-O1", "-ffp-contract=off", *options, source, "-o", program, "-lm"], check=True)
    return program


def emulated(program: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ if REAL else os.environ | {"LD_PRELOAD": str(built())}
    return subprocess.run([program], env=environment, capture_output=True, text=True, check=False)


def test_tiles_are_multiplied_as_the_manual_says(tmp_path: Path) -> None:
    program = compiled(tmp_path / "products", PRODUCTS, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mfma")
    done = emulated(program)
    assert done.returncode == 0 and done.stdout == "500 tiles are equal\n", done


@pytest.mark.skipif(REAL, reason="nothing is emulated on a processor with AMX")
def test_another_illegal_instruction_still_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text('int main(void) { __asm__("ud2"); }')
    done = emulated(compiled(tmp_path / "other", tmp_path / "other.c"))
    assert done.returncode == -4 and "neither AMX, CPUID nor XGETBV at" in done.stderr and "0f 0b" in done.stderr


@pytest.mark.skipif(REAL, reason="nothing is emulated on a processor with AMX")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no binutils")
def test_a_patched_program_finds_amx(tmp_path: Path) -> None:
    (tmp_path / "asks.c").write_text("""
        #include <cpuid.h>
        #include <stdio.h>
        int main(void) {
            unsigned a, b, c, d, low, high;
            __cpuid_count(7, 0, a, b, c, d);
            __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            printf("%d %d", d >> 24 & 1, low >> 17 & 3);
            __cpuid_count(0xD, 0, a, b, c, d);
            printf(" %d", a >> 17 & 3);
        }""")
    program = compiled(tmp_path / "asks", tmp_path / "asks.c")
    assert emulated(program).stdout == "0 0 0" and len(asks(program)) == 3
    copy = patched(program)
    try:
        assert copy.parent == BUILD and emulated(copy).stdout == "1 3 3"
    finally:
        copy.unlink()
