"""`flowar watch`: one page that follows a training run, until the run is finished. Needs no torch.

The training doesn't know of it: everything is read from the run's folder, so that it may run on another machine that
sees the folder. Read next: training/run_view.py for what is read, training/watch_page.py for the page.
"""

import time
from pathlib import Path

from flowar.base.errors import UserError
from flowar.config.watching import WatchConfig
from flowar.training.run_state import FINISHED, is_run
from flowar.training.run_view import view_run
from flowar.training.watch_page import write_watch_page

WATCH_FILE = "watch.html"


def main(config: WatchConfig, dry_run: bool = False) -> None:
    """Write the page; again every `every_s` seconds, until the run is finished or Ctrl-C."""
    run_dir = Path(config.run_dir)
    file = Path(config.file) if config.file is not None else run_dir / WATCH_FILE
    if not is_run(run_dir):
        raise UserError(f"run_dir={run_dir} is not the folder of a training run; start `flowar train` there first")
    if not file.parent.is_dir():
        raise UserError(f"file={file}: the folder {file.parent} does not exist; make it, or give another file")
    if dry_run:
        print(f"would write {file}")
        return
    is_finished, is_over = write_once(config, run_dir, file, was_finished=False)
    print(f"open {file.resolve()}", flush=True)
    while not (is_over or config.once):
        time.sleep(config.every_s)
        try:
            is_finished, is_over = write_once(config, run_dir, file, was_finished=is_finished)
        except UserError as error:  # of a moment, or of one file: the page stays as it was
            print(f"not updated: {error}", flush=True)
    if is_finished:
        print(f"{run_dir} is trained to its end")


def write_once(config: WatchConfig, run_dir: Path, file: Path, *, was_finished: bool) -> tuple[bool, bool]:
    """Look at the run and write the page; return whether the run is finished, and whether nothing more will come.

    The last preview is drawn after the last checkpoint: a finished run without it is looked at once more.

    Args:
        config: of the command.
        run_dir: of the run.
        file: the page.
        was_finished: at the last look.

    Raises:
        UserError: if a file of the run is damaged or can't be read, or the page can't be written.
    """
    try:
        view = view_run(run_dir)
    except OSError as error:
        raise UserError(
            f"can't read {error.filename}: {error.strerror or error}; check its storage and its permissions"
        ) from error
    is_finished = view.trainer.state == FINISHED
    has_last_preview = view.newest is not None and view.newest.step == view.num_steps
    is_over = is_finished and (was_finished or has_last_preview)
    try:
        write_watch_page(file, view, None if is_over or config.once else config.every_s)
    except OSError as error:
        raise UserError(
            f"can't write {file}: {error.strerror or error}; free some space, or give another file"
        ) from error
    return is_finished, is_over
