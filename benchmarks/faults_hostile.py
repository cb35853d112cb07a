"""Hostile folders: no code ran, nothing outside was read, no traceback, nothing hung.

    python -m benchmarks.faults_hostile [--size N]

Each folder of ``hostile_folders`` is given to every command that opens its kind, each in a process
of its own in which opening a pickle, importing from the folder, starting a process, asking the
network and reading outside of the folder are watched, and everything that is written. The package
``kernels``, from which transformers takes code of a hub, is a stand-in that leaves the canary.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import Counts, register_fault
from benchmarks.forked import ended, forked
from benchmarks.hostile_folders import Canary, Case, canary_of, code, table

SECRET = "5ecret-of-the-user"
SECONDS = 60  # a command may take
EXIT_CODES = (0, 2, 3, 4)
WRITTEN_OUT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)
FORGED = re.compile(r"^\W*FORGED", re.MULTILINE)
STARTED = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect",
    "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class", "urllib.Request",
    "webbrowser.open",
}  # fmt: skip
KERNELS = """
from pathlib import Path
class _Any:
    def __init__(self, *args, **options): pass
    def __getattr__(self, name): return self
    def __or__(self, other): return self
    __ror__ = __or__
    def __call__(self, one=None, *args, **options): return one
class _Names(type):
    def __getattr__(cls, name): return _Any()
class Mode(metaclass=_Names): pass
def get_kernel(*args, **options):
    Path({canary!r}).touch()
    raise ImportError("the canary's kernel")
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Any
"""


def survived(size: int | None = None) -> tuple[int, int]:
    """How many hostile folders were tried, and how many of them were survived.

    Args:
        size: Of folders, spread over the table; all, where there is none.
    """
    with tempfile.TemporaryDirectory(prefix="rankfold-hostile-") as made:
        top = Path(made).resolve()
        _write_kernels(top)
        asked = [] if size is None else ["--size", str(size)]
        path = os.pathsep.join([str(top / "fakes"), *filter(None, sys.path)])
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.faults_hostile", "--in", str(top), *asked],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found = json.loads(ran.stdout.splitlines()[-1])
    return found["tried"], found["survived"]


def _write_kernels(top: Path) -> None:
    """A package that transformers takes for the one that runs code of a hub."""
    package = top / "fakes" / "kernels"
    package.mkdir(parents=True)
    said = KERNELS.format(canary=str(canary_of(top / "outside")))
    (package / "__init__.py").write_text(said)
    about = top / "fakes" / "kernels-0.18.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    (about / "top_level.txt").write_text("kernels\n")


def _write_good(top: Path) -> None:
    """A model's folder, an artifact of it, data, and the folder outside."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import rankfold.cli.commands  # noqa: F401
    from rankfold.cli.app import app

    words = [f"w{number}" for number in range(40)]
    vocabulary = {word: place for place, word in enumerate(["[UNK]", *words])}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = Whitespace()  # type: ignore[assignment, unused-ignore]
    torch.manual_seed(0)
    small = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=41,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(top / "model")
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]").save_pretrained(top / "model")
    drawn = torch.randint(40, (1200,)).tolist()
    (top / "text.txt").write_text(" ".join(words[place] for place in drawn))
    outside = top / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (outside / "tokenizer_secret.txt").write_text(SECRET)
    (outside / "run.py").write_text(code(outside))
    for name in ("config.json", "config.4.0.0.json", "tokenizer.9.json"):
        (outside / name).write_text(json.dumps({"architectures": [SECRET]}))
    (outside / "model.safetensors").write_bytes((top / "model" / "model.safetensors").read_bytes())
    _write_pickle(outside)
    status, said = _forked(
        lambda: app(_lossless(top / "model", top, top / "artifact")), top / "model"
    )
    if status:
        raise RuntimeError(f"the good model can't be opened: {said}")


def _write_pickle(outside: Path) -> None:
    import pickle

    (outside / "pickle.bin").write_bytes(pickle.dumps(Canary(canary_of(outside))))


def _lossless(folder: Path, top: Path, out: Path) -> list[str]:
    return [
        "lossless", str(folder), "--data", str(top / "text.txt"), "--length", "8", "--size", "0.95",
        "--out", str(out), "--effort", "fast", "--no-gradient-step",
    ]  # fmt: skip


