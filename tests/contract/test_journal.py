from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract.rundir import Journal, last_record, read_journal

scalar = st.one_of(st.integers(), st.floats(), st.text(max_size=20), st.booleans(), st.none())
record = st.dictionaries(st.text(max_size=12), scalar, min_size=1, max_size=5)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, records: list[dict[str, Any]]) -> bytes:
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for each in records:
        journal.append(each)
    journal.close()
    return path.read_bytes()


def plain(value: Any) -> Any:
    """As the journal spells it."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


@quick
@given(records=st.lists(record, max_size=6))
def test_what_is_appended_is_read_back(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "j.jsonl"
    size = len(written(path, records))
    assert read_journal(path) == ([{k: plain(v) for k, v in r.items()} for r in records], size)


@quick
@given(records=st.lists(record, min_size=1, max_size=5), data=st.data())
def test_a_file_cut_anywhere_gives_its_whole_lines_and_the_rest_later(
    tmp_path: Path, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path / "j.jsonl"
    whole = written(path, records)
    expected, _ = read_journal(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    before, offset = read_journal(path)
    assert before == expected[: whole[:cut].count(b"\n")]
    path.write_bytes(whole)
    after, end = read_journal(path, offset)
    assert (before + after, end) == (expected, len(whole))


@quick
@given(records=st.lists(record, min_size=1, max_size=5), data=st.data())
def test_a_writer_that_comes_back_to_a_cut_file_loses_the_torn_line_only(
    tmp_path: Path, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path / "j.jsonl"
    whole = written(path, records)
    expected, _ = read_journal(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    journal = Journal(path)
    journal.append({"step": 1})
    journal.close()
    assert read_journal(path)[0] == [*expected[: whole[:cut].count(b"\n")], {"step": 1}]


@quick
@given(junk=st.binary(max_size=60))
def test_foreign_bytes_are_passed_over(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "j.jsonl"
    good = json.dumps({"step": 7}).encode()
    path.write_bytes(junk + b"\n" + good + b"\n")
    records, end = read_journal(path)
    assert records[-1] == {"step": 7}
    assert end == len(junk) + len(good) + 2
    assert last_record(path) == {"step": 7}


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == ([], 0)
    assert last_record(tmp_path / "none") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_does_not_know_is_written_as_text(tmp_path: Path, value: float) -> None:
    line = written(tmp_path / "j.jsonl", [{"step": 1, "train/loss": value}]).decode()
    assert json.loads(line, parse_constant=pytest.fail)["train/loss"] == repr(value)
