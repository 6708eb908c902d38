"""Datasets that were damaged, swapped or edited: refused by name by each verb that meets them, or the same rows."""

import getpass
import json
import os
import random
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import check
from data_prep.encode import main as prepare
from flowar import train
from flowar.base.errors import UserError
from flowar.base.hashes import hash_file
from flowar.base.records import write_record
from flowar.config.data import CheckConfig, DataConfig
from flowar.latents.cache import make_private
from flowar.latents.schema import read_passport
from flowar.latents.shards import LatentShards
from tests.conftest import MORE, flip_bit, training, upload
from tests.data_prep.test_encode import preparing

FIRST, SECOND, THIRD = (f"0000{chunk}/shard.00000.mds" for chunk in range(3))  # 20, 20 and 8 rows


@pytest.fixture(scope="module")
def other(image_folder, tmp_path_factory):
    """Another dataset: the same shapes and sizes, other crops."""
    out = tmp_path_factory.mktemp("other") / "shards"
    prepare(preparing(image_folder, out, crop="random", views=2))
    return out


@pytest.fixture
def attacked(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def edit_json(file, change):
    """Change values in a JSON file, and no hash."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_index(change):
    return lambda folder, other: edit_json(folder / "index.json", lambda index: change(index["shards"]))


def edit_passport(**values):
    return lambda folder, other: edit_json(folder / "dataset.json", lambda passport: passport.update(values))


def strip_hash(folder, other):
    """Edit the multiplier of a passport and make it look like one of version 0.1, which had no hash."""
    edit_json(folder / "dataset.json", lambda passport: (passport.pop("xxh3"), passport.update(latent_multiplier=0.2)))


def swap_files(folder, other):
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def reverse_rows(folder, name=SECOND):
    opened = LatentShards(DataConfig(path=str(folder)))
    size = opened.dtype.itemsize
    content = (folder / name).read_bytes()
    begin = len(content) - 20 * size
    rows = [content[begin + place * size :][:size] for place in range(20)]
    (folder / name).write_bytes(content[:begin] + b"".join(reversed(rows)))


def reverse_rows_with_hash(folder, other):
    reverse_rows(folder)
    found = hash_file(folder / SECOND)
    edit_index(lambda shards: shards[1]["raw_data"]["hashes"].update(xxh64=found))(folder, other)


def reverse_rows_with_all_hashes(folder, other):
    """As one would who knows all records, but not what a row's checksum says."""
    reverse_rows_with_hash(folder, other)
    passport = json.loads((folder / "dataset.json").read_text())
    passport["shard_hashes"][SECOND] = hash_file(folder / SECOND)
    write_record(folder / "dataset.json", passport)


def take_shard(folder, other):
    shutil.copy(other / SECOND, folder / SECOND)


def take_shard_and_index(folder, other):
    take_shard(folder, other)
    shutil.copy(other / "index.json", folder / "index.json")


def zero_a_block(folder, other):
    content = bytearray((folder / SECOND).read_bytes())
    content[2000:4000] = bytes(2000)
    (folder / SECOND).write_bytes(content)


def name_it(name):
    return edit_index(lambda shards: shards[1]["raw_data"].update(basename=name))


def swap_names(shards):
    one, two = shards[0]["raw_data"], shards[1]["raw_data"]
    one["basename"], two["basename"] = two["basename"], one["basename"]


def move_a_row(shards):
    shards[0]["samples"] -= 1
    shards[1]["samples"] += 1


def write(name, text):
    return lambda folder, other: (folder / name).write_text(text)


ATTACKS = {
    "swapped shards": swap_files,
    "reversed rows": lambda folder, other: reverse_rows(folder),
    "reversed rows with a new hash in the index": reverse_rows_with_hash,
    "reversed rows with new hashes everywhere": reverse_rows_with_all_hashes,
    "a shard of another dataset": take_shard,
    "shard and index of another dataset": take_shard_and_index,
    "the index of another dataset": lambda folder, other: shutil.copy(other / "index.json", folder / "index.json"),
    "the passport of another dataset": lambda folder, other: shutil.copy(other / "dataset.json", folder),
    "a bit of a row": lambda folder, other: flip_bit(folder / SECOND, -40),
    "a zeroed block": zero_a_block,
    "a truncated shard": lambda folder, other: os.truncate(folder / SECOND, 3000),
    "no shard": lambda folder, other: (folder / SECOND).unlink(),
    "reversed entries": edit_index(lambda shards: shards.reverse()),
    "swapped names": edit_index(swap_names),
    "one entry twice": edit_index(lambda shards: shards.__setitem__(1, shards[0])),
    "an entry less": edit_index(lambda shards: shards.pop()),
    "an entry more": edit_index(lambda shards: shards.append(shards[0])),
    "a row moved": edit_index(move_a_row),
    "another hash": edit_index(lambda shards: shards[1]["raw_data"]["hashes"].update(xxh64="0" * 16)),
    "another size": edit_index(lambda shards: shards[1]["raw_data"].update(bytes=5000)),
    "rows that are text": edit_index(lambda shards: shards[1].update(samples="20")),
    "a name above the folder": name_it("../../stolen"),
    "a name within that leaves": name_it("00001/../../stolen"),
    "an absolute name": name_it("/etc/passwd"),
    "a name that is a number": name_it(1),
    "half an index": write("index.json", '{"shards": [{"raw_'),
    "a deep index": write("index.json", "[" * 100_000),
    "shards that are null": write("index.json", '{"shards": null}'),
    "an edited multiplier": edit_passport(latent_multiplier=0.5),
    "an edited multiplier without a hash": strip_hash,
    "edited counts": edit_passport(class_counts=[13, 11]),
    "edited hashes": edit_passport(shard_hashes={}),
    "edited shards": edit_passport(shards=[]),
    "a shape that is null": edit_passport(moments_shape=None),
    "half a passport": write("dataset.json", '{"schema_version": 3, "ima'),
    "a deep passport": write("dataset.json", "[" * 100_000),
    "a passport of bytes": lambda folder, other: (folder / "dataset.json").write_bytes(b"\xff\xfe"),
}


def read_all(folder):
    return LatentShards(DataConfig(path=str(folder))).read(range(48))


VERBS = {
    "read": lambda folder, tmp_path: read_all(folder),
    "check": lambda folder, tmp_path: check.main(CheckConfig(path=str(folder), num_images=0)),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_dataset_that_is_not_what_was_written_is_refused(attacked, other, tmp_path, attack, verb):
    ATTACKS[attack](attacked, other)
    with pytest.raises(UserError, match=r"dataset\.json|index\.json|0000\d/shard"):
        VERBS[verb](attacked, tmp_path)


@pytest.mark.parametrize("attack", ["swapped shards", "reversed rows", "a row moved", "an edited multiplier"])
def test_training_does_not_begin_on_it(shards, attacked, other, tmp_path, attack):
    ATTACKS[attack](attacked, other)
    data = DataConfig(path=str(attacked), num_workers=0)
    with pytest.raises(UserError, match=r"dataset\.json|index\.json|0000\d/shard"):
        train.main(training(shards, tmp_path / "run", data=data))
    assert not list((tmp_path / "run").rglob("step_*"))


def test_what_says_the_same_in_another_form_is_the_same(shards, attacked):
    for name in ("index.json", "dataset.json"):
        content = json.loads((attacked / name).read_text())
        (attacked / name).write_text(json.dumps(content, indent=7))
    passport = json.loads((attacked / "dataset.json").read_text())
    passport["shard_hashes"] = dict(reversed(passport["shard_hashes"].items()))
    (attacked / "dataset.json").write_text(json.dumps(passport))
    assert np.array_equal(read_all(attacked), read_all(shards))


NUM_CHANGES = 500


@pytest.mark.parametrize("number", [60, pytest.param(NUM_CHANGES, marks=MORE)])
def test_no_single_changed_byte_of_a_dataset_passes_in_silence(shards, attacked, number):
    """Either it is refused, or rows and passport are the same."""
    needed, passport = read_all(shards), read_passport(shards)
    files = [file for file in attacked.rglob("*") if file.is_file() and "listing" not in file.name]
    rng, refused = random.Random(0), 0
    for _ in range(number):
        file = rng.choice(files)
        before = file.read_bytes()
        changed = bytearray(before)
        place = rng.randrange(len(before))
        changed[place] = rng.choice([value for value in range(256) if value != before[place]])
        file.write_bytes(changed)
        try:
            found, its_passport = read_all(attacked), read_passport(attacked)
        except UserError:
            refused += 1
        else:
            assert np.array_equal(found, needed) and its_passport == passport, (file, place)
        file.write_bytes(before)
    assert refused > number / 2


def open_remote(name, cache):
    return LatentShards(DataConfig(path=f"s3://data/{name}", cache=str(cache) if cache else None))


def test_a_replaced_remote_shard_is_refused_with_and_without_its_index(bucket, attacked, other, tmp_path):
    for name, attack in (("shard", take_shard), ("index", take_shard_and_index)):
        attack(attacked, other)
        upload(bucket, attacked, name)
        with pytest.raises(UserError, match=r"shard 00001/.* upload it again|index\.json has hash"):
            open_remote(name, tmp_path / "cache").fetch_all()


@pytest.mark.parametrize("name", ["../../stolen", "/tmp/stolen-by-flowar", "00001/../../../stolen"])
def test_a_remote_index_writes_nothing_outside_the_cache(bucket, attacked, tmp_path, name):
    name_it(name)(attacked, None)
    passport = json.loads((attacked / "dataset.json").read_text())
    passport["shards"][1][0] = name
    passport["shard_hashes"][name] = passport["shard_hashes"][SECOND]
    write_record(attacked / "dataset.json", passport)  # of somebody who made all of it
    upload(bucket, attacked, "outside")
    bucket.upload_file(str(attacked / SECOND), "data", f"outside/{name}")
    with pytest.raises(UserError, match="index.json .*it names the file .* below the dataset's folder is needed"):
        open_remote("outside", tmp_path / "a" / "cache").fetch_all()
    assert not list(tmp_path.rglob("*stolen*")) and not Path("/tmp/stolen-by-flowar").exists()


@pytest.fixture(scope="module")
def fetched(bucket, shards, tmp_path_factory):
    """A cache with all of a remote dataset."""
    cache = tmp_path_factory.mktemp("fetched") / "cache"
    upload(bucket, shards, "cached")
    open_remote("cached", cache).fetch_all()
    return cache


@pytest.fixture
def cached(fetched, tmp_path):
    """The same in the test's own cache, verified."""
    shutil.copytree(fetched, tmp_path / "cache")
    remote = open_remote("cached", tmp_path / "cache")
    remote.fetch_all()
    return remote.folder


CACHE_ATTACKS = {
    "another shard": lambda folder, other: shutil.copy(other / SECOND, folder / SECOND),
    "a bit": lambda folder, other: flip_bit(folder / SECOND, 30),
    "no marker": lambda folder, other: (folder / f"{SECOND}.verified").unlink(),
    "swapped shards": swap_files,
    "a truncated shard": lambda folder, other: os.truncate(folder / SECOND, 3000),
    "half a marker": lambda folder, other: os.truncate(folder / f"{SECOND}.verified", 20),
    "another's marker": lambda folder, other: shutil.copy(folder / f"{THIRD}.verified", folder / f"{SECOND}.verified"),
}


@pytest.mark.parametrize(
    "attack", [*list(CACHE_ATTACKS)[:4], *(pytest.param(name, marks=MORE) for name in list(CACHE_ATTACKS)[4:])]
)
def test_a_changed_cached_shard_is_fetched_again(cached, shards, other, tmp_path, capsys, attack):
    CACHE_ATTACKS[attack](cached, other)
    again = open_remote("cached", tmp_path / "cache")
    assert np.array_equal(again.read(range(48)), read_all(shards))
    assert ("fetching it again" in capsys.readouterr().out) == ("marker" not in attack)


def test_a_cached_shard_is_hashed_once(cached, tmp_path):
    markers = {file: file.stat().st_mtime_ns for file in cached.rglob("*.verified")}
    open_remote("cached", tmp_path / "cache").fetch_all()
    assert len(markers) == 3
    assert {file: file.stat().st_mtime_ns for file in markers} == markers


def test_the_cache_is_for_its_owner_alone(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = tmp_path / f"flowar-{getpass.getuser()}"
    cache.mkdir(mode=0o755)  # as version 0.1 made it
    folder = open_remote("cached", None).folder
    assert folder.parent == cache
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, folder)] == [0o700] * 2


@pytest.mark.parametrize("problem", ["is a link", "belongs to user 12345", "is not a folder"])
def test_a_cache_that_somebody_else_may_have_made_is_refused(tmp_path, monkeypatch, problem):
    """The default one, and the folder of a dataset within one: both have names that anybody can tell in advance."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place, elsewhere = tmp_path / f"flowar-{getpass.getuser()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if problem == "is a link":
        place.symlink_to(elsewhere)
    elif problem == "is not a folder":
        place.write_text("")
    else:
        place.mkdir()
        try:
            os.chown(place, 12345, -1)
        except PermissionError:
            pytest.skip("only root can give a folder away")
    message = rf"the cache {place} {problem}.*remove it, or set data.cache to a folder of your own"
    with pytest.raises(UserError, match=message):
        open_remote("none", None)
    with pytest.raises(UserError, match=message):
        make_private(place)
    assert not list(elsewhere.iterdir())
