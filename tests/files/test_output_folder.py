"""The life of an output folder: owned, durable, replaced in one step, never more than its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankfold
from rankfold import InputError
from rankfold.artifact.save import save_artifact
from rankfold.files.durable import PREFIX, exchange
from rankfold.files.folder import check_output, folder_in_one_step, owned_output
from rankfold.files.leftovers import clean_leftovers
from rankfold.files.listed import file_names, remove_listed, unlisted
from rankfold.files.owned import ABOUT, LOCK, hidden_of
from tests.new_process import NewProcess

MARK = "rankfold.json"


def write(folder: Path, text: str = "new", *more: str, overwrite: bool = False) -> None:
    """A small result: a mark with the list of its files, and a file."""
    with folder_in_one_step(folder, overwrite) as draft:
        for name in ("data", *more):
            (draft / name).parent.mkdir(exist_ok=True, parents=True)
            (draft / name).write_text(text)
        (draft / MARK).write_text(json.dumps({"files": file_names(draft, MARK)}))


def text_of(folder: Path) -> str:
    assert unlisted(folder) == []
    return (folder / "data").read_text()


def nothing_hidden(folder: Path) -> bool:
    return not [one for one in folder.rglob("*") if one.name.startswith(PREFIX)]


def python(code: str, *words: object) -> NewProcess:
    """Another process, in which the code's folder is ``out``."""
    begin = "import os, signal, sys; from pathlib import Path; out = Path(sys.argv[1])\n"
    begin += "from tests.files.test_output_folder import write\n"
    return NewProcess(begin + textwrap.dedent(code), *words, cwd=Path(__file__).parents[2])


# Where a run is killed: before the nth of these calls of the system; each ends the process at once.
KILLED = """
import rankfold.files.owned as owned, rankfold.files.folder as folder, pathlib
count, wanted, without = 0, int(sys.argv[2]), sys.argv[3] == "without"
def counted(call):
    def run(*given, **named):
        global count
        count += 1
        if count == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)
    return run
if without:
    owned.exchange = lambda one, other: False
else:
    owned.exchange = counted(owned.exchange)
for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "write_text"):
    setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
owned.sync_folder = counted(owned.sync_folder)
folder.sync_tree = counted(folder.sync_tree)
write(out, "new", overwrite=sys.argv[4] == "overwrite")
print("done", count)
"""


@pytest.mark.parametrize("without", ["with", "without"])
@pytest.mark.parametrize("over", ["overwrite", "new"])
def test_killed_before_any_step(tmp_path: Path, over: str, without: str) -> None:
    """All steps in forked children: each dies by SIGKILL before one of them."""
    for wanted in range(1, 60):
        root = tmp_path / str(wanted)
        out = root / "deep" / "out"
        root.mkdir()
        if over == "overwrite":
            write(out, "old")
        if not (child := os.fork()):
            _be_killed(out, wanted, without, over)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and wanted > 15
            assert text_of(out) == "new" and nothing_hidden(root)
            return
        before = text_of(out) if out.exists() else None
        clean_leftovers(root if not out.parent.exists() else out.parent)
        assert nothing_hidden(root)
        names = {one.name for one in out.parent.iterdir()} if out.parent.exists() else set()
        assert names <= {"out", "out-saved-1"}
        if over == "overwrite":
            assert text_of(out) == (before or text_of(out)) in ("old", "new")
        write(out, "again", overwrite=True)
        assert text_of(out) == "again" and nothing_hidden(root)
    pytest.fail("more steps than expected")


def _be_killed(out: Path, wanted: int, without: str, over: str) -> None:
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        sys.argv[:] = ["", str(out), str(wanted), without, over]
        space = {"os": os, "signal": signal, "sys": sys, "out": out, "write": write}
        exec(KILLED, space)
        os._exit(0)
    finally:
        os._exit(1)


