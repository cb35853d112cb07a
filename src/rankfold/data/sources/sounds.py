"""A folder of class folders of wav files, read when they are used."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor

from rankfold.data.input_settings import InputSettings
from rankfold.data.sources.class_folders import ClassFolder, class_files, refused, without_broken
from rankfold.errors import InputError

SUFFIXES = (".wav",)
# Of (channels, samples), samples a second and what messages call it, to what the model is given.
SoundPreparation: TypeAlias = Callable[[Tensor, int, str], Any]
# What scipy raises where it says what is wrong, and where it trips over a damaged header.
SAID = (OSError, ValueError, wavfile.WavFileWarning)
DAMAGED = (struct.error, ZeroDivisionError, UnboundLocalError)


def read_wav_folder(
    folder: Path,
    *,
    prepare: SoundPreparation | None = None,
    label_ids: Mapping[str, int] | None = None,
    labels_wanted: bool = True,
    skip_broken: bool = False,
) -> ClassFolder:
    """Sounds whose class is the place of their folder's name among the sorted names.

    Every file is read once here, to compare the sample rates, and not kept. Lengths may differ.

    Args:
        folder: Holds one folder per class.
        prepare: What the model's own feature extractor makes of a sound.
        label_ids: The model's number of each label: that of the folders' names, where it has them.
        labels_wanted: Without it files that don't stand in class folders have no class.
        skip_broken: Leave out files that can't be read; ``skipped`` of the result names them. One
            of another sample rate is not broken: it is refused all the same.

    Returns:
        Pairs of ``(channels, samples)`` float32 in -1..1, or what ``prepare`` gives, and the class
        (``class_folders.labelled``).

    Raises:
        InputError: Fewer than two classes, a class without wav files, a file that can't be read or
            is empty, sample rates or numbers of channels that differ, or names of folders of which
            the model has some as labels and others not.
    """

    def read(file: Path) -> Any:
        sound, rate = _read(file)
        return sound if prepare is None else prepare(sound, rate, f"the wav file {file}")

    files = class_files(folder, SUFFIXES, "wav file", label_ids, labels_wanted=labels_wanted)
    found = without_broken(files, read) if skip_broken else ClassFolder(*files, read)
    rate, note = _refuse_mixtures([file for file, _ in found.files])
    found.account = replace(
        found.account,
        notes=[*found.account.notes, note],
        inputs=InputSettings("rankfold" if prepare is None else "processor", sample_rate=rate),
    )
    return found


def _refuse_mixtures(files: Sequence[Path]) -> tuple[int, str]:
    """Samples a second, and what all of them are; refuses those of other rates or channels."""
    wanted: tuple[int, int] | None = None
    seconds: list[float] = []
    for file in files:
        try:
            sound, rate = _read(file)
        except InputError as error:
            raise refused(error) from error
        wanted = wanted or (rate, len(sound))
        if (rate, len(sound)) != wanted:
            raise InputError(
                f"the wav file {file} has {rate} samples a second and {len(sound)} channels; "
                f"{files[0]} has {wanted[0]} and {wanted[1]}. Expected the same in all, as the "
                "model was trained with: resample the one or remove it."
            )
        seconds.append(sound.shape[1] / rate)
    rate, channels = wanted or (0, 0)
    note = f"sounds of {min(seconds):.2f} to {max(seconds):.2f} s, {rate} samples a second, "
    return rate, f"{note}{channels} channel{'s' * (channels != 1)}"


def _read(file: Path) -> tuple[Tensor, int]:
    """``(channels, samples)`` and the samples a second."""
    try:
        with warnings.catch_warnings():
            # Chunks beside the sound, such as tags, are no harm; a file cut short is broken.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
            rate, samples = wavfile.read(file)
    except (*SAID, *DAMAGED) as error:
        reason = str(error).rstrip(".") if isinstance(error, SAID) else "its header is damaged"
        raise InputError(
            f"the wav file {file} can't be read: {reason}. Expected PCM or float samples; replace "
            "or remove it."
        ) from error
    if samples.size == 0 or not np.isfinite(samples).all():
        what = "NaN or infinite samples" if samples.size else "no sample"
        raise InputError(f"the wav file {file} holds {what}. Replace or remove it.")
    if samples.dtype == np.uint8:  # 8 bits are unsigned, the middle is 128
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":  # 24 bits come as the upper ones of 32
        samples = samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    columns = samples.reshape(len(samples), -1).T  # (channels, samples)
    return torch.from_numpy(np.ascontiguousarray(columns, dtype=np.float32)), rate
