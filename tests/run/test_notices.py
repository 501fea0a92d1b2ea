"""Notices: told, printed where nobody shows them, and kept in the run's folder."""

import io
import json
import os
import sys

import pytest
from rich.console import Console

from h2tune_jax.run.disk import RunError
from h2tune_jax.run.display import Display
from h2tune_jax.run.events import Finished, Notice
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.notices import PassOn, announce, read_notices


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_a_notice_is_told_printed_and_kept(folder, capsys):
    told = []
    announce(folder, (told.append,), Notice("one"))
    announce(folder, (told.append,), Notice("two", "warning"))
    announce(None, (told.append,), Notice("three"))
    assert [notice.text for notice in told] == ["one", "two", "three"]
    assert capsys.readouterr().err.splitlines() == [
        f"h2tune: {folder.path}: one", f"h2tune: {folder.path}: warning: two", "h2tune: three",
    ]  # fmt: skip
    assert [(line["level"], line["text"]) for line in read_notices(folder)] == [
        ("info", "one"), ("warning", "two"),
    ]  # fmt: skip
    assert all(line["wall"] > 1e9 for line in read_notices(folder))


def test_what_a_display_shows_is_not_printed_again(folder, capsys):
    file = io.StringIO()
    display = Display(Console(file=file, width=80))
    announce(folder, (display,), Notice("shown"))
    announce(folder, (PassOn("seed 4", (display,)),), Notice("of another"))
    assert file.getvalue().splitlines() == ["shown", "seed 4: of another"]
    assert capsys.readouterr().err == ""
    file.close()  # the terminal goes away
    announce(folder, (display,), Notice("seen all the same"))
    assert "seen all the same" in capsys.readouterr().err
    assert len(read_notices(folder)) == 3


def test_of_other_seeds_notices_alone_are_passed_on():
    told = []
    other = PassOn("seed 4", (told.append,))
    other(Finished("complete", 3, None))
    other(Notice("text", "warning"))
    assert told == [Notice("seed 4: text", "warning")]
    assert not other.shows_notices


def test_once_is_once(folder):
    for _ in range(2):
        announce(folder, (), Notice("again"), once=True)
    announce(folder, (), Notice("again"))
    assert len(read_notices(folder)) == 2


def test_a_line_that_a_kill_cut_short_costs_itself_alone(folder):
    announce(folder, (), Notice("one"))
    with folder.notices.open("ab") as file:
        file.write(b'{"wall": 1, "te')
    assert [line["text"] for line in read_notices(folder)] == ["one"]
    announce(folder, (), Notice("two"))
    assert [line["text"] for line in read_notices(folder)] == ["one", "two"]
    assert json.loads(folder.notices.read_bytes().splitlines()[-1])["text"] == "two"


@pytest.mark.parametrize("closed", [True, False])
def test_a_terminal_that_is_gone_ends_nothing(folder, monkeypatch, closed):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    announce(folder, (), Notice("one"))
    assert len(read_notices(folder)) == 1


def test_a_notice_is_on_the_disk_when_it_was_told(folder, monkeypatch):
    places, real = [], os.fsync

    def fsync(handle):
        places.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    announce(folder, (), Notice("one"))
    announce(folder, (), Notice("two"))
    file = str(folder.notices)
    assert places == [file, str(folder.path), file]


def test_a_folder_that_cannot_be_written_is_said_after_the_notice(tmp_path, capsys):
    folder = RunFolder(tmp_path / "gone")
    with pytest.raises(RunError, match=r"notices.jsonl cannot be written to .*: No such file"):
        announce(folder, (), Notice("one"))
    assert "one" in capsys.readouterr().err
