"""Calls the compiled loops of `_kernels.c` if they were built and the CPU can run them; `level()` returns the level in
use.

Levels: torch (no compiled code), portable, avx2, avx512 (C on the CPU), cuda (torch on the first GPU). All give the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import warnings
from collections.abc import Iterator
from functools import cache

import torch

LEVELS = ("portable", "avx2", "avx512")
#: Dtypes that the C float loops support, by safetensors' spelling.
FLOATS = {"F32": 0, "BF16": 1, "F16": 2}
TORCH_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "kernels_level": (_INT, ()),
    "float_amax": (ctypes.c_uint32, (_INT, _INT, _POINTER, _LONG)),
    "float_extremes": (None, (_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER)),
    "fp8_to_bf16": (None, (_INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER)),
    "mxfp4_to_bf16": (None, (_INT, _POINTER, _POINTER, _LONG, _POINTER)),
    "float_quantize": (None, (_INT, _INT, _POINTER, _LONG, _FLOAT, _POINTER, _POINTER)),
    "pack_scaled": (None, (_INT, _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER)),
    "mxfp4_maxima": (None, (_INT, _POINTER, _LONG, _POINTER)),
    "mxfp4_quantize": (None, (_INT, _POINTER, _POINTER, _LONG, _FLOAT, _POINTER, _POINTER)),
    "fp8_maxima": (None, (_INT, _POINTER, _LONG, _POINTER)),
    "fp8_amax": (_FLOAT, (_INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER)),
    "fp8_quantize": (
        None,
        (_INT, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _POINTER, _POINTER),
    ),
}
_forced: str | None = None
_device = "cuda"


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled module; None if pip built none (no compiler) or it is outdated (installed before an update)."""
    try:
        module = importlib.import_module("calibration.checkpoint._kernels")
        library = ctypes.CDLL(str(module.__file__))
        functions = {name: getattr(library, name) for name in _SIGNATURES}
    except (ImportError, OSError):
        return None
    except AttributeError as error:
        warnings.warn(
            f"{module.__file__}: built from older sources ({error}): torch replaces it, many times slower; run pip "
            "install again (make venv)",
            stacklevel=2,
        )
        return None
    for name, function in functions.items():
        function.restype, function.argtypes = _SIGNATURES[name]
    return library


@cache
def levels() -> tuple[str, ...]:
    """Every level that this machine supports, slowest first."""
    library = _library()
    compiled = LEVELS[: library.kernels_level() + 1] if library is not None else ()
    return ("torch", *compiled, *(("cuda",) if torch.cuda.is_available() else ()))


def level() -> str:
    """The level in use: the fastest, unless inside `use`."""
    return _forced or levels()[-1]


@contextlib.contextmanager
def use(name: str, device: str = "cuda") -> Iterator[None]:
    """Uses level `name` inside the `with` block, in every thread. `device` is where level cuda computes: `cpu` runs the
    same code without a GPU. Raises ValueError if the level does not run here."""
    global _forced, _device
    if name not in levels() and (name, device) != ("cuda", "cpu"):
        raise ValueError(f"level {name!r} does not run here; these do: {', '.join(levels())}")
    before, (_forced, _device) = (_forced, _device), (name, device)
    try:
        yield
    finally:
        _forced, _device = before


def device() -> str:
    """The device on which torch computes: the GPU at level cuda, otherwise the CPU."""
    return _device if level() == "cuda" else "cpu"


def accelerator() -> torch.device | None:
    """The accelerator that torch can use, without an index; None if there is none. torch's own default is the one that it was
    built for: its wheel from PyPI says `cuda` where no GPU is, or none is visible."""
    return torch.accelerator.current_accelerator(check_available=True)


def computing_device(chosen: torch.device | None = None) -> torch.device:
    """Where blocks compute: the device `chosen` by the caller, or else the accelerator, or else the CPU."""
    return chosen or accelerator() or torch.device("cpu")


def compiled() -> bool:
    """Whether the C functions may be called: they were built, and the level is not torch."""
    return _compiled_level() is not None


def call(name: str, *arguments: object) -> float:
    """Calls a C function (see `_kernels.c`) at the level in use, without the interpreter lock. Pointers are integers
    (`ndarray.ctypes.data`, `Tensor.data_ptr()`); the caller guarantees that the arrays stay alive and have the right
    size and dtype."""
    library, chosen = _library(), _compiled_level()
    assert library is not None and chosen is not None
    result: float = getattr(library, name)(LEVELS.index(chosen), *arguments)
    return result


def _compiled_level() -> str | None:
    """The C level in use; at level cuda the fastest C level, for work that stays on the CPU (checks of copied
    tensors)."""
    if level() == "cuda":
        return next((name for name in reversed(levels()) if name in LEVELS), None)
    return level() if level() in LEVELS else None
