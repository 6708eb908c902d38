import resource
import stat
from pathlib import Path

import pytest
import torch

from flowar.base.distributed import start_world, stop_world, wait_for_all
from tests import processes


def count_sockets(folder):
    """Start the world under a low limit of open files, and note how many sockets that took and the limit then."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    before = _sockets()
    world = start_world(torch.device("cpu"), with_group=True)
    sockets, limit = _sockets() - before, resource.getrlimit(resource.RLIMIT_NOFILE)
    (folder / str(world.rank)).write_text(f"{sockets} {limit[0]} {limit[1]}")
    wait_for_all()
    stop_world()


def _sockets():
    return sum(file.exists() and stat.S_ISSOCK(file.stat().st_mode) for file in list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
def test_ranks_connect_when_they_talk_and_not_each_with_each(tmp_path):
    """Each with each, in both groups, are 14 among 8 ranks, and 1,022 among 512: many machines allow 1,024 files."""
    processes.run_ranks(count_sockets, tmp_path, world_size=8, log=tmp_path / "log")
    for rank in range(8):
        sockets, soft, hard = (tmp_path / str(rank)).read_text().split()
        assert int(sockets) < (14 if rank else 14 + 8) and soft == hard  # rank 0 keeps the store, to which all connect
