"""A signature: whose folder it is, and that nothing in it was changed since."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import rankfold
from rankfold.certificate.document import JSON_FILE
from rankfold.certificate.signature import PASSWORD, checked_signature, open_key, sign
from rankfold.errors import InputError
from rankfold.files.listed import SIGNATURE_FILE, unlisted
from rankfold.verify import verify
from tests.small_models import SmallCNN, image_data, trained_cnn

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
NO_PASSWORD = serialization.NoEncryption()


def write_keys(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, PKCS8, NO_PASSWORD))
    public.write_bytes(key.public_key().public_bytes(PEM, SPKI))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder, "own", 1)
    write_keys(folder, "other", 2)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / JSON_FILE).write_text('{"a": 1}')
    (made / "rankfold.json").write_text('{"files": ["certificate.json", "inner/t.json", "w"]}')
    (made / "inner" / "t.json").write_text("{}")
    (made / "w").write_bytes(bytes(3_000_000))
    return made


def test_it_is_signed_and_of_the_same_bytes_again(folder: Path, keys: Path) -> None:
    file = sign(folder, keys / "own.pem")
    first = file.read_bytes()
    assert file == folder / SIGNATURE_FILE
    assert checked_signature(folder, keys / "own.pub.pem").state == "signed"
    assert sign(folder, open_key(keys / "own.pem")).read_bytes() == first  # in place of the first
    assert unlisted(folder) == []  # --overwrite may take it
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []
    found = checked_signature(folder, keys / "other.pub.pem")
    assert found.state == "by another key"
    assert found.key == json.loads(first)["key"]


def test_without_one_it_is_not_signed(folder: Path, keys: Path) -> None:
    assert checked_signature(folder, keys / "own.pub.pem").state == "not signed"


def _edit_signature(folder: Path, edit: Callable[[dict], object]) -> None:
    file = folder / SIGNATURE_FILE
    said = json.loads(file.read_text())
    edit(said)
    file.write_text(json.dumps(said))


def _of_w(said: dict) -> dict:
    return said["files"]["w"]


ALTERED: dict[str, Callable[[Path], object]] = {
    "a byte": lambda f: (f / "w").write_bytes(bytes(2_999_999) + b"\1"),
    "a byte less": lambda f: (f / "w").write_bytes(bytes(2_999_999)),
    "four terabytes": lambda f: os.truncate(f / JSON_FILE, 1 << 42),
    "a file less": lambda f: (f / "inner" / "t.json").unlink(),
    "a file more": lambda f: (f / "adapter_config.json").write_text("{}"),
    "two files exchanged": lambda f: (
        (f / "w").rename(f / "x"), (f / JSON_FILE).rename(f / "w"), (f / "x").rename(f / JSON_FILE)
    ),
    "a page added": lambda f: (f / "report.html").write_text("better"),
    "a digest in it": lambda f: _edit_signature(f, lambda d: _of_w(d).update(sha256="0" * 64)),
    "a size in it": lambda f: _edit_signature(f, lambda d: _of_w(d).update(bytes=7)),
    "a file taken out of it": lambda f: (
        (f / "w").unlink(), _edit_signature(f, lambda d: d["files"].pop("w"))
    ),
    "a field more": lambda f: _edit_signature(f, lambda d: d.update(more=1)),
    "a field less": lambda f: _edit_signature(f, lambda d: d.pop("algorithm")),
    "another algorithm": lambda f: _edit_signature(f, lambda d: d.update(algorithm="none")),
    "an empty signature": lambda f: _edit_signature(f, lambda d: d.update(signature="")),
    "another signature": lambda f: _edit_signature(
        f, lambda d: d.update(signature="A" * 86 + "==")
    ),
    "no JSON": lambda f: (f / SIGNATURE_FILE).write_bytes(b"\xff{"),
    "an empty file": lambda f: (f / SIGNATURE_FILE).write_bytes(b""),
    "nested": lambda f: (f / SIGNATURE_FILE).write_text("[" * 3000 + "]" * 3000),
}  # fmt: skip


@pytest.mark.parametrize("what", ALTERED)
def test_what_is_altered_is_found(what: str, folder: Path, keys: Path) -> None:
    sign(folder, keys / "own.pem")
    ALTERED[what](folder)
    found = checked_signature(folder, keys / "own.pub.pem")
    assert (found.state, found.holds) == ("altered", False)
    assert found.detail


def test_a_signature_of_another_key_under_the_own_name_is_found(folder: Path, keys: Path) -> None:
    sign(folder, keys / "other.pem")
    own = open_key(keys / "own.pem").id
    _edit_signature(folder, lambda d: d.update(key=own))
    assert checked_signature(folder, keys / "own.pub.pem").state == "altered"


def test_a_signature_of_another_folder_is_none_of_this(
    folder: Path, keys: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / JSON_FILE).write_text('{"a": 2}')
    shutil.copy(sign(other, keys / "own.pem"), folder)
    found = checked_signature(folder, keys / "own.pub.pem")
    assert (found.state, found.detail) == (
        "altered", "certificate.json holds other bytes than were signed"
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_keys_of_openssl_are_taken_with_a_password_or_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", "k.pem")
    openssl("pkey", "-in", "k.pem", "-pubout", "-out", "p.pem")
    openssl("pkey", "-in", "k.pem", "-aes256", "-passout", "pass:s3cret", "-out", "locked.pem")
    sign(folder, tmp_path / "k.pem")
    assert checked_signature(folder, tmp_path / "p.pem").holds
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(InputError, match=f"has a password; put it in the variable {PASSWORD}"):
        open_key(tmp_path / "locked.pem")
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(InputError, match="its password is not the one in"):
        open_key(tmp_path / "locked.pem")
    monkeypatch.setenv(PASSWORD, "s3cret")
    assert open_key(tmp_path / "locked.pem").id == open_key(tmp_path / "k.pem").id
    assert "s3cret" not in repr(open_key(tmp_path / "locked.pem"))


@pytest.fixture(scope="module")
def bad_keys(keys: Path) -> Path:
    for name, key in (
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("curve", ec.generate_private_key(ec.SECP256R1())),
    ):
        (keys / f"{name}.pem").write_bytes(key.private_bytes(PEM, PKCS8, NO_PASSWORD))
        (keys / f"{name}.pub.pem").write_bytes(key.public_key().public_bytes(PEM, SPKI))
    for name in ("cut.pem", "cut.pub.pem"):
        whole = (keys / name.replace("cut", "own")).read_bytes()
        (keys / name).write_bytes(whole[:70] + whole[75:])
    (keys / "empty.pem").write_bytes(b"")
    (keys / "long.pem").write_bytes(b"x" * 200_000)
    (keys / "folder.pem").mkdir()
    os.mkfifo(keys / "pipe.pem")
    return keys


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.pem", "there is no such file"),
        ("folder.pem", "there is no such file"),
        ("pipe.pem", "there is no such file"),
        ("empty.pem", "damaged, or no PEM"),
        ("long.pem", "longer than 100000 bytes"),
        ("cut.pem", "damaged, or no PEM"),
        ("rsa.pem", "RSAPrivateKey; expected an Ed25519 key"),
        ("curve.pem", "expected an Ed25519 key"),
        ("own.pub.pem", "is a public one; expected the private one"),
    ],
)
def test_a_bad_key_is_named_before_anything_is_written(
    name: str, told: str, bad_keys: Path, folder: Path
) -> None:
    with pytest.raises(InputError, match=told) as error:
        sign(folder, bad_keys / name)
    assert name in str(error.value)
    assert not (folder / SIGNATURE_FILE).exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.pem", "there is no such file"),
        ("empty.pem", "damaged, or no PEM"),
        ("cut.pub.pem", "damaged, or no PEM"),
        ("rsa.pub.pem", "RSAPublicKey; expected an Ed25519 key"),
        ("own.pem", "is a private one; expected the public one"),
    ],
)
def test_a_bad_public_key_is_named(name: str, told: str, bad_keys: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=told):
        checked_signature(folder, bad_keys / name)


def test_only_a_folder_with_a_certificate_is_signed(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no certificate\.json"):
        sign(tmp_path, keys / "own.pem")


def test_links_are_refused_and_nothing_outside_is_read(folder: Path, keys: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="no file of its own"):
        sign(folder, keys / "own.pem")


def test_a_newer_signature_asks_for_a_newer_rankfold(folder: Path, keys: Path) -> None:
    sign(folder, keys / "own.pem")
    _edit_signature(folder, lambda d: d.update(format_version=2))
    with pytest.raises(InputError, match="Install a newer rankfold"):
        checked_signature(folder, keys / "own.pub.pem")


def test_a_result_is_saved_signed_and_verified(keys: Path, tmp_path: Path) -> None:
    made = rankfold.lossless(trained_cnn(), image_data(40), size=0.5)
    data = image_data(40)
    plain, signed = made.save(tmp_path / "plain"), tmp_path / "signed"
    made.save(signed, sign=keys / "own.pem")
    assert {one.name for one in signed.iterdir()} == {
        SIGNATURE_FILE, *(one.name for one in plain.iterdir())
    }  # fmt: skip
    model = rankfold.load(signed, SmallCNN())

    def outcome(key: Path | None, folder: Path = signed) -> tuple[bool, str | None, str]:
        found = verify(folder, model, data.held_out, key=key)
        one = next((c for c in found.checks if c.what == "signature"), None)
        return found.holds, one and one.outcome, one.detail if one else ""

    assert outcome(None) == (True, "not checked", "give the public key of whoever signed: key=")
    assert outcome(None, plain) == (True, None, "")
    assert outcome(keys / "own.pub.pem")[:2] == (True, "agrees")
    assert outcome(keys / "own.pub.pem", plain)[1:] == (
        "differs", "not signed: there is no certificate.sig.json"
    )  # fmt: skip
    (signed / "README.md").write_bytes((signed / "README.md").read_bytes() + b"more\n")
    holds, came, detail = outcome(keys / "own.pub.pem")
    assert (holds, came) == (False, "differs")
    assert detail == "altered: README.md holds other bytes than were signed"
    made.save(signed, overwrite=True)  # the signature is rankfold's own, and goes
    assert not (signed / SIGNATURE_FILE).exists()
    with pytest.raises(InputError, match="there is no such file"):
        made.save(tmp_path / "never", sign=keys / "none.pem")
    assert not (tmp_path / "never").exists()
