"""One image file as a person sees it: upright, in sRGB, 8 bits a channel; or the reason why not."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfold.errors import InputError, require

WIDE = 65535  # white of 16 bits
NARROW = 4095  # white of 12 bits: where nothing is brighter, 65535 is hardly meant to be white
SAME_COLOUR = 3  # of 255: the largest difference of profiles that are both sRGB
# Modes of Pillow by what an ICC profile for them calls their colours.
PROFILED = {
    "GRAY": ("1", "L", "LA"),
    "RGB": ("RGB", "RGBA", "RGBX", "P", "PA", "1", "L", "LA"),
    "CMYK": ("CMYK",),
    "Lab": ("LAB",),
}
HELD = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # the mode that is changed to sRGB
# The second picture of a photo, in depth or for bright screens, is not another moment of it.
ONE_MOMENT = ("MPO",)


def read_picture(file: Path | BytesIO, what: str) -> Any:
    """An RGB image of Pillow.

    It is turned as its EXIF data say. 16 bits are scaled to 8, floats from 0..1. Colours are
    brought to sRGB where the file has a profile of others. What is transparent lies on white, as
    processors of transformers lay it.

    Args:
        file: A file, or one in memory.
        what: Names it in messages.

    Raises:
        InputError: It can't be read, has several pictures, or values of which nothing says which is
            white.
    """
    pillow: Any = require("PIL.Image", "images")
    operations: Any = require("PIL.ImageOps", "images")
    try:
        with pillow.open(file) as opened:
            count = getattr(opened, "n_frames", 1)
            if count > 1 and opened.format not in ONE_MOMENT:
                raise InputError(
                    f"{what} holds {count} pictures; expected one. Save the one that counts as a "
                    "file of its own, or remove it."
                )
            wide = _is_wide(opened)
            upright = operations.exif_transpose(opened)
            if wide:
                _refuse_dark(upright, _lower_halves(file), what)
            return _in_srgb(_eight_bits(upright, what), what)
    except InputError:
        raise
    except Exception as error:  # damaged files make Pillow fail in any way
        reason = str(error) or type(error).__name__
        raise InputError(f"{what} can't be read: {reason}. Replace or remove it.") from error


def _is_wide(opened: Any) -> bool:
    """Whether a file that isn't loaded yet has colours of 16 bits: Pillow keeps the upper 8."""
    modes = [tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in opened.tile if tile[3]]
    return any(";16" in str(mode) for mode in modes) and opened.mode[0] != "I"


# How Pillow is told to keep the lower halves of a channel's 16 bits: as if the bytes stood the
# other way round; grey and transparency as four channels, of which every second is a lower half.
_LOWER = {"B": "L", "L": "B"}
_GREY, _FOUR = "LA;16B", "RGBA"


def _lower_halves(file: Path | BytesIO) -> Any:
    """The lower 8 of 16 bits a channel, for a file of which Pillow keeps the upper ones."""
    pillow: Any = require("PIL.Image", "images")
    with pillow.open(file) as again:
        grey = any(tile[3] == _GREY for tile in again.tile)
        again.tile = [(*tile[:3], _swapped(tile[3])) for tile in again.tile]
        again.load()
        if grey:
            bands = again.split()
            return pillow.merge(_FOUR, [bands[1]] * 3 + [bands[3]])
        return again


def _swapped(mode: Any) -> Any:
    if isinstance(mode, tuple):
        return (_swapped(mode[0]), *mode[1:])
    return _FOUR if mode == _GREY else mode[:-1] + _LOWER.get(mode[-1], mode[-1])


def _refuse_dark(upper: Any, lower: Any, what: str) -> None:
    """Refuse 16 bits a channel whose values are those of 8 or 12 bits, of colour or of alpha."""
    halves = zip(upper.getextrema(), lower.getextrema(), strict=True)
    most = [(high << 8) + 255 if high else low for (_, high), (_, low) in halves]
    alpha = most.pop() if "A" in upper.getbands() else 0
    _refuse_narrow(max(most), f"colours of 16 bits ({upper.mode})", what)
    _refuse_narrow(alpha, f"transparency of 16 bits ({upper.mode})", what)


