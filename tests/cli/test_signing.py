"""A published folder is signed and verified by the `model_signing` command line as it is, receipt and all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import _cli

import distmerge
from tests.factories import merge


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public one."""
    folder, key = tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "private.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return folder / "private.pem", folder / "public.pem"


def model_signing(*args: object) -> Any:
    return CliRunner().invoke(_cli.main, [*map(str, args)])


def test_an_output_is_signed_and_verified_as_it_is_and_a_changed_receipt_or_weight_is_found(
    base: Path, adapter: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    out = merge(base, adapter, tmp_path / "out", hash_inputs=True)
    signature = out / "model.sig"
    signed = model_signing("sign", "key", out, "--private_key", keys[0], "--signature", signature)
    assert signed.exit_code == 0, signed.output
    check = ("verify", "key", out, "--public_key", keys[1], "--signature", signature)
    assert model_signing(*check).exit_code == 0
    assert distmerge.verify(out).num_files > 0, "a signature in the folder is no stranger"
    for name in ("merge_receipt.json", min(path.name for path in out.glob("*.safetensors"))):
        path = out / name
        shutil.copy(path, tmp_path / "kept")
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        found = model_signing(*check)
        assert found.exit_code == 1
        assert "Hash mismatch" in found.output
        assert name in found.output
        shutil.copy(tmp_path / "kept", path)
    (out / "more.safetensors").write_bytes(b"")
    assert model_signing(*check).exit_code == 1, "nor may files be added"
