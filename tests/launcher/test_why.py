"""From logs to causes: real texts, kept with where they are from, and the failures of real processes."""

import json
from pathlib import Path

import pytest

from launcher import why

TEXTS = sorted((Path(__file__).parent / "why").glob("*.txt"))


def read(path):
    """The header of a kept text, its log and its job's log."""
    head, _, rest = path.read_text().partition("-- ")
    told = dict(line.split(": ", 1) for line in head.splitlines())
    parts = dict(part.split("\n", 1) for part in ("-- " + rest).split("-- ")[1:]) if rest else {}
    return told, parts.get("log", ""), parts.get("job log", "")


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_a_kept_text_is_read_as_what_it_is(path):
    told, log, job_log = read(path)
    record = json.loads(told.get("record", '{"cause": "failed", "exit": 1}'))
    processes = int(told["processes"]) if "processes" in told else None
    found = why.of_text(log, record, job_log, data_path=told.get("data_path"), processes=processes)
    assert found.kind == told["kind"], found
    expected = json.loads(told.get("where", "{}"))
    assert {key: found.where.get(key) for key in expected} == expected
    assert found.said
    assert found.said.isprintable()


def test_every_kept_text_has_a_source_and_every_cause_a_text():
    told = [read(path)[0] for path in TEXTS]
    assert all(each.get("source") for each in told)
    assert {each["kind"] for each in told} == set(why.KINDS)


BUG = """\
{rank}Traceback (most recent call last):
{rank}  File "/scratch/{user}/runs/capsules/{capsule}/workers/main_lmim.py", line {line}, in main
{rank}    loss = model(batch)
{rank}  File "/home/{user}/env/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1751, in _call_impl
{rank}    return forward_call(*args, **kwargs)
{rank}{error}
"""
ONE = {
    "rank": "",
    "user": "ada",
    "capsule": "0f1e2d3c4b5a6978",
    "line": 88,
    "error": "ValueError: 3 at 0x7f00 of /a/b/c.jpg",
}
SAME = [
    {"line": 91},
    {"user": "grace", "capsule": "ffffffffffffffff"},
    {"rank": "[rank1]: "},
    {"error": "ValueError: 12.5e-3 at 0x7fab of /z/c.jpg"},
]
OTHER = [{"error": "KeyError: 3 at 0x7f00 of /a/b/c.jpg"}, {"error": "ValueError: 3 before 0x7f00 of /a/b/c.jpg"}]


@pytest.mark.parametrize(("changes", "same"), [*((c, True) for c in SAME), *((c, False) for c in OTHER)])
def test_a_bug_has_one_mark_whatever_the_seed_the_rank_the_user_and_the_capsule(changes, same):
    ended = {"cause": "failed", "exit": 1}
    first, second = (why.of_text(BUG.format(**ONE | more), ended) for more in ({}, changes))
    assert first.kind == second.kind == why.BUG
    assert (first.mark == second.mark) == same


def test_mixed_lines_of_two_ranks_have_the_mark_of_one():
    ended = {"cause": "failed", "exit": 1}
    lines = BUG.format(**ONE).splitlines()
    mixed = "\n".join([lines[0], lines[1], lines[0], *[line for line in lines[2:] for _ in range(2)]])
    assert why.of_text(mixed, ended).mark == why.of_text("\n".join(lines), ended).mark


@pytest.mark.parametrize(
    "text", ["", "\x00\xff" * 9, "Traceback (most recent call last):\n" * 99, "a" * 99999, "\x1b[31mred"]
)
def test_whatever_a_log_holds_there_is_an_answer(text):
    for record in (None, {}, {"cause": "failed"}, {"cause": "killed", "signal": 99}, {"event": "start", "job": "1_2"}):
        assert why.of_text(text, record, text).said.isprintable()
