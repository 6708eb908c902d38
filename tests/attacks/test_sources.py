"""Sources and half-made datasets that change under `flowar prepare`: refused by name, or the same in the end."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from data_prep import check
from data_prep.encode import main as prepare
from data_prep.sources import open_source
from flowar.base.errors import UserError
from flowar.base.leases import GIVEN_UP
from flowar.base.records import write_record
from flowar.config.data import CheckConfig
from flowar.latents.schema import read_passport
from tests.conftest import MORE, flip_bit
from tests.data_prep.test_encode import contents, preparing
from tests.data_prep.test_sources import images_of, write_parquet, write_tars
from tests.processes import Death, join, start, wait_until

CHUNK_IMAGES = 6  # four chunks of the fixture's 24 images


def write_source(kind, root, images, folder):
    if kind == "tars":
        write_tars(root, images, per_tar=12)
    elif kind == "parquet":
        write_parquet(root, images)
    else:
        shutil.copytree(folder, root)


def chunked(source, out):
    return preparing(source, out, chunk_images=CHUNK_IMAGES)


def stopped_at(chunk, out, signal_=signal.SIGKILL):
    """The end of a worker, or its sleep, when it begins to write a chunk."""
    return Death(1, f"{out}.partial/.{chunk:05d}", signal=signal_)


@pytest.fixture(scope="module")
def killed(image_folder, tmp_path_factory):
    """For each kind of source: a folder with it, and what a worker left that was killed after two of four chunks."""
    root, images = tmp_path_factory.mktemp("killed"), images_of(image_folder)
    workers = []
    for kind in ("tars", "parquet", "folder"):
        (root / kind).mkdir()
        write_source(kind, root / kind / "source", images, image_folder)
        with contextlib.chdir(root / kind):
            config = chunked("source", "out")
            workers.append(start(prepare, config, log=root / "log", death=stopped_at(2, "out")))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 3, (root / "log").read_text()
    return root


@pytest.fixture
def resume(killed, tmp_path, monkeypatch):
    """Goes to a copy of what was left (with the times of its files), and returns the command that resumes there."""

    def go(kind):
        shutil.copytree(killed / kind, tmp_path / kind)
        monkeypatch.chdir(tmp_path / kind)
        return lambda: prepare(chunked("source", "out"))

    return go


@pytest.fixture(scope="module")
def undisturbed(killed, tmp_path_factory):
    """What each kind of source gives."""
    found = {}
    for kind in ("tars", "parquet", "folder"):
        with contextlib.chdir(killed / kind):
            target = tmp_path_factory.mktemp(kind) / "out"
            prepare(chunked("source", target))
            found[kind] = contents(target)
    return found


def reverse_tar(name):
    """Write a tar again with its images in another order: the same names, the same size."""
    with tarfile.open(name) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    pairs = [members[place : place + 2] for place in range(0, len(members), 2)]
    with tarfile.open(name, "w") as archive:
        for pair in reversed(pairs):
            for member, content in pair:
                archive.addfile(member, io.BytesIO(content))


def reverse_parquet():
    images = images_of("source")
    write_parquet(Path("source"), images[::-1])


def make_pipe(name):
    Path(name).unlink()
    os.mkfifo(name)


def copy_again(name):
    """Put a copy with the same times into a file's place."""
    shutil.copy2(name, f"{name}.copy")
    Path(f"{name}.copy").replace(name)


FIRST, LAST = "source/train-00000.tar", "source/train-00012.tar"
CHANGED_FILES = {
    "the unread tar in another order": ("tars", lambda: reverse_tar(LAST), LAST),
    "the tar that was read in another order": ("tars", lambda: reverse_tar(FIRST), FIRST),
    "a truncated tar": ("tars", lambda: os.truncate(LAST, 5000), LAST),
    "a removed tar": ("tars", lambda: Path(LAST).unlink(), LAST),
    "a tar that is a pipe": ("tars", lambda: make_pipe(LAST), LAST),
    "a tar of another time": ("tars", lambda: os.utime(LAST), LAST),
    "a parquet in another order": ("parquet", reverse_parquet, "source/train-00000.parquet"),
    "a truncated parquet": (
        "parquet",
        lambda: os.truncate("source/train-00000.parquet", 900),
        "source/train-00000.parquet",
    ),
}


