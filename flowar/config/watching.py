"""Settings of `flowar watch`: a page that follows a training run."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from flowar.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """A training run's folder -> one page, written again and again until the run is finished."""

    run_dir: str = MISSING  # of the run
    file: str | None = None  # the page to write, FILE.html; None: RUN_DIR/watch.html
    every_s: float = 30  # between two looks; an open page loads itself again as often
    once: bool = False  # write the page once and end; also written --once

    def __post_init__(self) -> None:
        if self.every_s < 1:
            raise UserError(f"every_s={self.every_s:g} must be at least 1")
        if self.file is not None and Path(self.file).suffix != ".html":
            raise UserError(f"file={self.file} must end in .html, as what is there is written over")
