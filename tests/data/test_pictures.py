"""Images of every mode are read as they look, class folders as they are meant; or both refused."""

from __future__ import annotations

import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from rankfold.data.sources import read_image_folder, source_kind
from rankfold.data.sources.pictures import read_picture
from rankfold.errors import InputError

GREY = np.linspace(0, 1, 48).reshape(6, 8)  # shares of white, all different
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def _saved(image: Image.Image, kind: str, **more: Any) -> BytesIO:
    written = BytesIO()
    image.save(written, kind, **more)
    written.seek(0)
    return written


def _read(image: Image.Image, kind: str, **more: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_picture(_saved(image, kind, **more), "the image")
    assert found.mode == "RGB"
    return np.asarray(found)


def _grey(values: np.ndarray) -> np.ndarray:
    """As RGB, 8 bits."""
    return np.repeat(np.rint(values * 255).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("most", [1, 255, 256, 4095])
@pytest.mark.parametrize(
    ("kind", "held"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)]
)
def test_wide_values_that_would_be_almost_black_are_refused(
    most: int, kind: str, held: type
) -> None:
    image = Image.fromarray(np.rint(GREY * most).astype(held))
    with pytest.raises(InputError, match=rf"values of at most {most} .*, and white is 65535"):
        _read(image, kind)


@pytest.mark.parametrize("most", [0, 4096])
def test_black_pictures_and_dark_ones_are_read(most: int) -> None:
    image = Image.fromarray(np.rint(GREY * most).astype(np.uint16))
    assert _read(image, "PNG").max() == round(most / 65535 * 255)


@pytest.mark.parametrize(
    ("make", "kind", "wanted"),
    [
        (lambda: Image.fromarray((GREY * 65535).astype(np.uint16)), "PNG", GREY),
        (lambda: Image.fromarray((GREY * 65535).astype(np.uint16)), "TIFF", GREY),
        (lambda: Image.fromarray((GREY * 65535).astype(np.int32)), "TIFF", GREY),
        (lambda: Image.fromarray((GREY * 65535).astype(np.uint16)), "PPM", GREY),
        (lambda: Image.fromarray(GREY.astype(np.float32)), "TIFF", GREY),
        (lambda: Image.fromarray(np.rint(GREY * 255).astype(np.uint8)), "PNG", GREY),
        (lambda: Image.fromarray(GREY > 0.5), "PNG", GREY > 0.5),
        (lambda: Image.fromarray(GREY > 0.5), "TIFF", GREY > 0.5),
    ],
)
def test_grey_of_every_width_is_as_bright(
    make: Callable[[], Image.Image], kind: str, wanted: np.ndarray
) -> None:
    difference = _read(make(), kind).astype(int) - _grey(np.asarray(wanted, dtype=float))
    assert np.abs(difference).max() <= 1


def test_colours_of_every_mode_are_those_of_pillow() -> None:
    image = Image.fromarray(COLOURS)
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"),
                       ("RGB", "BMP"), ("RGB", "WEBP"), ("CMYK", "JPEG"), ("LA", "PNG"),
                       ("P", "GIF"), ("P", "PNG"), ("RGB", "PPM"), ("LAB", "TIFF")):  # fmt: skip
        more = {"lossless": True} if kind == "WEBP" else {}
        if mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            changed = ImageCms.profileToProfile(
                image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
            )
            assert isinstance(changed, Image.Image)
            assert np.abs(_read(changed, kind).astype(int) - COLOURS).mean() < 3, mode
            continue
        held = Image.open(_saved(image.convert(mode), kind, **more))
        found = _read(image.convert(mode), kind, **more)
        assert np.array_equal(found, np.asarray(held.convert("RGBA" if mode == "P" else mode)
                              .convert("RGB"))), (mode, kind)  # fmt: skip


@pytest.mark.parametrize("transparency", [0, b"\x00\x80" + b"\xff" * 254])
def test_what_is_transparent_lies_on_white(transparency: int | bytes) -> None:
    palette = Image.fromarray(COLOURS).quantize(16)
    hidden = np.asarray(palette) == 0
    for kind in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
        found = _read(palette, kind, transparency=transparency)
        assert (found[hidden] == 255).all()
        kept = np.asarray(palette) > 1
        assert np.array_equal(found[kept], np.asarray(palette.convert("RGB"))[kept])
    clear = Image.fromarray(COLOURS)
    clear.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    for image, kind in ((clear, "PNG"), (clear, "TIFF"), (clear.convert("LA"), "PNG")):
        found, shown = _read(image, kind), np.asarray(image.convert("RGB"))
        assert (found[hidden] == 255).all() and np.array_equal(found[~hidden], shown[~hidden])
    wide = _read(clear, "PNG", icc_profile=_display_p3())
    assert (wide[hidden] == 255).all() and (wide[~hidden] != COLOURS[~hidden]).any()
    grey = Image.fromarray((GREY * 65535).astype(np.uint16))
    found = _read(grey, "PNG", transparency=int(GREY[3, 2] * 65535))
    assert (found[3, 2] == 255).all() and (found[3, 3] < 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOURS)
    found = _read(image, "PNG", exif=exif)
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(
        Image.open(_saved(image, "PNG", exif=exif)))))  # fmt: skip
    turned = orientation >= 5
    assert found.shape == ((8, 6, 3) if turned else (6, 8, 3))
    assert (orientation == 1) == np.array_equal(found, COLOURS)
    grey = Image.fromarray((GREY * 65535).astype(np.uint16))
    assert _read(grey, "PNG", exif=exif).shape == found.shape


