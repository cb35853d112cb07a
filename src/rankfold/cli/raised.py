"""How an error ends a command: its exit code, one message, and the traceback of a user's code."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

from rankfold.errors import InputError
from rankfold.machine.memory import memory_message, with_causes

BAD_INPUT, OWN_CODE = 2, 6
_LIBRARIES = ("site-packages", "dist-packages")


def ending(error: Exception) -> tuple[int, str, str] | None:
    """Exit code, message, and the traceback where the user's own code raised it.

    None for what is neither bad input, nor an error of the user's, nor of memory: a fault of ours.
    """
    if _is_of_a_gpu(error):
        from rankfold.machine.device import OUT_OF_MEMORY

        return BAD_INPUT, OUT_OF_MEMORY, ""
    memory = memory_message(error)
    if memory is not None:
        return BAD_INPUT, memory, ""
    raised = next((one for one in with_causes(error) if not isinstance(one, InputError)), None)
    shown = "" if raised is None else _of_user(raised)
    if isinstance(error, InputError):
        return (OWN_CODE if shown else BAD_INPUT), str(error), shown
    if not shown:
        return None
    message = f"code of your own raised {type(error).__name__}: {error}"
    return OWN_CODE, message, shown


def _is_of_a_gpu(error: Exception) -> bool:
    """Whether a GPU's memory ran out; where torch isn't imported, none was used."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _of_user(error: BaseException) -> str:
    """The traceback from the first line of the user's own code on; nothing where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((n for n, frame in enumerate(frames) if _is_own(frame.filename)), None)
    if first is None:
        return ""
    lines = traceback.StackSummary.from_list(frames[first:]).format()
    last = traceback.format_exception_only(type(error), error)
    return "".join(["Traceback (most recent call last):\n", *lines, *last])


def _is_own(file: str) -> bool:
    """Whether code is of no library, nor Python's or rankfold's own."""
    path = Path(file)
    python = [Path(str(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib")]
    libraries = [Path(__file__).parents[1], *python]
    return (
        path.is_file()  # not a library's compiled part, nor what was never a file
        and not any(part in _LIBRARIES for part in path.parts)
        and not any(path.is_relative_to(library) for library in libraries)
    )
