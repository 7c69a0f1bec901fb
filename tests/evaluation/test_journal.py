from __future__ import annotations

from contextlib import suppress

import pytest

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.journal import Journal, hash_ids, key_of, open_journal, working_folder


def test_rows_are_found_again_by_a_later_process_and_a_torn_line_harms_nobody(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"key": "a", "value": "é"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "val')  # killed inside a write
    again = Journal(path)
    assert len(again) == 1
    again.add({"key": "c", "value": 3})
    last = Journal(path)
    assert last.get("a") == {"key": "a", "value": "é"}
    assert "b" not in last
    assert last.get("c") == {"key": "c", "value": 3}


def test_the_working_folder_stays_after_an_error_and_goes_after_success(tmp_path):
    out = tmp_path / "result"
    with suppress(RuntimeError), open_journal(out) as journal:
        journal.add({"key": "a"})
        raise RuntimeError
    assert working_folder(out).is_dir()
    with open_journal(out) as journal:
        assert "a" in journal
    assert not working_folder(out).exists()


def test_two_processes_cannot_evaluate_into_one_folder(tmp_path):
    out = tmp_path / "result"
    with open_journal(out), pytest.raises(SettingsError, match="in use"), open_journal(out):
        pass


def test_keys_depend_on_every_part_and_on_nothing_else():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("a"), key_of("b"), key_of("a", None), key_of("a", 1)}) == 4
    assert hash_ids([1, 23]) != hash_ids([12, 3])
