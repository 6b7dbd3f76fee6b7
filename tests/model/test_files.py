"""tt_model/files.py: whole files from many writers, what killed processes leave, a folder held, full disks."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import contents, model_of, plain
from disks import files_of_at_most

from tt_model.checkpoint import atomic_folder, convert, save
from tt_model.files import LOCK, hold, partial, write_atomically

ROOT = Path(__file__).resolve().parents[2]


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


WRITER = """
import sys
from pathlib import Path
from tt_model.files import write_atomically
def write(path):
    with path.open("w", buffering=1000) as file:
        for _ in range(100):
            file.write(sys.argv[2] * 1000)
print("ready", flush=True)
while True:
    write_atomically(Path(sys.argv[1]), write)
"""


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    target = tmp_path / "state"
    writers = [process(WRITER, target, letter) for letter in "ab"]
    try:
        assert [w.stdout.readline() for w in writers] == ["ready\n"] * 2
        seen = set()
        for _ in range(20000):
            if target.exists():
                text = target.read_text()
                assert len(text) == 100_000 and len(set(text)) == 1
                seen.add(text[0])
            if len(seen) == 2:
                break
        assert seen == {"a", "b"} and all(w.poll() is None for w in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    for path in tmp_path.glob("*.new"):  # killed before it was locked: swept up when it is old
        os.utime(path, (0, 0))
    write_atomically(target, lambda path: path.write_text("c"))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]  # with what the killed ones left


def test_what_is_about_to_be_locked_stays_for_a_minute(tmp_path: Path) -> None:
    target = tmp_path / "state"
    fresh, old = (tmp_path / f".state.{letter * 16}.partial.new" for letter in "ab")
    fresh.touch()
    old.touch()
    os.utime(old, (0, 0))
    write_atomically(target, lambda path: path.write_text("c"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [fresh.name, "state"]


FILLER = """
import sys
from pathlib import Path
from tt_model.files import partial
with partial(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as path:
    (path / "weights" if path.is_dir() else path).write_text("half")
    print(path.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_go_and_all_else_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    others = (".model.partial", ".model.0123456789abcdef.partial.txt", "model.0123456789abcdef.partial", ".models.x")
    for name in (*others, ".model.mine.partial", ".other.0123456789abcdef.partial"):
        (tmp_path / name).write_text("a user's")
    kept = contents(tmp_path)
    with process(FILLER, target, kind) as dead, process(FILLER, target, kind) as live:
        names = [p.stdout.readline().strip() for p in (dead, live)]
        assert all(re.fullmatch(r"\.model\.[0-9a-f]{16}\.partial", name) for name in names)
        dead.kill()
        dead.wait()
        assert (tmp_path / names[0]).exists()
        with partial(target) as mine:
            assert not (tmp_path / names[0]).exists() and (tmp_path / names[1]).exists() and mine.exists()
            with partial(target):  # another thread's, say
                assert mine.exists()
        assert (tmp_path / names[1]).exists()
        live.communicate("")
    assert contents(tmp_path) == kept


def test_a_killed_convert_is_swept_up(tmp_path: Path) -> None:
    plain(tmp_path / "source")
    code = """
import os, signal, sys
from tt_model.checkpoint import convert, write
import tt_model.checkpoint.write as module
module._write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=False)
"""
    with process(code, tmp_path / "source", tmp_path / "two") as killed:
        assert killed.wait() == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p.name != "source")
    assert left.name.endswith(".partial") and (left / "model.safetensors").is_file()
    convert(tmp_path / "source", tmp_path / "two", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "two"]


def test_a_replaced_folder_may_go_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies right after the exchange leaves the new folder with all that is kept."""
    target = tmp_path / "model"
    save(model_of(), target)
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("1")
    (target / "README.md").write_text("a card")
    (target / "link").symlink_to("README.md")
    module = sys.modules["tt_model.checkpoint.write"]
    exchange = module._exchange

    def dies(one: Path, other: Path) -> None:
        exchange(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_exchange", dies)
    with pytest.raises(KeyboardInterrupt):
        save(model_of(seed=1), target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "runs" / "log").read_text() == "1" and (target / "link").is_symlink()
    assert (target / "README.md").read_text() == "a card" and (target / "config.json").is_file()


def test_a_folder_that_appears_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "model") as slow:
        (slow / "config.json").write_text("slow")
        with atomic_folder(tmp_path / "model") as fast:
            (fast / "config.json").write_text("fast")
            (fast / "notes").write_text("kept")
        exists = Path.exists
        # As if the fast one came between the question and the answer.
        monkeypatch.setattr(Path, "exists", lambda p: p != tmp_path / "model" and exists(p))
    monkeypatch.undo()
    assert contents(tmp_path / "model") == {"config.json": b"slow", "notes": b"kept"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- a full disk ----


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "training.pt"
    target.write_text("before")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(target, full)
    assert (caught.value.filename, caught.value.errno) == (str(target), errno.ENOSPC)
    with files_of_at_most(1000), pytest.raises(OSError, match=re.escape(str(target))):
        write_atomically(target, lambda path: path.write_bytes(b"x" * 2000))
    with pytest.raises(FileNotFoundError) as caught:  # an error about another file stays
        write_atomically(target, lambda path: path.write_text((tmp_path / "none").read_text()))
    assert caught.value.filename == str(tmp_path / "none")
    assert target.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["training.pt"]


def test_a_full_disk_names_the_shard(tmp_path: Path) -> None:
    plain(tmp_path / "source")
    for write in (
        lambda: save(model_of(), tmp_path / "two"),
        lambda: convert(tmp_path / "source", tmp_path / "two", progress=False),
    ):
        with files_of_at_most(4096), pytest.raises(OSError) as caught:
            write()
        assert caught.value.filename == str(tmp_path / "two" / "model.safetensors")
        assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_atomically(tmp_path / name, lambda path: path.write_text("1"))
        assert (tmp_path / name).read_text() == "1"


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "new", lambda path: path.write_text(""))
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- a folder held ----

HOLDER = """
import sys
from pathlib import Path
from tt_model.files import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    with process(HOLDER, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        message = rf"{re.escape(str(tmp_path))}: in use by process {holder.pid} on .+, since .+; wait for it, or use an"
        with pytest.raises(BlockingIOError, match=message), hold(tmp_path):
            pass
        holder.communicate("")
    assert list(tmp_path.iterdir()) == []
    with process(HOLDER, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert (tmp_path / LOCK).exists()  # stale: nobody holds it
    with hold(tmp_path), hold(tmp_path):  # and the same thread may do it twice
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
        refused = []

        def other() -> None:
            try:
                with hold(tmp_path):
                    pass
            except BlockingIOError as error:
                refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_locks_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="cannot be locked here"), hold(tmp_path):
        write_atomically(tmp_path / "a", lambda path: torch.save({}, path))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
