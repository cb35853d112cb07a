"""``rankfold doctor``."""

from __future__ import annotations

from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import Json
from rankfold.cli.printed import print_json


@command(needs="rankfold.cli.facts")
def doctor(*, json: Json = False) -> int:
    """What rankfold finds on this machine: versions, threads, memory, devices, missing extras."""
    import msgspec

    from rankfold.cli.facts import fact_lines, facts

    found = facts()
    if json:
        print_json(msgspec.to_builtins(found))
    else:
        for line in fact_lines(found):
            say(line)
    return DONE
