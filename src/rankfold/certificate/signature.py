"""``certificate.sig.json``: who made a folder, which a digest can't say.

Whoever edits a certificate can make its digest anew, but nobody without the private key can make
the signature. It is Ed25519 over the names, sizes and SHA-256 digests of all files of the folder,
so that a file that is edited, exchanged, removed or added is found.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rankfold.certificate.document import JSON_FILE
from rankfold.certificate.schema import SignatureFields
from rankfold.errors import InputError, listed, require, visible
from rankfold.files.checked import check
from rankfold.files.digests import digest_of_bytes, stream_digest
from rankfold.files.durable import write_whole
from rankfold.files.json_file import read_json
from rankfold.files.listed import SIGNATURE_FILE, file_names
from rankfold.files.own_files import check_own_files

FORMAT_VERSION = 1
ALGORITHM = "Ed25519"
PASSWORD = "RANKFOLD_KEY_PASSWORD"  # the variable of the environment with a private key's password
MODE = 0o644  # of the signature

_DOMAIN = b"rankfold signature of a folder\n"  # so that no other text of the key's owner is one
_LONGEST = 100_000  # bytes of a file of a key; an Ed25519 key has some 120
_MAKE = "openssl genpkey -algorithm ed25519 -out KEY.pem"
_PUBLIC = "openssl pkey -in KEY.pem -pubout -out PUBLIC.pem"

State: TypeAlias = Literal["signed", "not signed", "by another key", "altered"]


@dataclass(frozen=True)
class SigningKey:
    """A private key that was opened.

    Attributes:
        id: SHA-256 of the public key.
    """

    id: str
    _key: Any

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, 64 bytes; of one message always the same."""
        found: bytes = self._key.sign(message)
        return found