def _refuse_narrow(high: float, kind: str, what: str) -> None:
    if 0 < high <= NARROW:
        bits = 8 if high <= 255 else 12
        raise InputError(
            f"{what} holds values of at most {high:g} ({kind}), and white is {WIDE} there: it "
            f"would be almost black. Its values seem to be of {bits} bits: multiply them by "
            f"{WIDE / (2**bits - 1):.5g}, or save it with 8 bits a channel."
        )


def _eight_bits(image: Any, what: str) -> Any:
    """The image in a mode of 8 bits a channel, with what it says of its colours."""
    kind = image.mode.partition(";")[0]
    if kind not in ("I", "F"):
        return image
    pillow: Any = require("PIL.Image", "images")
    values = np.asarray(image)
    grey = _shares(values, image.mode, what) * 255  # (h, w) 0..255
    found = pillow.fromarray(np.rint(grey).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):  # the value that is transparent
        found.putalpha(pillow.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    found.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return found


def _shares(values: NDArray[Any], mode: str, what: str) -> NDArray[np.float64]:
    """Values of one wide channel as shares of white."""
    most = 1 if mode == "F" else WIDE
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= most):  # also where one is NaN
        raise InputError(
            f"{what} holds values of {low:g} to {high:g} ({mode}); expected 0 to {most}, since "
            "nothing says which is white. Save it with 8 or 16 bits a channel."
        )
    if mode != "F":
        _refuse_narrow(high, mode, what)
    return values.astype(np.float64) / most


def _in_srgb(image: Any, what: str) -> Any:
    """The image in sRGB, on white where it is transparent."""
    pillow: Any = require("PIL.Image", "images")
    if not image.has_transparency_data:
        return _coloured(image, image, what)
    whole = image.convert("RGBA")
    found = _coloured(whole.convert("RGB"), image, what)
    found.putalpha(whole.getchannel("A"))
    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, found).convert("RGB")


def _coloured(plain: Any, image: Any, what: str) -> Any:
    """An image without transparency in sRGB: by the profile of the one that it comes from."""
    profile = image.info.get("icc_profile")
    if not profile:
        return plain.convert("RGB")
    cms: Any = require("PIL.ImageCms", "images")
    try:
        space, change = _from_profile(profile)
        if image.mode not in PROFILED.get(space, ()):
            raise InputError(
                f"{what} is in {image.mode}, and its colour profile is of {space}. Save it "
                "without the profile, or with the right one."
            )
        if change is None:
            return plain.convert("RGB")
        return cms.applyTransform(plain.convert(HELD[space]), change)
    except (cms.PyCMSError, OSError) as error:
        raise InputError(
            f"the colour profile of {what} can't be read: {error}. Save it without the profile."
        ) from error


@lru_cache(maxsize=16)
def _from_profile(profile: bytes) -> tuple[str, Any]:
    """The space of a profile's colours, and what makes sRGB of them; None where they are sRGB."""
    pillow: Any = require("PIL.Image", "images")
    cms: Any = require("PIL.ImageCms", "images")
    opened = cms.ImageCmsProfile(BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in PROFILED:
        return space, None
    held = HELD[space]
    change = cms.buildTransform(opened, cms.createProfile("sRGB"), held, "RGB")
    if space not in ("GRAY", "RGB"):
        return space, change
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)  # (1, colours, 3)
    probe = pillow.fromarray(colours).convert(held)
    seen = np.asarray(cms.applyTransform(probe, change), dtype=np.int16)
    wanted = np.asarray(probe.convert("RGB"), dtype=np.int16)
    return space, None if np.abs(seen - wanted).max() <= SAME_COLOUR else change