def _display_p3() -> bytes:
    """An sRGB profile with the primaries of P3 (D50), as phones write them."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {b"rXYZ": (0.51512, 0.2412, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
                 b"bXYZ": (0.1571, 0.06657, 0.78407)}  # fmt: skip
    for name, xyz in primaries.items():
        entry = profile.index(name)
        offset = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
        for place, value in enumerate(xyz):
            raw = round(value * 65536).to_bytes(4, "big", signed=True)
            profile[offset + 4 * place : offset + 4 * place + 4] = raw
    return bytes(profile)


def test_colours_are_brought_to_srgb() -> None:
    image = Image.fromarray(COLOURS)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(_read(image, "PNG", icc_profile=srgb), COLOURS)
    wide = _display_p3()
    found = _read(image, "PNG", icc_profile=wide)
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(BytesIO(wide)), ImageCms.createProfile("sRGB")
    )
    assert np.array_equal(found, np.asarray(expected))
    assert np.abs(found.astype(int) - COLOURS).max() > 20
    red = Image.new("RGB", (2, 2), (200, 60, 60))
    assert _read(red, "PNG", icc_profile=wide)[0, 0, 0] > 205  # a P3 red is a stronger sRGB red
    # A profile of colours beside a grey or palette image.
    for mode in ("L", "P"):
        assert np.array_equal(
            _read(image.convert(mode), "PNG", icc_profile=srgb),
            np.asarray(image.convert(mode).convert("RGB")),
        )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: _saved(Image.new("RGB", (2, 2)), "PNG", icc_profile=b"no profile"), "profile of"),
        (lambda: _saved(Image.new("CMYK", (2, 2)), "JPEG", icc_profile=_display_p3()), "of RGB"),
        (lambda: _saved(Image.fromarray(GREY.astype(np.float32) * 255), "TIFF"), "0 to 255 .F."),
        (lambda: _saved(Image.fromarray(GREY.astype(np.float32) - 0.5), "TIFF"), "-0.5 to 0.5"),
        (lambda: _saved(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "nan"),
        (lambda: _saved(Image.fromarray((GREY * 9e5).astype(np.int32)), "TIFF"), "to 900000 .I."),
        (lambda: _animated("GIF"), "holds 3 pictures; expected one"),
        (lambda: _animated("PNG"), "holds 3 pictures"),
        (lambda: _animated("WEBP"), "holds 3 pictures"),
        (lambda: _animated("TIFF"), "holds 3 pictures"),
        (lambda: BytesIO(b"no image"), "can't be read"),
        (lambda: BytesIO(), "can't be read"),
    ],
)
def test_what_nothing_says_the_look_of_is_refused(
    write: Callable[[], BytesIO], message: str
) -> None:
    with pytest.raises(InputError, match=f"the image.*{message}|{message} the image"):
        read_picture(write(), "the image")


def _animated(kind: str) -> BytesIO:
    frames = [Image.new("RGB", (8, 8), (90 * n, 0, 0)) for n in range(3)]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:])


def test_the_second_picture_of_a_photo_is_not_another(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (90 * n, 0, 0)) for n in range(2)]
    file = _saved(frames[1], "MPO", save_all=True, append_images=frames[:1])
    assert np.abs(np.asarray(read_picture(file, "x")).astype(int) - [90, 0, 0]).max() <= 3


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"]),
    cut=st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_read_or_refused(
    kind: str, cut: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(_saved(Image.fromarray(COLOURS), kind).getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_picture(BytesIO(bytes(content[: len(content) - cut % 9])), "the image")
        except InputError as error:
            assert "the image" in str(error)
        else:
            assert found.mode == "RGB"


def _folder(folder: Path, names: list[str], count: int = 2) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for place in range(count):
            Image.new("RGB", (6, 6), (place, 0, 0)).save(folder / name / f"{place}.png")
    return folder


def _classes(folder: Path, known: dict[str, int] | None = None) -> dict[str, int]:
    found = read_image_folder(folder, size=4, label_ids=known)
    told = {c.value: c.number for c in found.account.classes}
    held = {unicodedata.normalize("NFC", f.parent.name): label for f, label in found.files}
    assert held == told
    assert found.account.given == found.account.used + sum(
        map(len, found.account.left_out.values())
    )
    return told


NAMES = ["Ångström", "café", "ﬁne", "ô", "zoo"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_in_any_normal_form_are_the_same_classes(form: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, [unicodedata.normalize(form, name) for name in NAMES])
    assert _classes(folder) == {name: place for place, name in enumerate(sorted(NAMES))}
    known = {unicodedata.normalize("NFD", name): 4 - n for n, name in enumerate(NAMES)}
    assert _classes(folder, known) == {name: 4 - n for n, name in enumerate(NAMES)}
    (folder / unicodedata.normalize("NFD" if form == "NFC" else "NFC", "café")).mkdir()
    with pytest.raises(InputError, match="two class folders called"):
        _classes(folder)


def test_what_systems_leave_is_no_data(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["cat", "dog"])
    for name in ("__MACOSX/cat", "@eaDir", ".ipynb_checkpoints", "cat/.ipynb_checkpoints",
                 "cat/@eaDir/0.png", "$RECYCLE.BIN"):  # fmt: skip
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (6, 6)).save(folder / name / "0.png")
    for name in (".DS_Store", "cat/._0.png", "dog/Thumbs.db", "dog/desktop.ini"):
        (folder / name).write_bytes(b"no image")
    (folder / "README.md").write_text("about")
    (folder / "dog" / "notes.txt").write_text("about")
    (folder / "loose.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    (folder / "cat" / "odd.png").mkdir()
    found = read_image_folder(folder, size=4)
    assert _classes(folder) == {"cat": 0, "dog": 1} and len(found) == 4
    assert found.account.left_out == {
        "no image by its suffix": ["README.md", "dog/notes.txt"],
        "not in a class folder": ["loose.png"],
    }
    assert "10 hidden or system files and folders are no data" in found.account.notes[0]
    assert source_kind(str(folder)) == "images"
    assert all(found[place][0].shape == (3, 4, 4) for place in range(4))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    _folder(tmp_path / "all", ["cat", "dog"])
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("cat", "dog"):
        (folder / name).symlink_to(tmp_path / "all" / name)
    (folder / "cat" / "round").symlink_to(folder)
    found = read_image_folder(folder, size=4)
    assert [(f.parent.name, label) for f, label in found.files] == [
        ("cat", 0), ("cat", 0), ("dog", 1), ("dog", 1),
    ]  # fmt: skip


LABELS = {f"LABEL_{n}": n for n in range(5)}


@pytest.mark.parametrize(
    ("names", "known", "wanted"),
    [
        (["0", "1", "2"], None, [0, 1, 2]),
        (["1", "2", "3"], None, [0, 1, 2]),
        (["1", "2", "3", "4", "5"], LABELS, [0, 1, 2, 3, 4]),
        (["1", "3"], LABELS, [1, 3]),
        (["1", "3"], {"1": 1, "3": 0}, [1, 0]),
        ([f"{n:02}" for n in range(12)], None, list(range(12))),
        (["a", "b"], {"LABEL_0": 0, "LABEL_1": 1}, [0, 1]),
        (["Cat", "DOG"], {"dog": 0, "cat": 1}, [1, 0]),
    ],
)
def test_which_class_a_folder_of_a_number_is(
    names: list[str], known: Any, wanted: list[int], tmp_path: Path
) -> None:
    assert list(_classes(_folder(tmp_path, names, 1), known).values()) == wanted


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        ([str(n) for n in range(12)], None, "'10' is class 2 by its place.*00, 01"),
        ([str(n) for n in range(1, 12)], None, "stand in another order"),
        (["cat", "dog"], LABELS, "2 class folders .cat, dog.*none of them a label.* 5 classes"),
        (["1", "7"], LABELS, "none of them a label"),
        (["0", "cat"], {"cat": 0, "dog": 1}, "0 in .* are no labels"),
    ],
)
def test_folders_that_may_mean_two_classes_are_refused(
    names: list[str], known: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        _classes(_folder(tmp_path, names, 1), known)


def wide_png(values: np.ndarray) -> BytesIO:
    """A PNG of (h, w, channels) values of 16 bits, which Pillow itself doesn't write."""
    height, width, channels = values.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_read_or_refused_by_their_values(channels: int) -> None:
    shares = np.linspace(0, 1, 5 * 7 * channels).reshape(5, 7, channels)
    if channels != 3:
        shares[..., -1] = 1  # opaque
        shares[0, 0] = 1
    for most in (65535, 4095, 255):
        file = wide_png(np.rint(shares * most).astype(np.uint16))
        if most == 65535:
            found = np.asarray(read_picture(file, "it")) / 255
            wanted = shares[..., : 3 if channels > 2 else 1]
            assert np.abs(found - wanted).max() <= 1.01 / 255
        else:
            with pytest.raises(InputError, match=rf"it holds values of at most {most} \("):
                read_picture(file, "it")
    black = np.zeros((2, 2, channels), np.uint16)
    if channels != 3:
        black[..., -1] = 65535
    assert np.asarray(read_picture(wide_png(black), "it")).max() == 0


def test_colours_of_16_bits_of_other_formats_are_read() -> None:
    """Pillow reads PPM of 16 bits a channel itself, scaled by its own header."""
    values = (np.arange(18).reshape(2, 3, 3) * 3600).astype(">u2")
    file = BytesIO(b"P6 3 2 65535\n" + values.tobytes())
    found = np.asarray(read_picture(file, "it")) / 255
    assert np.abs(found - values / 65535).max() <= 1.01 / 255
