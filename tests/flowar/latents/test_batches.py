import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from flowar.base.errors import UserError
from flowar.base.records import write_record
from flowar.config.data import DataConfig
from flowar.latents.batches import SequenceOrder, StepOrder, check_fits, check_same_vae, permute, read_batches
from flowar.latents.schema import read_passport
from flowar.latents.shards import LatentShards
from flowar.latents.vae import load_vae
from tests.conftest import MORE, tiny_config
from tests.processes import Death, join, run_ranks, start_ranks


def read(config, out, steps=range(12), *, rank=None, world_size=None):
    """Read a rank's batches, and add a line for each to a file; the rank is that of this process if none is given."""
    rank = int(os.environ["RANK"]) if rank is None else rank
    world_size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
    shares = {"rank": rank, "world_size": world_size}
    batches = read_batches(LatentShards(config), config, batch_size=8, seed=0, steps=steps, **shares)
    for step, batch in zip(steps, batches, strict=False):
        with (out / f"{world_size}.{rank}").open("a") as log:
            print(json.dumps([step, batch.samples.tolist(), batch.moments.double().sum().item()]), file=log)


def order(num_images=10, views=1, *, batch_size=4, seed=0, steps=range(10), **ranks):
    return list(StepOrder(num_images, views, batch_size=batch_size, seed=seed, steps=steps, **ranks))


def test_every_epoch_visits_every_image_once():
    flat = np.concatenate(order())
    for epoch in flat.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert flat[:10].tolist() != flat[10:20].tolist()


