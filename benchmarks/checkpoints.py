"""The cost of hashing checkpoints: saving and loading with ours and with torch's own writer and reader, as ratios.

Run `python -m benchmarks.checkpoints`.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from flowar.base.files import GIB, publish_folder
from flowar.base.run_folder import STATE_FILE
from flowar.models.checkpoint_files import HashingWriter, write_checksums
from flowar.models.folders import load_state

TENSORS = 100


def make_state(num_bytes: int) -> dict[str, Tensor]:
    """Return random tensors.

    Args:
        num_bytes: of all tensors together.
    """
    return {f"model.{number}": torch.randn(num_bytes // 4 // TENSORS) for number in range(TENSORS)}


def finish(saving: object) -> None:
    """Wait until a background save is done."""
    assert isinstance(saving, Future)
    saving.result()


def save_plain(state: dict[str, Tensor], hidden: Path) -> None:
    """Save with torch's own writer."""
    finish(dcp.async_save(state, checkpoint_id=hidden, no_dist=True))


def save_hashed(state: dict[str, Tensor], hidden: Path) -> None:
    """Save as training does."""
    finish(dcp.async_save(state, storage_writer=HashingWriter(hidden), no_dist=True))
    (hidden / STATE_FILE).write_text('{"checksums": true}')
    write_checksums(hidden)


def load_plain(state: dict[str, Tensor], folder: Path) -> None:
    """Load with torch's own reader."""
    dcp.load(state, checkpoint_id=folder, no_dist=True)


def time_load(load: Callable[..., None], folder: Path, num_bytes: int) -> float:
    """Return the seconds that loading takes in a process that hasn't loaded anything before."""
    state = make_state(num_bytes)
    began = time.perf_counter()
    load(state, folder)
    return time.perf_counter() - began


def measure(state: dict[str, Tensor], save: Callable[..., None], load: Callable[..., None], root: Path) -> list[float]:
    """Return the seconds to save, until the checkpoint has its final name, and to load in a fresh process."""
    hidden, folder = root / ".checkpoint", root / "checkpoint"
    hidden.mkdir()
    began = time.perf_counter()
    save(state, hidden)
    publish_folder(hidden, folder)
    saved = time.perf_counter() - began
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        loaded = fresh.submit(time_load, load, folder, num_bytes).result()
    shutil.rmtree(folder)
    return [saved, loaded]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    state = make_state(round(options.gib * GIB))
    ours, torchs = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        for number in range(1 + options.rounds):  # the first warms up
            plain = measure(state, save_plain, load_plain, Path(root))
            hashed = measure(state, save_hashed, load_state, Path(root))
            if number:
                torchs.append(plain)
                ours.append(hashed)
    for place, what in enumerate(("save", "load")):
        mine, theirs = [times[place] for times in ours], [times[place] for times in torchs]
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        print(
            f"{what}: flowar {statistics.median(mine):.2f} s, torch {statistics.median(theirs):.2f} s; median of the "
            f"rounds' ratios {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
