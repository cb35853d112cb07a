"""The data of a run that collects statistics, as the command line names it."""

from __future__ import annotations

from dataclasses import replace

from rankfold.cli.data_options import DataOptions
from rankfold.cli.open import OpenedModel, open_data, open_examples, open_parts
from rankfold.cli.options import Parts, Reading
from rankfold.data.parts import Data
from rankfold.search.study import limits_of
from rankfold.settings import Settings


def opened_data(
    opened: OpenedModel, parts: Parts, settings: Settings, options: Reading
) -> tuple[Data, object]:
    """The three parts of the data, and examples of another kind.

    Raises:
        InputError: Names what is wrong with one of them.
    """
    limits = (settings.limit, settings.selection_limit, settings.held_out_limit)
    asked = zip(limits, DataOptions.own_windows, strict=True)
    first, second, third = (limit or default for limit, default in asked)
    reading = replace(
        options.data_options(settings.task, settings.seed),
        own_windows=(first, second, third),
        limits=limits_of(settings),
    )
    if parts.data is not None:
        data = open_data(parts.data, opened, reading)
    else:
        named = (parts.calibration or "", parts.selection or "", parts.held_out or "")
        data = open_parts(*named, opened, reading)
    if parts.guard is None:
        return data, None
    return data, open_examples(parts.guard, opened, reading, beside=True)