@pytest.mark.parametrize("attack", CHANGED_FILES)
def test_a_changed_tar_or_parquet_is_named_when_the_work_is_resumed(resume, attack):
    kind, change, name = CHANGED_FILES[attack]
    again = resume(kind)
    change()
    with pytest.raises(UserError, match=rf"{name}.*remove out.partial \(its 2 finished chunks are encoded again\)"):
        again()
    assert not Path("out").exists()


def test_the_advice_about_a_changed_tar_works(resume):
    again = resume("tars")
    reverse_tar(LAST)
    with pytest.raises(UserError) as caught:
        again()
    follow(caught.value)
    again()
    check.main(CheckConfig(path="out", images="source", num_images=24))


def follow(advice):
    """Remove what an error says is to be removed."""
    shutil.rmtree(
        re.search(r"remove (\S+) (\(|and run)|(\S+) belongs to no chunk .* remove it", str(advice)).expand(r"\1\3")
    )


@pytest.mark.parametrize(("kind", "name"), [("tars", LAST), ("folder", "source/dark/0.png")])
def test_a_copy_that_keeps_the_times_is_the_same_source(resume, undisturbed, kind, name):
    again = resume(kind)
    copy_again(name)
    again()
    assert contents(Path("out")) == undisturbed[kind]


@pytest.mark.parametrize(
    ("chunk", "name"),
    [
        pytest.param(2, LAST, id="seen when it is read", marks=MORE),
        pytest.param(3, FIRST, id="seen before the dataset is finished"),
    ],
)
def test_a_tar_that_changes_while_a_worker_runs_is_named(resume, chunk, name):
    """The worker sleeps before that chunk; of the first tar it needs nothing any more then."""
    resume("tars")
    log = Path("log").absolute()
    worker = start(prepare, chunked("source", "out"), log=log, death=stopped_at(chunk, "out", signal.SIGSTOP))
    wait_until(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED, [worker], log)
    reverse_tar(name)
    os.kill(worker.pid, signal.SIGCONT)
    join([worker], log, code=1)
    assert f"{name} was changed while the dataset was made" in log.read_text()
    assert not Path("out").exists()


def repaint(name, value=7):
    Image.new("RGB", (40, 40), (value, value, value)).save(f"source/{name}")


# Chunk 0 and 1 are the dark images, 2 and 3 the light ones.
CHANGED_IMAGES = {
    "an image that was read is another": (lambda: repaint("dark/0.png"), "source/dark/0.png was changed"),
    "two images that were read are swapped": (
        lambda: (
            Path("source/dark/0.png").rename("source/x"),
            Path("source/dark/11.png").rename("source/dark/0.png"),
            Path("source/x").rename("source/dark/11.png"),
        ),
        "source/dark/(0|11).png was changed",
    ),
    "an image that was read is removed": (
        lambda: Path("source/dark/0.png").unlink(),
        "dark/0.png in source was removed",
    ),
    "an unread image is removed": (lambda: Path("source/light/0.png").unlink(), "light/0.png in source was removed"),
    "an unread image is a pipe": (lambda: make_pipe("source/light/0.png"), "light/0.png is not a regular file"),
    "a class is away": (lambda: Path("source/light").rename("away"), r"cannot read light/\d+.png.* storage is mounted"),
    "the source is away": (lambda: Path("source").rename("away"), "source does not exist|storage is mounted"),
}


@pytest.mark.parametrize("attack", CHANGED_IMAGES)
def test_a_changed_image_is_named_when_the_work_is_resumed(resume, attack):
    again = resume("folder")
    change, message = CHANGED_IMAGES[attack]
    change()
    with pytest.raises(UserError, match=message):
        again()
    assert not Path("out").exists()


def test_only_the_chunk_of_a_changed_image_is_encoded_again(resume, capsys):
    again = resume("folder")
    repaint("dark/0.png")
    repaint("light/9.png", 200)  # not read yet: it is what it is
    with pytest.raises(UserError, match=r"remove out.partial/00000 and run the same command again") as caught:
        again()
    capsys.readouterr()
    follow(caught.value)
    again()
    assert re.findall(r"chunk (\d+) done", capsys.readouterr().out) == ["0"]
    prepare(chunked("source", "fresh"))
    assert read_passport("out").shard_hashes == read_passport("fresh").shard_hashes


