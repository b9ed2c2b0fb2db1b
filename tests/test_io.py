"""Atomic writing: the old file or the new one, never half of the new one."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimoe.errors import WriteError
from minimoe.io import atomic_write, in_use, parse_json, remove_leftovers, write_text
from tests.small import refuses, small_disk


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_and_replaces_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "eins\n")
    write_text(path, "zwei – ü\n")
    assert path.read_bytes() == "zwei – ü\n".encode()
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_the_data_reach_the_disk_before_the_rename(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    for owner, name, call in ((os, "fsync", os.fsync), (Path, "replace", Path.replace)):

        def noted(*given: Any, name: str = name, call: Any = call) -> Any:
            done.append(name)
            return call(*given)

        monkeypatch.setattr(owner, name, noted)
    write_text(tmp_path / "x", "text")
    assert done == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_the_file_is_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file_and_is_an_error_of_minimoe(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    refuses(OSError, "x", write_text, path / "in a file", "text")
    with small_disk(10_000), pytest.raises(WriteError) as caught:
        write_text(path, "new" * 10_000)
    assert str(caught.value).startswith(f"{path} could not be written (File too large)")
    assert isinstance(caught.value, OSError) and caught.value.strerror == "File too large"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_lone_surrogate_is_written_as_json_writes_it(tmp_path: Path) -> None:
    write_text(tmp_path / "x", json.dumps({"a": "half \ud800 →"}, ensure_ascii=False))
    assert (tmp_path / "x").read_text(encoding="utf-8") == r'{"a": "half \ud800 →"}'


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "1" * 5000])
def test_whatever_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


HALF_WRITTEN = """
import sys, time
from minimoe.io import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="locks and signals of POSIX systems")
def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path) -> None:
    path = tmp_path / "file [1].txt"  # not a pattern
    write_text(tmp_path / "other.txt", "other")
    (tmp_path / ".file [1].txt.notes.tmp").write_text("of somebody else")
    there = names(tmp_path)
    command = [sys.executable, "-c", HALF_WRITTEN, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    write_text(path, "whole")  # while the other one is at it
    (half,) = set(names(tmp_path)) - {*there, path.name}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / half).exists()
    write_text(path, "whole")
    assert names(tmp_path) == sorted([*there, path.name])


def test_leftovers_may_be_folders_and_what_is_in_use_stays(tmp_path: Path) -> None:
    for name in (".fetch-a", ".fetch-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    with in_use(tmp_path / ".fetch-b"):
        remove_leftovers(tmp_path, ".fetch-*")
        assert names(tmp_path) == [".fetch-b"]
    remove_leftovers(tmp_path, ".fetch-*")
    assert names(tmp_path) == []
    remove_leftovers(tmp_path / "absent", "*")


def test_a_read_only_file_system_is_an_error_of_minimoe(tmp_path, monkeypatch) -> None:
    """Root may write whatever the modes say, so the system's own answer stands in for such a mount."""

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(WriteError, match=r"could not be written.*Read-only file system"):
        write_text(tmp_path / "x", "text")
    assert names(tmp_path) == []