def commands(kind: str, folder: Path, top: Path) -> list[list[str]]:
    """Command lines that open a folder of this kind."""
    data, out = ["--data", str(top / "text.txt")], folder.parent / "out"
    if kind == "model":
        return [_lossless(folder, top, out)]
    return [
        ["inspect", str(folder)],
        ["inspect", str(folder), "--json"],
        ["evaluate", str(folder), *data],
        ["verify", str(folder), *data],
        ["verify", str(folder), *data, "--model", str(top / "model")],
        ["export", str(folder), "--to", "dense", "--out", str(out)],
        ["load", str(folder)],
    ]


def _run(arguments: list[str]) -> None:
    """A command, or what Python calls."""
    from rankfold import ArtifactError, load
    from rankfold.cli.app import app

    if arguments[0] != "load":
        app(arguments)
        return
    try:
        load(arguments[1], as_saved=False)
    except ArtifactError as error:
        print(f"error: {error}")
        sys.exit(2)


def _watch(folder: Path, outside: Path) -> None:
    """End the process with a word where the folder makes something happen."""

    def foreign(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith((f"{outside}/", "/etc/passwd", "/etc/shadow"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        bad = event in STARTED and "libc" not in str(arguments)
        bad = bad or (event == "open" and foreign(arguments[0]))
        if event == "ctypes.dlopen":
            bad = str(arguments[0]).startswith(f"{folder.parent}/")
        if event == "exec":
            bad = str(getattr(arguments[0], "co_filename", "")).startswith(f"{folder.parent}/")
        if bad:
            os.write(2, f"\nVIOLATION {event} {arguments!r}\n".encode(errors="replace"))
            os._exit(99)

    sys.addaudithook(hook)


def _forked(function: Callable[[], object], folder: Path) -> tuple[int, str]:
    """Exit code of a process that only runs this, and what it wrote."""
    said = folder.parent / f"said-{folder.name}"
    code = ended(forked(function, said, seconds=SECONDS, failed=98))
    return code, said.read_text(encoding="utf-8", errors="replace")


def _problem(case: Case, top: Path, number: int) -> str | None:
    """What went wrong with a folder, or None."""
    import shutil

    place, outside = top / f"case{number}", top / "outside"
    place.mkdir()
    (place / "outside").symlink_to(outside)  # as seen from the folder
    folder = place / "it"
    shutil.copytree(top / case.kind, folder)
    case.make(folder, outside)
    try:
        for arguments in commands(case.kind, folder, top):

            def child(arguments: list[str] = arguments) -> None:
                _watch(folder, outside)
                _run(arguments)

            status, text = _forked(child, folder)
            problem = _wrong(status, text, place, outside)
            if problem is not None:
                return f"{arguments[0]}: {problem}"
    finally:
        canary_of(outside).unlink(missing_ok=True)
        shutil.rmtree(place)
    return None


def _wrong(status: int, text: str, place: Path, outside: Path) -> str | None:
    if canary_of(outside).exists():
        return "the canary is there"
    if "VIOLATION" in text or status not in EXIT_CODES or "Traceback" in text:
        return f"exit {status}: {text[-1500:]}"
    if WRITTEN_OUT.search(text) or FORGED.search(text):
        return f"it writes what a terminal interprets: {text[-1500:]!r}"
    written = [file for file in (place / "out").rglob("*") if file.is_file()]
    if SECRET in text or any(SECRET.encode() in file.read_bytes() for file in written):
        return "a secret was read"
    return None


def main() -> None:
    """Try the folders, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults_hostile")
    parser.add_argument("--size", type=int, help="folders to try, spread over the table")
    parser.add_argument("--in", dest="top", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.top is None:
        tried, fine = survived(options.size)
        print(f"hostile folders: {tried} tried, {fine} survived")
        sys.exit(tried != fine)
    _write_good(options.top)
    cases = table()
    every = 1 if options.size is None else max(1, len(cases) // options.size)
    cases = cases[::every][: options.size]
    fine = 0
    for number, case in enumerate(cases):
        problem = _problem(case, options.top, number)
        fine += problem is None
        if problem is not None:
            print(f"NOT SURVIVED {case.kind}, {case.name}: {problem}", file=sys.stderr)
    print(json.dumps({"tried": len(cases), "survived": fine}))


register_fault("hostile folders by every command", lambda _, size: Counts(*survived(size)), 1000)


if __name__ == "__main__":
    main()
