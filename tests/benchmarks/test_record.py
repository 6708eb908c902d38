"""The table of dated results, and the script that adds to it."""

import itertools
import re
import subprocess
from datetime import UTC, datetime

import pytest

from benchmarks import record
from flowar.base.errors import UserError
from tests.conftest import ROOT

TABLE = f"""# Benchmarks

{record.HEADER}
|---|---|---|---|---|
| 2026-01-01 | abcdef0 | something | 1 s | a machine |

## After
"""


def git(root, *words):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(root), *settings, *words], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path):
    """A repository with a table of results and one commit."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / record.TABLE_FILE).write_text(TABLE)
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "Begin")
    return tmp_path


def test_rows_are_added_at_the_end_with_date_commit_and_machine(checkout):
    commit = git(checkout, "rev-parse", "--short", "HEAD").strip()
    for figure in ("3 a|b", "4 s"):  # the second one beside a table that has changed already
        row = record.record_result(checkout, "a thing", figure)
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        assert row.startswith(f"| {day} | {commit} | a thing | {figure.replace('|', chr(92) + '|')} | ")
    lines = (checkout / record.TABLE_FILE).read_text().split("\n")
    before = TABLE.split("\n")
    assert lines[:5] == before[:5] and lines[7:] == before[5:]
    assert all("torch " in line for line in lines[5:7])


def test_a_dirty_tree_is_refused(checkout):
    for file in ("code.py", "new.py"):
        (checkout / file).write_text("x = 2\n")
        with pytest.raises(UserError, match=f"1 changed or new files, first {file}: no commit has the code that was"):
            record.record_result(checkout, "a thing", "3 s")
        git(checkout, "add", ".")
        git(checkout, "commit", "-q", "-m", "Change")
    assert (checkout / record.TABLE_FILE).read_text() == TABLE


def test_what_is_no_row_or_no_table_is_refused(checkout, tmp_path):
    for what, figure in (("", "3 s"), ("a\nb", "3 s"), ("a", " ")):
        with pytest.raises(UserError, match="must be one line of text; give WHAT and FIGURE as two words"):
            record.record_result(checkout, what, figure)
    (checkout / record.TABLE_FILE).write_text("no table\n")
    with pytest.raises(UserError, match="has 0 tables of results, needs one; it begins with"):
        record.record_result(checkout, "a thing", "3 s")
    with pytest.raises(UserError, match="must be a git checkout with a commit"):
        record.measured_commit(tmp_path.parent)


def test_the_table_is_in_order_and_names_a_commit_in_each_row():
    lines = (ROOT / record.TABLE_FILE).read_text().split("\n")
    start = lines.index(record.HEADER) + 2
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    assert len(rows) >= 2
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert all(len(row) == 5 and all(row) for row in cells)
    days = [row[0] for row in cells]
    assert days == sorted(days) and all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in days)
    assert all(re.fullmatch(r"[0-9a-f]{7,12}", row[1]) for row in cells)
