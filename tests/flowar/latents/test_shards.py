import errno
import json
import os
import shutil

import numpy as np
import pytest

from flowar.base.errors import UserError
from flowar.base.failures import StorageError
from flowar.base.records import write_record
from flowar.config.data import DataConfig
from flowar.latents.shards import LatentShards
from tests.conftest import flip_bit, upload

SHARD = "00001/shard.00000.mds"  # rows 20 to 39


def open_shards(path, **settings):
    return LatentShards(DataConfig(path=str(path), **settings))


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def test_rows_are_those_that_mosaicml_streaming_reads(shards):
    from streaming import StreamingDataset

    theirs = StreamingDataset(local=str(shards), batch_size=1)
    order = np.random.default_rng(0).permutation(48)
    ours = open_shards(shards).read(order)
    for row, number in zip(ours, order, strict=True):
        assert np.array_equal(row["moments"], theirs[int(number)]["moments"])
        assert row["label"] == theirs[int(number)]["label"]


@pytest.mark.parametrize("place", [-1, -200], ids=["a moment", "another moment"])
def test_a_flipped_bit_is_an_error_when_its_row_is_read(copied, place):
    flip_bit(copied / SHARD, place)
    shards = open_shards(copied)
    shards.read(range(39))
    with pytest.raises(UserError, match=rf"row 39 in shard {SHARD} of data.path=.* is damaged; `flowar check"):
        shards.read([3, 39])


def test_a_changed_label_is_an_error(copied):
    shards = open_shards(copied)
    flip_bit(copied / SHARD, 8 - shards.dtype.itemsize)  # of the last row, after its checksum
    with pytest.raises(UserError, match="row 39 in shard .* is damaged"):
        shards.read([39])


def test_a_shard_that_vanishes_or_shrinks_while_reading_is_an_error_with_its_name(copied):
    shards = open_shards(copied)
    shards.read([0])
    (copied / SHARD).unlink()
    with pytest.raises(UserError, match=rf"can't read shard {SHARD} of data.path=.*No such file"):
        shards.read([0, 20])
    (copied / "00002/shard.00000.mds").write_bytes(b"short")
    with pytest.raises(UserError, match=r"row 47 in shard 00002/shard.00000.mds .* is damaged"):
        shards.read([47])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARD).unlink(), rf"shard {SHARD} of data.path=.* is missing, index.json says"),
        (lambda folder: (folder / SHARD).write_bytes(b"short"), rf"shard {SHARD} .* has 5 bytes, index.json says"),
        (lambda folder: (folder / "index.json").write_text("{"), "has no readable index.json"),
        (lambda folder: (folder / "index.json").write_text("[]"), "has no readable index.json"),
        (lambda folder: (folder / "index.json").unlink(), "has no readable index.json"),
    ],
)
def test_damage_is_found_at_the_start(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message):
        open_shards(copied)


def test_remote_shards_are_fetched_when_they_are_needed_and_once(bucket, shards, tmp_path):
    remote = open_shards(upload(bucket, shards, "good"), cache=str(tmp_path))
    needed = open_shards(shards).read(range(48))
    assert np.array_equal(remote.read([45, 0]), needed[[45, 0]])
    assert sorted(str(file.relative_to(remote.folder)) for file in remote.folder.rglob("*.mds")) == [
        "00000/shard.00000.mds",
        "00002/shard.00000.mds",
    ]
    assert np.array_equal(remote.read(range(48)), needed)
    bucket.delete_object(Bucket="data", Key=f"good/{SHARD}")
    again = open_shards("s3://data/good", cache=str(tmp_path))
    assert again.folder == remote.folder
    assert np.array_equal(again.read(range(48)), needed)


def test_another_dataset_at_the_same_address_gets_a_cache_of_its_own(bucket, copied, tmp_path):
    first = open_shards(upload(bucket, copied, "changing"), cache=str(tmp_path / "cache"))
    passport = copied / "dataset.json"
    write_record(passport, json.loads(passport.read_text()) | {"seed": 1})
    upload(bucket, copied, "changing")
    assert open_shards("s3://data/changing", cache=str(tmp_path / "cache")).folder != first.folder


def test_missing_and_damaged_remote_shards_are_errors_with_their_name(bucket, copied, tmp_path):
    flip_bit(copied / SHARD, -1)
    path = upload(bucket, copied, "damaged")
    bucket.delete_object(Bucket="data", Key="damaged/00002/shard.00000.mds")
    remote = open_shards(path, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=rf"shard {SHARD} of data.path=s3://.* does not have the xxh64 of its dataset"):
        remote.read([20])
    with pytest.raises(UserError, match=r"can't fetch s3://data/damaged/00002/shard.00000.mds: "):
        remote.read([40])
    assert not list(remote.folder.rglob(".*.mds*"))
    with pytest.raises(UserError, match=r"can't fetch s3://data/none/dataset.json: "):
        open_shards("s3://data/none", cache=str(tmp_path / "cache"))


def test_an_unknown_kind_of_address_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"can't fetch ftp://somewhere/dataset.json: Unsupported remote path"):
        open_shards("ftp://somewhere", cache=str(tmp_path))


def test_storage_that_fails_for_a_while_is_tried_again_and_for_too_long_is_named(shards, monkeypatch):
    opened, left, waits, read = LatentShards(DataConfig(path=str(shards), patience_s=5.5)), [2], [], os.preadv

    def fail_at_first(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(*arguments)

    needed = opened.read([3])
    monkeypatch.setattr("flowar.latents.shards.os.preadv", fail_at_first)
    monkeypatch.setattr("flowar.latents.shards.time.sleep", waits.append)
    assert opened.read([3]) == needed and waits == [1, 2]
    left[0] = 100
    with pytest.raises(StorageError, match=r"shard .*: .*Stale file handle, for 0 s .data.patience_s=5.5"):
        opened.read([3])
    assert waits == [1, 2, 1, 2, 3, 4, 5]
    monkeypatch.setattr("flowar.latents.shards.os.preadv", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(UserError, match="can't read shard .*no") as refused:
        opened.read([3])
    assert not isinstance(refused.value, StorageError)
