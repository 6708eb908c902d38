"""Add a row to the table of dated results in benchmarks/README.md: what was measured, when, of which commit, on what.

    python -m benchmarks.record "FlowAR-L on one H100: training, bf16, compiled, batch 64" "240 images/s"

The date, the commit and the machine are read, not given, so run it right after the measurement and on that machine.
"""

import argparse
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from flowar.base.errors import UserError
from flowar.base.files import GIB, write_text

ROOT = Path(__file__).parents[1]
TABLE_FILE = "benchmarks/README.md"
HEADER = "| date | commit | what | figure | hardware |"


def record_result(root: Path, what: str, figure: str) -> str:
    """Add a row to the table in a checkout; return the row.

    Args:
        root: of the checkout whose code was measured.
        what: was measured.
        figure: with its unit.

    Raises:
        UserError: if it isn't known which commit was measured, or there is no table.
    """
    commit = measured_commit(root)
    row = table_row([f"{datetime.now(UTC):%Y-%m-%d}", commit, what, figure, describe_hardware()])
    file = root / TABLE_FILE
    lines = file.read_text().split("\n")
    if lines.count(HEADER) != 1:
        raise UserError(f"{file} has {lines.count(HEADER)} tables of results, needs one; it begins with {HEADER}")
    last = lines.index(HEADER)
    while lines[last + 1].startswith("|"):
        last += 1
    write_text(file, "\n".join([*lines[: last + 1], row, *lines[last + 1 :]]))
    return row


def measured_commit(root: Path) -> str:
    """Return the commit of a checkout in which nothing was changed since; the table of results may have new rows.

    Raises:
        UserError: if something was changed, or there is no commit.
    """
    changed = _git(root, "status", "--porcelain", "--", ".", f":!{TABLE_FILE}").splitlines()
    if changed:
        raise UserError(
            f"{root} has {len(changed)} changed or new files, first {changed[0][3:]}: no commit has the code that was "
            "measured; commit them, measure that commit, then record it"
        )
    return _git(root, "rev-parse", "--short", "HEAD").strip()


def _git(root: Path, *words: str) -> str:
    answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"{root} must be a git checkout with a commit: {answer.stderr.strip()}")
    return answer.stdout


def table_row(cells: list[str]) -> str:
    """Return a row of a Markdown table.

    Raises:
        UserError: if a cell is empty or has more than one line.
    """
    for cell in cells:
        if not cell.strip() or "\n" in cell:
            raise UserError(f"{cell!r} must be one line of text; give WHAT and FIGURE as two words, each in quotes")
    escaped = [cell.strip().replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def describe_hardware() -> str:
    """Return what this machine has: its GPUs, else the CPU cores that this process may use; memory and torch."""
    memory = f"{psutil.virtual_memory().total / GIB:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return f"{counted}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu_model()}, {memory}, torch {torch.__version__}"


def cpu_model() -> str:
    """Return the name of the CPU as Linux gives it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", file.read_text(), re.M) if file.exists() else None
    return found[1].strip() if found else os.uname().machine


def main(words: list[str] | None = None) -> None:
    """Add the row and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", help='what was measured, for example "FlowAR-L on one H100: sampling, bf16, batch 64"')
    parser.add_argument("figure", help='with its unit, for example "12.3 images/s"')
    options = parser.parse_args(words)
    try:
        print(record_result(ROOT, options.what, options.figure))
    except UserError as error:
        sys.exit(f"benchmarks.record: {error}")


if __name__ == "__main__":
    main()
