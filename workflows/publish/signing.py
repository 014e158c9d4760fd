"""Signs an output with a local key, as OpenSSF model signing does it; `verify.signature` verifies."""

from __future__ import annotations

from pathlib import Path

from calibration.checkpoint.files import read_bytes, write_safely
from recipes.errors import RecipeError, SourceError
from verify.signature import SIGNATURE_NAME, curve_problem, hashing, model_signing


def sign(directory: Path, private_key: Path) -> Path:
    """Signs every file of a checkpoint with the PEM file `private_key` (an elliptic curve of NIST, not encrypted) and writes
    model.sig. Raises RecipeError if the key cannot be used, EnvironmentProblem if model-signing is not installed or the signature
    cannot be written."""
    require_private_key(private_key)
    path = directory / SIGNATURE_NAME
    signer = model_signing("signing").Config().use_elliptic_key_signer(private_key=private_key)
    signer.set_hashing_config(hashing())
    write_safely(path, lambda partial: signer.sign(directory, partial), 1 << 20)
    return path


def require_private_key(path: Path) -> None:
    """Raises RecipeError if a file holds no private key that model signing can use."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_bytes(path, max_bytes=1 << 20), None)
    except SourceError as error:
        raise RecipeError(f"--sign: {error}") from None
    except TypeError:
        raise RecipeError(
            f"--sign: {path}: is encrypted; sign with `model_signing sign key --password`, which asks for it"
        ) from None
    except Exception as error:  # cryptography raises ValueError and its own types
        raise RecipeError(f"--sign: {path}: is no private key in PEM form ({error}); name yours") from None
    if problem := curve_problem(getattr(key, "curve", None)):
        raise RecipeError(f"--sign: {path}: {problem}")
