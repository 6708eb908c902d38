import signal
import sys

import pytest

from tests.processes import PRELOADED, draw_deaths, join, run_with_deaths, start


def print_missing_modules():
    print([name for name in PRELOADED if name not in sys.modules])


def write_down(folder, count):
    """Write so many files, unless they are there."""
    for number in range(count):
        if not (folder / str(number)).exists():
            (folder / str(number)).write_text("done")


@pytest.mark.slow
def test_a_process_begins_with_everything_imported(tmp_path):
    join([start(print_missing_modules, log=tmp_path / "log")], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "[]\n"


@pytest.mark.slow
def test_every_death_is_died_before_the_work_is_done(tmp_path):
    deaths = draw_deaths(6, 10, tmp_path / "work", signals=(signal.SIGKILL,))
    (tmp_path / "work").mkdir()
    run_with_deaths(write_down, tmp_path / "work", 60, num_workers=3, deaths=deaths, log=tmp_path / "log")
    assert len(list((tmp_path / "work").iterdir())) == 60
    with pytest.raises(AssertionError, match="but exit code 0"):
        run_with_deaths(write_down, tmp_path / "work", 60, num_workers=1, deaths=deaths[:1], log=tmp_path / "log")
