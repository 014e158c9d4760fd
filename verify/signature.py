"""The signature of a checkpoint: OpenSSF model signing, through the package `model-signing`.

Trust comes from the public key that the caller names, never from the checkpoint. A file that was added, removed or changed
after the signing is a FAIL.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from calibration.checkpoint.files import MissingFile, read_bytes
from recipes.errors import EnvironmentProblem, RecipeError, SourceError
from verify.checks import Check, unchecked, verdict

#: The file that holds a signature, as model-signing's own command names it.
SIGNATURE_NAME = "model.sig"
#: What a download adds to a repository, and the signature itself; the signature names them, so that nothing else is left out.
NOT_SIGNED = (SIGNATURE_NAME, ".cache", ".gitattributes")
_MOST_BYTES = 64 << 20
#: Curves of keys (model-signing 1.1, _signing/sign_ec_key.py).
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_ID, _WHAT = "structure.signature", "every file is the one that the holder of the named key signed"


def model_signing(part: str) -> ModuleType:
    """A module of model-signing. Raises EnvironmentProblem if it is not installed."""
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise EnvironmentProblem(
            f"signatures need model-signing, which cannot be imported ({error}): pip install 'nvfp4-workflows[signing]'"
        ) from None


def hashing() -> Any:
    """What is signed: sha256 of every file. A snapshot of the hub is made of links, which are followed to files."""
    config = model_signing("hashing").Config().use_file_serialization(allow_symlinks=True)
    return config.set_ignored_paths(paths=list(NOT_SIGNED)).set_allow_symlinks(True)


def signature_check(directory: Path, public_key: Path | None) -> Check | None:
    """The check of the signature in `directory` by the PEM file `public_key`; None if there is neither. Raises RecipeError if
    the key cannot be read and EnvironmentProblem if model-signing is not installed."""
    path = directory / SIGNATURE_NAME
    if public_key is None:
        named = "name the signer's public key with --public-key"
        return unchecked(_ID, _WHAT, f"{SIGNATURE_NAME} is there; {named}") if path.exists() else None
    require_public_key(public_key)
    try:
        read_bytes(path, max_bytes=_MOST_BYTES)
    except MissingFile:
        return verdict(
            _ID, _WHAT, [f"there is no {SIGNATURE_NAME}: nobody signed it, or it was taken away"], [], "files"
        )
    except SourceError as error:
        return verdict(_ID, _WHAT, error.problems, [], "files")
    problems = []
    try:
        config = model_signing("verifying").Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(hashing()).verify(directory, path)
    except EnvironmentProblem:
        raise
    except Exception as error:  # cryptography, protobuf, the JSON parser and the file system raise different types
        said = " ".join(str(error).split())[:400] or type(error).__name__
        problems = [f"{said} (key {public_key.name})"]
    return verdict(
        _ID, _WHAT, problems, [], "model-signing: sha256 of every file", f"signed by the key {public_key.name}"
    )


def require_public_key(path: Path) -> None:
    """Raises RecipeError if a file holds no public key that model signing can use."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(read_bytes(path, max_bytes=1 << 20))
    except SourceError as error:
        raise RecipeError(f"--public-key: {error}") from None
    except Exception as error:  # cryptography raises ValueError and its own types
        raise RecipeError(f"--public-key: {path}: is no public key in PEM form ({error}); name the signer's") from None
    if problem := curve_problem(getattr(key, "curve", None)):
        raise RecipeError(f"--public-key: {path}: {problem}")


def curve_problem(curve: object) -> str | None:
    """Why model signing cannot use a key of this curve (None: of no curve); None if it can."""
    name = getattr(curve, "name", None)
    if name is None:
        return "is no elliptic-curve key, which model signing needs: openssl ecparam -name prime256v1 -genkey makes one"
    return None if name in _CURVES else f"lies on {name}; model signing knows {', '.join(_CURVES)}"
