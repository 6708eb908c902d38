import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowar.base.files import create_whole, write_text, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def fail(hidden):
        hidden.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def refuse_links(path, target):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_that_create_a_file_at_once_one_does_and_it_is_whole(tmp_path, monkeypatch, has_links):
    if not has_links:  # such a file system can't be had here
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    barrier = threading.Barrier(8)

    def create(number):
        barrier.wait()
        return create_whole(tmp_path / "a", lambda hidden: hidden.write_text(f"{number}" * 1000))

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    assert sum(created) == 1
    assert (tmp_path / "a").read_text() == f"{created.index(True)}" * 1000
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