def test_an_epoch_uses_one_view_of_each_image_and_the_next_may_use_another():
    epochs = np.concatenate(order(views=5, steps=range(100))).reshape(40, 10)
    for epoch in epochs:
        assert sorted(epoch // 5) == list(range(10))
    uses = np.bincount(epochs.ravel(), minlength=50)
    assert uses.sum() == 400 and uses.min() > 0  # each of the 50 rows, about 8 times each
    assert [row // 5 for row in np.concatenate(order(views=5))] == np.concatenate(order()).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1_000, 4_097])
def test_permute_is_a_permutation_that_depends_on_the_seed(count):
    places = np.arange(count)
    found = permute(places, count, seed=7)
    assert np.array_equal(np.sort(found), places)
    assert np.array_equal(permute(places[::-2], count, seed=7), found[::-2])  # each on its own
    if count > 5:
        assert not np.array_equal(found, permute(places, count, seed=8))


def test_what_permute_makes_of_a_range_looks_random():
    """Neighbours don't stay near, and every seed sends a place anywhere: as often as chance would have it."""
    steps = np.diff(permute(np.arange(100_000), 100_000, seed=0))
    assert 0.32 < np.abs(steps).mean() / 100_000 < 0.347  # a third
    targets = np.bincount([permute(np.array([3]), 10, seed)[0] for seed in range(5_000)], minlength=10)
    assert ((targets - 500) ** 2 / 500).sum() < 27.9  # chi-square of 9 degrees of freedom, one in a thousand


def test_an_order_that_is_not_kept_in_memory_visits_each_image_once_too(monkeypatch):
    monkeypatch.setattr("flowar.latents.batches.MOST_SHUFFLED", 9)
    epochs = np.concatenate(order(views=5, steps=range(100))).reshape(40, 10)
    for epoch in epochs:
        assert sorted(epoch // 5) == list(range(10))
    assert np.bincount(epochs.ravel(), minlength=50).min() > 0 and len({tuple(epoch) for epoch in epochs}) == 40
    assert order(steps=range(3, 10)) == order()[3:] and order() != order(seed=1)
    parts = [order(rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == order()
    billion = order(10**9, views=2, batch_size=512, steps=range(10**6, 10**6 + 2))
    assert max(map(max, billion)) < 2 * 10**9


def test_the_order_is_a_function_of_seed_and_step():
    assert order() == order()
    assert order() != order(seed=1)
    assert order(steps=range(3, 10)) == order()[3:]
    assert order(7, batch_size=20, steps=range(2, 3)) == order(7, batch_size=20, steps=range(3))[2:]  # several epochs


def test_the_batch_size_does_not_change_the_sequence():
    assert np.concatenate(order()).tolist() == np.concatenate(order(batch_size=8, steps=range(5))).tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_the_parts_of_one_batch(world_size):
    parts = [order(batch_size=8, views=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == order(batch_size=8, views=3)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size=8 can't be shared evenly by 3 ranks; use a multiple of 3"):
        order(batch_size=8, rank=0, world_size=3)


def batches(path, workers, first_step=0):
    config = DataConfig(path=str(path), num_workers=workers)
    loader = read_batches(LatentShards(config), config, batch_size=7, seed=0, steps=range(first_step, 9))
    return [(batch.samples.tolist(), batch.labels.tolist(), batch.moments.sum().item()) for batch in loader]


def test_workers_and_restarts_give_the_same_batches(shards):
    alone = batches(shards, 0)
    assert batches(shards, 2) == alone
    assert batches(shards, 2, first_step=4) == alone[4:]


def test_batches_hold_what_was_stored(shards):
    config = DataConfig(path=str(shards), num_workers=0)
    stored = LatentShards(config).read(range(48))
    for batch in read_batches(LatentShards(config), config, batch_size=24, seed=0, steps=range(3)):
        assert np.array_equal(batch.moments.numpy(), stored["moments"][batch.samples])
        assert np.array_equal(batch.labels.numpy(), stored["label"][batch.samples])


def read_log(out, world_size):
    """The rows of each step, of all ranks in rank order, as far as all of them have come."""
    logs = [
        [json.loads(line) for line in (out / f"{world_size}.{rank}").read_text().splitlines()]
        for rank in range(world_size)
    ]
    return {
        parts[0][0]: (list(chain(*(part[1] for part in parts))), pytest.approx(sum(part[2] for part in parts)))
        for parts in zip(*logs, strict=False)
    }


def test_ranks_and_workers_do_not_change_the_global_order(shards, tmp_path):
    found = {}
    for world_size, workers in ((1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)):
        out = tmp_path / f"{world_size}_{workers}"
        out.mkdir()
        for rank in range(world_size):
            read(DataConfig(path=str(shards), num_workers=workers), out, rank=rank, world_size=world_size)
        found[world_size, workers] = read_log(out, world_size)
    first = found[1, 0]
    assert list(first) == list(range(12))
    assert sorted(row // 2 for step in range(3) for row in first[step][0]) == list(range(24))
    assert all(log == first for log in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("after", [pytest.param(4, marks=MORE), 2], ids=["4 -> 4 ranks", "4 -> 2 ranks"])
def test_killed_mid_epoch_the_rest_is_read_once_and_in_order(shards, tmp_path, after):
    """Four processes, each killed when it would write down a step, the first of them the fifth: epochs have three."""
    undisturbed, killed, resumed = (tmp_path / name for name in ("undisturbed", "killed", "resumed"))
    for folder in (undisturbed, killed, resumed):
        folder.mkdir()
    config, log = DataConfig(path=str(shards), num_workers=2), tmp_path / "log"
    read(config, undisturbed, rank=0, world_size=1)
    deaths = {rank: Death(at, str(killed / "4.")) for rank, at in enumerate((7, 5, 9, 5))}
    join(start_ranks(read, config, killed, world_size=4, log=log, deaths=deaths), log, code=-signal.SIGKILL)
    before = read_log(killed, 4)
    assert list(before) == [0, 1, 2, 3]
    run_ranks(read, config, resumed, range(4, 12), world_size=after, log=log)
    assert before | read_log(resumed, after) == read_log(undisturbed, 1)


def test_two_jobs_read_one_dataset_at_once(shards):
    first, second = (
        read_batches(LatentShards(config), config, batch_size=6, seed=seed, steps=range(8))
        for seed, config in ((0, DataConfig(path=str(shards))), (1, DataConfig(path=str(shards))))
    )
    pairs = [(a.samples.tolist(), b.samples.tolist()) for a, b in zip(first, second, strict=True)]
    assert [a for a, _ in pairs] == order(24, 2, batch_size=6, steps=range(8))
    assert [b for _, b in pairs] == order(24, 2, batch_size=6, seed=1, steps=range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_ends_the_reading_with_the_name_of_its_shard(shards, tmp_path, workers):
    copied = shutil.copytree(shards, tmp_path / "shards")
    content = bytearray((copied / "00001/shard.00000.mds").read_bytes())
    content[-1] ^= 1
    (copied / "00001/shard.00000.mds").write_bytes(content)
    config = DataConfig(path=str(copied), num_workers=workers)
    with pytest.raises(UserError, match=r"^row 39 in shard 00001/shard\.00000\.mds of data\.path=.* is damaged"):
        list(read_batches(LatentShards(config), config, batch_size=4, seed=0, steps=range(60)))


def test_a_killed_reading_process_is_an_error_and_no_hang(shards):
    code = """
import sys, psutil
from flowar.config.data import DataConfig
from flowar.latents.batches import read_batches
from flowar.latents.shards import LatentShards

config = DataConfig(path=sys.argv[1], num_workers=2)
batches = read_batches(LatentShards(config), config, batch_size=4, seed=0, steps=range(10**9))
next(batches)
for child in psutil.Process().children():
    child.kill()
for batch in batches:
    pass
"""
    found = subprocess.run([sys.executable, "-c", code, str(shards)], capture_output=True, text=True, timeout=600)
    assert found.returncode == 1
    messages = (
        r"DataLoader worker \(pid\(?s?\)? .*\) (is killed by signal|exited unexpectedly)|Connection reset by peer"
    )
    assert re.search(messages, found.stderr)  # the second where it died while handing over a batch


def test_an_unfinished_or_foreign_dataset_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="does not exist; write it with `flowar prepare`"):
        read_passport(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no dataset.json, so it is not a finished dataset"):
        read_passport(tmp_path)
    content = json.loads((shards / "dataset.json").read_text())
    write_record(tmp_path / "dataset.json", content | {"schema_version": 99})
    with pytest.raises(UserError, match="has schema version 99"):
        read_passport(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_passport(tmp_path)


def test_a_model_for_other_latents_or_classes_is_refused(shards):
    passport = read_passport(shards)
    size = {"latent_channels": passport.latent_channels, "scales": (1, passport.latent_size), "patch_size": 1}
    check_fits(passport, tiny_config(**size, num_classes=2), "here")
    with pytest.raises(UserError, match=r"holds latents of \d+ channels and side \d+ .*made for 99 channels"):
        check_fits(passport, tiny_config(**(size | {"latent_channels": 99}), num_classes=2), "here")
    with pytest.raises(UserError, match=r"has 2 classes, but model.num_classes=5; set model.num_classes=2"):
        check_fits(passport, tiny_config(**size), "here")


def test_another_vae_is_refused_naming_both(shards):
    passport, vae = read_passport(shards), load_vae("demo")
    check_same_vae(passport, vae, "here")
    vae.latent_multiplier = 2.0
    with pytest.raises(UserError, match=r"made with latent_multiplier=1.0\d+, but vae.name=demo has 2.0"):
        check_same_vae(passport, vae, "here")
    vae.weights_sha256, vae.name = "f" * 64, "mar"
    with pytest.raises(
        UserError, match=rf"made with VAE demo \(weights {passport.vae_sha256[:12]}\), but vae.name=mar has"
    ):
        check_same_vae(passport, vae, "here")


def sequences(labels, steps, class_draw="uniform", **ranks):
    """The rows of some steps, (steps, samples, 3), of images in two views."""
    order = SequenceOrder(
        labels, 2, images_per_sample=3, class_draw=class_draw, batch_size=8, seed=0, steps=steps, **ranks
    )
    return np.array(list(order)).reshape(len(steps), -1, 3)


def test_a_sequence_is_of_different_images_of_one_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [3, 10, 187]))
    rows = sequences(labels, range(200))
    images = rows // 2
    assert (labels[images] == labels[images[..., :1]]).all()
    assert (np.diff(np.sort(images, axis=-1), axis=-1) > 0).all()
    assert set((rows % 2).flat) == {0, 1}
    drawn = labels[images[..., 0]].flatten()
    assert np.bincount(drawn)[[0, 1, 3]].min() > 0.8 * len(drawn) / 3  # of 533 each
    by_frequency = labels[sequences(labels, range(200), "frequency")[..., 0] // 2]
    assert (by_frequency == 3).mean() == pytest.approx(187 / 200, abs=0.03)
    pairs = {tuple(pair) for pair in images[labels[images[..., 0]] == 0][:, :2].tolist()}
    assert len(pairs) == 6  # all orders


def test_sequences_follow_from_seed_step_and_place_alone():
    labels = np.arange(40) % 2
    whole = sequences(labels, range(6))
    assert (sequences(labels, range(4, 6)) == whole[4:]).all()
    parts = [sequences(labels, range(6), rank=rank, world_size=4) for rank in range(4)]
    assert (np.concatenate(parts, axis=1) == whole).all()


def test_labels_are_read_from_the_shards_and_compared_with_the_passport(shards, tmp_path):
    opened = LatentShards(DataConfig(path=str(shards)))
    views = opened.passport.views
    needed = [int(opened.read([row])["label"][0]) for row in range(0, len(opened), views)]
    assert opened.read_labels().tolist() == needed
    opened.passport = dataclasses.replace(opened.passport, class_counts=[1, 23])
    with pytest.raises(UserError, match="labels in the shards of data.path=.* are not as many as its dataset.json"):
        opened.read_labels()