def test_an_image_that_was_read_and_removed_can_be_left_out_too(resume):
    again = resume("folder")
    Path("source/dark/0.png").unlink()
    with pytest.raises(UserError, match="remove out.partial/00000 and run .* skip_unreadable=true") as caught:
        again()
    follow(caught.value)
    prepare(preparing("source", "out", chunk_images=CHUNK_IMAGES, skip_unreadable=True))
    assert list(read_passport("out").skipped.values()) == ["dark/0.png (removed after it was listed)"]


@pytest.mark.parametrize("state", ["listing", "given up"])
def test_a_worker_that_is_interrupted_leaves_alone_what_another_one_needs_that_lists_the_images(
    image_folder, tmp_path, monkeypatch, state
):
    claim, partial = tmp_path / "out.claims" / "plan.0", tmp_path / "out.partial"
    claim.parent.mkdir()
    partial.mkdir()
    owner = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "started": "0.000", "beat": "000000001"}
    claim.write_text(json.dumps(owner))

    def interrupt(_):
        if state == "given up":
            claim.write_text(GIVEN_UP)
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.plan.time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(preparing(image_folder, tmp_path / "out"))
    assert claim.exists() == partial.exists() == (state == "listing")


def path_of(name):
    return Path("out.partial", name)


def edit_record(name, **values):
    """Change a record without its hash, as an editor does."""
    path_of(name).write_text(json.dumps(json.loads(path_of(name).read_text()) | values))


def forge_record(name, **values):
    """Change a record and its hash."""
    write_record(path_of(name), json.loads(path_of(name).read_text()) | values)


def swap(one, other):
    path_of(one).rename(path_of("swap"))
    path_of(other).rename(path_of(one))
    path_of("swap").rename(path_of(other))


def cut(name):
    os.truncate(path_of(name), path_of(name).stat().st_size // 2)


def relabel_listing():
    source = open_source("source")
    source.labels.reverse()
    source.save(path_of("listing.json.gz"))


DAMAGED_WORK = {
    "half a chunk's record": lambda: cut("00001/chunk.json"),
    "an empty chunk's record": lambda: os.truncate(path_of("00001/chunk.json"), 0),
    "no chunk's record": lambda: path_of("00001/chunk.json").unlink(),
    "a list as a chunk's record": lambda: path_of("00001/chunk.json").write_text("[]"),
    "an edited count": lambda: edit_record("00001/chunk.json", class_counts={"0": 600}),
    "an edited statistic": lambda: edit_record("00001/chunk.json", statistics={}),
    "swapped chunks": lambda: swap("00000", "00001"),
    "swapped records": lambda: swap("00000/chunk.json", "00001/chunk.json"),
    "swapped indexes": lambda: swap("00000/index.json", "00001/index.json"),
    "a chunk of another plan": lambda: forge_record("00001/chunk.json", plan="0" * 16),
    "half an index": lambda: cut("00001/index.json"),
    "no index": lambda: path_of("00001/index.json").unlink(),
    "a truncated shard": lambda: cut("00001/shard.00000.mds"),
    "no shard": lambda: path_of("00001/shard.00000.mds").unlink(),
    "a chunk too many": lambda: shutil.copytree(path_of("00001"), path_of("00099")),
    "half a plan": lambda: cut("plan.json"),
    "an edited plan": lambda: edit_record("plan.json", listing_sha256="0" * 64),
    "no plan": lambda: path_of("plan.json").unlink(),
    "a plan of version 0.1": lambda: path_of("plan.json").write_text('{"crop": "center"}'),
    "a bit of the listing": lambda: flip_bit(path_of("listing.json.gz"), 60),
    "half a listing": lambda: cut("listing.json.gz"),
    "no listing": lambda: path_of("listing.json.gz").unlink(),
    "a listing with other labels": relabel_listing,
}


SIBLINGS = (
    "an empty chunk's record",
    "a list as a chunk's record",
    "an edited statistic",
    "swapped indexes",
    "half an index",
    "no shard",
    "an edited plan",
    "half a listing",
)


@pytest.mark.parametrize(
    "attack", [pytest.param(attack, marks=MORE if attack in SIBLINGS else ()) for attack in DAMAGED_WORK]
)
def test_damaged_work_is_named_and_the_advice_works(resume, undisturbed, attack):
    again = resume("folder")
    DAMAGED_WORK[attack]()
    for _ in range(2):  # swapped chunks are named one after the other
        with pytest.raises(UserError, match=r"out\.partial") as caught:
            again()
        assert not Path("out").exists()
        follow(caught.value)
        if "swapped" not in attack:
            break
    again()
    assert contents(Path("out")) == undisturbed["folder"]
