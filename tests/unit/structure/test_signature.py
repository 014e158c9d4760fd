"""A signature is judged by the key that the caller names; whatever was changed, added or taken away after it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from recipes.errors import RecipeError
from tests.models import standard
from tests.unit.structure.keys import write_keys
from verify.__main__ import main
from verify.signature import SIGNATURE_NAME, require_public_key, signature_check
from workflows.publish.signing import sign


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A signed checkpoint and the public key."""
    place = tmp_path_factory.mktemp("signed")
    private, public = write_keys(place)
    checkpoint = standard.write(place / "checkpoint", "llama")
    sign(checkpoint, private)
    return checkpoint, public


@pytest.fixture
def copied(signed: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed[0], tmp_path / "copy"))


def judged(checkpoint: Path, key: Path | None) -> str:
    check = signature_check(checkpoint, key)
    assert check is not None and check.id == "structure.signature"
    return check.verdict


def test_what_the_named_key_signed_passes_and_without_a_key_nothing_is_proven(signed: tuple[Path, Path]) -> None:
    checkpoint, public = signed
    assert judged(checkpoint, public) == "PASS"
    assert judged(checkpoint, None) == "UNCHECKED"


@pytest.mark.parametrize(
    "tamper",
    [
        lambda copy: (copy / "config.json").write_text((copy / "config.json").read_text() + "\n"),
        lambda copy: (copy / "tokenizer_config.json").unlink(),
        lambda copy: (copy / "modeling_x.py").write_text("print()"),
        lambda copy: (copy / "folder").mkdir() or (copy / "folder" / "x").write_text("x"),
        lambda copy: (copy / SIGNATURE_NAME).unlink(),
        lambda copy: (copy / SIGNATURE_NAME).write_text("{}"),
        lambda copy: (copy / SIGNATURE_NAME).write_text("[" * 100_000),
        lambda copy: (copy / SIGNATURE_NAME).write_bytes(b"\xff\x00"),
    ],
    ids=["changed", "removed", "added", "added-below", "no-signature", "empty", "nested", "binary"],
)  # fmt: skip
def test_tampering_fails_in_a_check_and_never_in_a_traceback(
    tamper: Any, signed: tuple[Path, Path], copied: Path
) -> None:
    tamper(copied)
    assert judged(copied, signed[1]) == "FAIL"


def test_a_changed_tensor_fails_by_the_name_of_its_shard(signed: tuple[Path, Path], copied: Path) -> None:
    shard = next(copied.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    check = signature_check(copied, signed[1])
    assert check is not None and check.verdict == "FAIL" and shard.name in check.figure


def test_a_foreign_signature_fails_with_the_named_key(signed: tuple[Path, Path], copied: Path, tmp_path: Path) -> None:
    """Whoever edits a checkpoint can sign it anew, with a key of their own."""
    private, public = write_keys(tmp_path, "other")
    (copied / SIGNATURE_NAME).unlink()
    sign(copied, private)
    assert judged(copied, public) == "PASS" and judged(copied, signed[1]) == "FAIL"


def test_a_snapshot_of_the_hub_is_links_and_its_own_files_are_not_signed(
    signed: tuple[Path, Path], tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "x", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in signed[0].iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (snapshot / ".cache" / "huggingface").mkdir(parents=True)
    (snapshot / ".cache" / "huggingface" / "x.lock").write_text("")
    assert judged(snapshot, signed[1]) == "PASS"


def test_keys_that_are_none_are_refused_in_one_message(tmp_path: Path, signed: tuple[Path, Path]) -> None:
    (tmp_path / "text").write_text("no key")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa").write_bytes(
        other.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    _, koblitz = write_keys(tmp_path, "koblitz", ec.SECP256K1())
    for name, said in (("none", "No such file"), ("text", "no public key"), ("rsa", "elliptic-curve")):
        with pytest.raises(RecipeError, match=said):
            require_public_key(tmp_path / name)
    with pytest.raises(RecipeError, match="secp256k1"):
        require_public_key(koblitz)
    for name, said in (("none", "No such file"), ("text", "no private key"), ("koblitz.pem", "secp256k1")):
        with pytest.raises(RecipeError, match=said):
            sign(signed[0], tmp_path / name)


def test_the_command_line_names_the_key(signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, public = signed
    assert main([str(checkpoint), "--level", "structure", "--public-key", str(public), "--json"]) in (0, 5)
    checks = {check["id"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["structure.signature"]["verdict"] == "PASS"
    assert "signed by the key key.pub" in checks["structure.signature"]["figure"]
    assert main([str(checkpoint), "--level", "structure", "--public-key", "none.pub"]) == 2