def test_load_and_the_next_run_give_back_what_a_dead_run_hid(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    for number, back in enumerate((rankfold.load, clean_leftovers, None)):
        out = tmp_path / str(number) / "out"
        save_artifact(out, model, {"layers": []})
        hidden = hidden_of(out)
        hidden.mkdir()
        (hidden / ABOUT).write_text(json.dumps({"name": "out"}))
        out.rename(hidden / "earlier")  # killed between two renames
        if back is rankfold.load:
            rankfold.load(out, model=nn.Sequential(nn.Linear(3, 2)))
        elif back is not None:
            assert [line.split()[0] for line in clean_leftovers(out)] == ["restored"]
        else:
            with pytest.raises(InputError, match="exists and is not empty"):
                check_output(out, False, MARK)
        assert (out / MARK).is_file() and nothing_hidden(out.parent)


def test_what_a_living_run_has_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = """
    from rankfold.files.folder import owned_output
    with owned_output(out):
        print("owned", flush=True)
        sys.stdin.read() if False else __import__("time").sleep(60)
    """
    with python(code, out) as other:
        assert other.stdout.readline() == "owned\n"
        with pytest.raises(InputError, match=rf"another run \(process {other.pid}\) is writing"):
            check_output(out, False, MARK)
        with pytest.raises(InputError, match="another run"):
            write(out)
        assert "left alone" in clean_leftovers(tmp_path)[0]
        assert hidden_of(out).is_dir()
        other.kill()
    lines = clean_leftovers(tmp_path)
    assert len(lines) == 1 and lines[0].startswith("removed")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_into_one_new_folder(tmp_path: Path) -> None:
    code = """
    from rankfold import InputError
    from rankfold.files.folder import check_output, owned_output
    import time
    try:
        check_output(out, False, "rankfold.json")
        with owned_output(out):
            check_output(out, False, "rankfold.json")
            time.sleep(0.2)
            write(out, sys.argv[2])
    except InputError as error:
        sys.exit(str(error))
    """
    out = tmp_path / "out"
    both = [python(code, out, number) for number in range(2)]
    ended = [(*one.communicate(), one.returncode) for one in both]
    won = [number for number, (_, _, code) in enumerate(ended) if code == 0]
    assert len(won) == 1, ended
    assert text_of(out) == str(won[0]) and nothing_hidden(tmp_path)
    assert re.search("another run|exists and is not empty", ended[1 - won[0]][1])


def test_a_thread_does_not_own_what_another_does(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with owned_output(tmp_path / "out"), ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match="another run"):
            pool.submit(write, tmp_path / "out").result()
        write(tmp_path / "out")
    assert text_of(tmp_path / "out") == "new"


def _note(out: Path) -> str:
    (out / "notes.txt").write_text("mine")
    return "notes.txt"


def _inner(out: Path) -> str:
    (out / "export" / "deep").mkdir(parents=True)
    (out / "export" / "deep" / "model.onnx").write_text("mine")
    return "export/deep/model.onnx"


def _link(out: Path) -> str:
    (out / "link").symlink_to("/etc")
    return "link"


def _empty(out: Path) -> str:
    (out / "plan" / "b").mkdir(parents=True)
    return "plan/b/"


def _hidden(out: Path) -> str:
    (out / ".git").write_text("mine")
    return ".git"


def _mark_of_another(out: Path) -> str:
    (out / "export.json").write_text("{}")
    return "export.json"


@pytest.mark.parametrize("put", [_note, _inner, _link, _empty, _hidden, _mark_of_another])
def test_what_is_not_listed_is_refused_by_name_and_never_deleted(
    tmp_path: Path, put: Callable[[Path], str]
) -> None:
    out = tmp_path / "out"
    write(out, "old", "inner/more")
    name = put(out)
    with pytest.raises(InputError, match=re.escape(name)):
        check_output(out, True, MARK)
    assert text_of_any(out) == "old"
    # It may come while a run is at work: the result stands, and it stays in sight.
    write(out, "new", overwrite=True)
    assert text_of(out) == "new"
    kept = tmp_path / "out-kept-1" / name
    assert os.path.lexists(kept) and {p.name for p in tmp_path.iterdir()} == {"out", "out-kept-1"}


def text_of_any(folder: Path) -> str:
    return (folder / "data").read_text()


def test_an_artifact_without_a_list_is_known_by_its_names(tmp_path: Path) -> None:
    shutil.copytree(Path("tests/fixtures/artifact-0.1.0/llama"), tmp_path / "out")
    check_output(tmp_path / "out", True, MARK)
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"):
        check_output(tmp_path / "out", True, MARK)


NAMES = st.lists(
    st.text("ab.é ", min_size=1, max_size=4).filter(lambda n: n.strip(".") and n != "x"),
    unique=True, max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(NAMES, NAMES)
def test_only_listed_files_are_deleted(
    tmp_path_factory: pytest.TempPathFactory, own: list[str], others: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("listed") / "x"
    folder.mkdir()
    for name in {*own, *others}:
        (folder / name).write_text(name)
    (folder / MARK).write_text(json.dumps({"files": [*own, "../../escape", "/etc/hosts", MARK]}))
    left = {*others} - {*own}
    assert remove_listed(folder) == sorted(left)
    assert folder.exists() == bool(left)
    assert {one.name for one in folder.iterdir()} == left if left else not folder.exists()


@pytest.mark.parametrize(("mask", "file", "inner"), [(0o22, 0o644, 0o755), (0o77, 0o600, 0o700)])
def test_modes_are_the_umasks_or_the_old_ones(
    tmp_path: Path, mask: int, file: int, inner: int
) -> None:
    def modes(*names: str) -> list[int]:
        return [stat.S_IMODE((out / name).stat().st_mode) for name in names]

    out, model = tmp_path / "out", nn.Sequential(nn.Linear(3, 2))
    before = os.umask(mask)
    try:
        save_artifact(out, model, {"layers": []})
        assert modes(".", "model.safetensors", MARK) == [inner, file, file]
        out.chmod(0o2770)
        (out / MARK).chmod(0o640)
        save_artifact(out, model, {"layers": []}, overwrite=True)
        assert modes(".", "model.safetensors", MARK) == [0o2770, file, 0o640]
    finally:
        os.umask(before)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to("disk/real")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").is_symlink() and text_of(tmp_path / "disk" / "real") == "new"
    assert nothing_hidden(tmp_path)


def test_readers_see_one_whole_artifact_while_it_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = """
    import time
    from torch import nn
    import torch
    from rankfold.artifact.save import save_artifact
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)) for _ in range(2)]
    for number, model in enumerate(models):
        nn.init.constant_(model[0].weight, number)
        nn.init.constant_(model[1].weight, number)
    save_artifact(out, models[0], {"layers": []})
    print("ready", flush=True)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        for model in models:
            save_artifact(out, model, {"layers": []}, overwrite=True)
    """
    seen = set()
    with python(code, out) as other:
        assert other.stdout.readline() == "ready\n"
        while other.poll() is None:
            model = rankfold.load(out, model=nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
            values = {
                value
                for w in model.parameters()
                if w.dim() > 1
                for row in w.tolist()
                for value in row
            }
            assert len(values) == 1
            seen |= values
    assert other.returncode == 0 and seen == {0.0, 1.0}


def test_transformers_sees_one_whole_artifact_or_is_told(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    code = """
    import time
    from tests.small_models import tiny_llama
    from torch import nn
    from rankfold.artifact.save import save_artifact
    models = [tiny_llama() for _ in range(2)]
    for number, model in enumerate(models):
        for weight in model.parameters():
            nn.init.constant_(weight, number)
    save_artifact(out, models[0], {"layers": []})
    print("ready", flush=True)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        for model in models:
            save_artifact(out, model, {"layers": []}, overwrite=True)
    """
    seen = 0
    with python(code, out) as other:
        assert other.stdout.readline() == "ready\n"
        while other.poll() is None:
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(out)
            except rankfold.ArtifactError as error:
                assert "was replaced by another run" in str(error)
                continue
            assert len({float(weight.detach().mean()) for weight in model.parameters()}) == 1
            seen += 1
        assert other.returncode == 0, other.communicate()[1]
    assert seen


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_all_is_on_the_disk_before_a_name_is_changed(tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace"
    write(out, "old")
    code = (
        "import sys; from pathlib import Path; from tests.files.test_output_folder import write;"
        "write(Path(sys.argv[1]), 'new', 'inner/more', overwrite=True)"
    )
    calls = "trace=fsync,rename,renameat,renameat2,unlink,unlinkat"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-c", code, out],
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    lines = [line for line in trace.read_text().splitlines() if str(tmp_path) in line]

    def place(*words: str) -> int:
        found = [n for n, line in enumerate(lines) if all(word in line for word in words)]
        assert found, (words, lines)
        return found[0]

    swapped = place("renameat2", "RENAME_EXCHANGE")
    for name in ("draft/data", f"draft/{MARK}", "draft/inner/more", "draft/inner>", "draft>"):
        assert place("fsync", name) < swapped
    after = [n for n, li in enumerate(lines) if "fsync" in li and f"{tmp_path}>" in li]
    assert any(swapped < n < place("unlink", "whole") for n in after)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None,
    reason="only root mounts",
)
def test_a_power_cut_after_the_end_loses_nothing(tmp_path: Path) -> None:
    """What the disk holds the moment the command ended is mounted: no more than what was synced."""
    disk, mounted, copy = tmp_path / "disk", tmp_path / "mounted", tmp_path / "copy"
    with disk.open("wb") as file:
        file.truncate(24 << 20)
    mounted.mkdir()
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    if subprocess.run(["mount", "-o", "loop", disk, mounted], capture_output=True).returncode:
        pytest.skip("this machine mounts no files")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(300, 300))
    try:
        save_artifact(mounted / "out", nn.Sequential(nn.Linear(300, 300)), {"layers": []})
        save_artifact(mounted / "out", model, {"layers": []}, overwrite=True)
        shutil.copyfile(disk, copy)  # the power is cut
    finally:
        subprocess.run(["umount", mounted], check=True)
    subprocess.run(["mount", "-o", "loop", copy, mounted], check=True)
    try:
        found = rankfold.load(mounted / "out", model=nn.Sequential(nn.Linear(300, 300)))
        assert torch.equal(found[0].weight, model[0].weight)
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_exchange_changes_both_names(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "one", tmp_path / "other"):
        assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    with pytest.raises(OSError, match="missing"):
        exchange(tmp_path / "one", tmp_path / "missing")


def test_a_hidden_folder_of_somebody_else_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "draft").mkdir()
    hidden_of(tmp_path / "out").symlink_to("precious")
    with pytest.raises(InputError, match="it is no folder of yours"):
        check_output(tmp_path / "out", False, MARK)
    assert "left alone" in clean_leftovers(tmp_path)[0]
    assert (tmp_path / "precious" / "draft").is_dir()


def test_what_comes_meanwhile_is_not_replaced_and_the_result_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"What is finished was saved in .*out-saved-1"),
        folder_in_one_step(tmp_path / "out", overwrite=False) as draft,
    ):
        (draft / "data").write_text("finished")
        (draft / MARK).write_text(json.dumps({"files": ["data", MARK]}))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert text_of(tmp_path / "out-saved-1") == "finished"
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["theirs"]
    assert nothing_hidden(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_folder_is_put_in_place_waits(tmp_path: Path, sent: int) -> None:
    code = """
    import signal
    signal.signal(int(sys.argv[2]), signal.SIG_DFL)  # a shell's background job ignores some
    if int(sys.argv[2]) == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import rankfold.files.owned as owned
    from rankfold.machine.interruption import raising, exit_code
    real = owned.exchange
    def late(one, other):
        for _ in range(2):
            os.kill(os.getpid(), int(sys.argv[2]))
        return real(one, other)
    owned.exchange = late
    try:
        with raising():
            write(out, "new", overwrite=True)
    except KeyboardInterrupt as error:
        sys.exit(exit_code(error))
    """
    write(tmp_path / "out", "old")
    with python(code, tmp_path / "out", int(sent)) as other:
        _, errors = other.communicate()
    assert other.returncode == 128 + sent, errors
    assert text_of(tmp_path / "out") == "new" and nothing_hidden(tmp_path)


def test_the_lock_is_freed_at_once_by_a_kill(tmp_path: Path) -> None:
    code = "from rankfold.files.owned import owned\nwith owned(out): print(1, flush=True); "
    code += "__import__('time').sleep(60)"
    with python(code, tmp_path / "out") as other:
        assert other.stdout.readline()
        assert (hidden_of(tmp_path / "out") / LOCK).exists()
        other.kill()
        other.wait()
    begun = time.monotonic()
    write(tmp_path / "out", "next")
    assert text_of(tmp_path / "out") == "next" and time.monotonic() - begun < 1