@dataclass(frozen=True)
class Signature:
    """What became of a signature.

    Attributes:
        state: ``signed``, ``not signed``, ``by another key`` or ``altered``.
        detail: What is wrong, or whose signature it is.
        key: SHA-256 of the public key that the folder names, None where it has none.
    """

    state: State
    detail: str
    key: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the owner of the key has signed the folder as it is."""
        return self.state == "signed"


def open_key(file: str | Path) -> SigningKey:
    """Open a private key, so that what is wrong with it is found before any work is done.

    Args:
        file: PEM, such as ``openssl genpkey -algorithm ed25519`` writes; its password, where it
            has one, is in ``RANKFOLD_KEY_PASSWORD``.

    Raises:
        InputError: It can't be read, is no private Ed25519 key, or its password is another.
    """
    serialization = _serialization()
    content, password = _content(Path(file)), os.environ.get(PASSWORD)
    named = f"the key {visible(file)}"
    if b"PUBLIC KEY" in content:
        raise InputError(f"{named} is a public one; expected the private one that belongs to it.")
    locked = b"ENCRYPTED" in content
    if locked and not password:
        raise InputError(f"{named} has a password; put it in the variable {PASSWORD}.")
    given = password.encode("utf-8", "surrogateescape") if password and locked else None
    try:
        key = serialization.load_pem_private_key(content, given)
    except Exception as error:  # of several libraries below cryptography
        reason = f"its password is not the one in {PASSWORD}, or it is damaged"
        raise InputError(
            f"{named} can't be opened: {reason if locked else _not_pem()}. Make one: {_MAKE}"
        ) from error
    if type(key).__name__.lstrip("_") != "Ed25519PrivateKey":
        raise _other_kind(named, key)
    return SigningKey(_id(key.public_key()), key)


def sign(folder: Path, key: str | Path | SigningKey) -> Path:
    """Sign all files of a folder, in place of an earlier signature.

    Args:
        folder: An artifact, or another folder with a certificate.
        key: A file of a private key, or one that ``open_key`` has opened.

    Returns:
        The file that was written, ``certificate.sig.json``.

    Raises:
        InputError: The key can't be used, the folder has no certificate, holds what is no file of
            its own, or can't be written.
    """
    opened = key if isinstance(key, SigningKey) else open_key(key)
    if not (folder / JSON_FILE).is_file():
        raise InputError(f"{folder} has no {JSON_FILE}; expected a folder with a certificate.")
    signed = {
        "format_version": FORMAT_VERSION,
        "algorithm": ALGORITHM,
        "key": opened.id,
        "files": _files(folder),
    }
    made = base64.b64encode(opened.sign(_message(signed))).decode()
    text = json.dumps({**signed, "signature": made}, indent=1) + "\n"
    file = folder / SIGNATURE_FILE
    try:
        write_whole(file, [text.encode()], MODE)
    except OSError as error:
        raise InputError(f"{file} can't be written: {error}. The folder is not signed.") from error
    return file


def checked_signature(folder: Path, key: str | Path) -> Signature:
    """Whether a folder is as the owner of a key has signed it.

    Args:
        folder: The folder.
        key: A file of a public key, PEM.

    Raises:
        InputError: The key can't be used, or the folder holds what is no file of its own.
    """
    public = _public_key(Path(key))
    if not is_signed(folder):
        return Signature("not signed", f"there is no {SIGNATURE_FILE}")
    try:
        stated = read_json(folder / SIGNATURE_FILE)
        check(stated, SignatureFields, folder / SIGNATURE_FILE)
        made = base64.b64decode(stated["signature"], validate=True)
    except ValueError as error:  # also InputError
        return Signature("altered", f"{SIGNATURE_FILE} is damaged: {visible(error)}")
    found, own = str(stated["key"]), _id(public)
    if stated["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{folder / SIGNATURE_FILE} has format_version {stated['format_version']}; this "
            f"rankfold reads up to {FORMAT_VERSION}. Install a newer rankfold."
        )
    if found != own:
        told = f"the key that signed is {found[:16]}..., the one given is {own[:16]}..."
        return Signature("by another key", told, found)
    if not _is_made_by(public, made, {k: v for k, v in stated.items() if k != "signature"}):
        return Signature("altered", f"{SIGNATURE_FILE} is not what was signed", found)
    if problems := _altered(stated["files"], _files(folder, stated["files"])):
        return Signature("altered", listed(problems).replace("\n  ", "; "), found)
    return Signature("signed", f"by the key {own[:16]}..., {len(stated['files'])} files", found)


def is_signed(folder: Path) -> bool:
    """Whether a folder has a signature, of whomever."""
    return os.path.lexists(folder / SIGNATURE_FILE)


def _serialization() -> Any:
    return require("cryptography.hazmat.primitives.serialization", "sign")


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():  # a pipe or device would never end
            raise InputError(f"the key {visible(file)} can't be read: there is no such file.")
        with file.open("rb") as opened:
            content = opened.read(_LONGEST + 1)
    except OSError as error:
        raise InputError(f"the key {visible(file)} can't be read: {error}") from error
    if len(content) > _LONGEST:
        raise InputError(f"the key {visible(file)} is longer than {_LONGEST} bytes: it is no key.")
    return content


def _public_key(file: Path) -> Any:
    serialization, content = _serialization(), _content(file)
    named = f"the key {visible(file)}"
    if b"PRIVATE KEY" in content:
        raise InputError(
            f"{named} is a private one; expected the public one that belongs to it: {_PUBLIC}"
        )
    try:
        key = serialization.load_pem_public_key(content)
    except Exception as error:  # of several libraries below cryptography
        raise InputError(f"{named} can't be opened: {_not_pem()}. Make one: {_PUBLIC}") from error
    if type(key).__name__.lstrip("_") != "Ed25519PublicKey":
        raise _other_kind(named, key)
    return key


def _not_pem() -> str:
    return "it is damaged, or no PEM file of an Ed25519 key"


def _other_kind(named: str, key: object) -> InputError:
    kind = type(key).__name__.lstrip("_")
    return InputError(f"{named} is of the kind {kind}; expected an Ed25519 key. Make one: {_MAKE}")


def _id(public: Any) -> str:
    return digest_of_bytes(public.public_bytes_raw())


def _is_made_by(public: Any, made: bytes, signed: Mapping[str, Any]) -> bool:
    refused = require("cryptography.exceptions", "sign").InvalidSignature
    try:
        public.verify(made, _message(signed))
    except (refused, ValueError):  # the second where numbers or texts can't be written
        return False
    return True


def _message(signed: Mapping[str, Any]) -> bytes:
    """What is signed: JSON with sorted names, without spaces, in ASCII."""
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _DOMAIN + text.encode()


def _files(folder: Path, stated: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each file of a folder but its signature, by its name.

    What is stated is looked for: a file of another size is not read, as it may be of any.
    """
    check_own_files(folder)
    found: dict[str, dict[str, Any]] = {}
    for name in file_names(folder):
        if name == SIGNATURE_FILE:
            continue
        file = folder / name
        try:
            size = file.stat().st_size
            other = stated is not None and stated.get(name, {}).get("bytes") != size
            found[name] = {"bytes": size, "sha256": None if other else stream_digest(file)}
        except OSError as error:
            raise InputError(f"{file} can't be read: {error}") from error
    return found


def _altered(stated: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{visible(name)} "
        + (
            "is missing" if name not in found
            else "was not there when it was signed" if name not in stated
            else "holds other bytes than were signed"
        )
        for name in sorted({*stated, *found})
        if stated.get(name) != found.get(name)
    ]  # fmt: skip
