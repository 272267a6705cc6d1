"""What a sender keeps on the disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from esper_triton.oona.journal import Journal

ROWS = [("audit.lifecycle", "s", k, b"x" * k) for k in range(1, 6)]


def test_messages_come_in_order_and_stay_until_they_are_forgotten(tmp_path: Path) -> None:
    journal = Journal.of(tmp_path, "s")
    journal.append(ROWS[:3])
    journal.append(ROWS[3:])
    assert [tuple(row)[1:] for row in journal.oldest(10)] == ROWS
    assert (len(journal), journal.size_bytes) == (5, 15)
    journal.forget(journal.oldest(2))
    assert [tuple(row)[1:] for row in journal.oldest(2)] == ROWS[2:4]
    assert (len(journal), journal.size_bytes) == (3, 12)
    journal.close()


def test_there_is_no_file_before_the_first_message_and_none_after_the_last(tmp_path: Path) -> None:
    journal = Journal.of(tmp_path / "folder", "s")
    assert journal.oldest(1) == []
    assert not (tmp_path / "folder").exists()
    journal.append(ROWS)
    journal.forget(journal.oldest(10))
    journal.close()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_living_owner_keeps_its_journal_and_a_killed_one_leaves_it_whole(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from esper_triton.oona.journal import Journal\n"
        f"Journal.of(pathlib.Path({str(tmp_path)!r}), 'dead').append({ROWS!r})\n"
        "print('written', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"written\n"
        own = Journal.of(tmp_path, "own")
        assert list(Journal.orphans(tmp_path, besides=own.path)) == []
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    found = list(Journal.orphans(tmp_path, besides=own.path))
    assert [[tuple(row)[1:] for row in journal.oldest(10)] for journal in found] == [ROWS]
    for journal in found:
        journal.close()
    assert len(list(tmp_path.glob("*.journal"))) == 1


def test_what_is_no_journal_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.journal").write_bytes(b"no database" * 100)
    assert list(Journal.orphans(tmp_path, besides=tmp_path / "own.journal")) == []
    with pytest.raises(sqlite3.DatabaseError):
        Journal(tmp_path / "a.journal").append(ROWS)


def test_a_forked_child_leaves_its_parents_journal_alone(tmp_path: Path) -> None:
    journal = Journal.of(tmp_path, "s")
    journal.append(ROWS)
    child = os.fork()
    if child == 0:
        journal.abandon()
        del journal
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    journal.append(ROWS)
    assert len(journal.oldest(100)) == 10
    journal.forget(journal.oldest(100))
    journal.close()
