import json
import shutil

import numpy as np
import pytest

from data_prep.schema import read_passport
from flowar.config import DataConfig
from flowar.data import LatentShards, StepOrder, check_fits, check_same_vae, read_batches
from flowar.errors import UserError
from tests.conftest import tiny_config


def order(num_samples, batch_size, seed=0, first_step=0, num_steps=10):
    return list(StepOrder(num_samples, batch_size, seed, first_step=first_step, num_steps=num_steps))


def test_every_epoch_visits_every_sample_once():
    flat = np.concatenate(order(10, 4, num_steps=10))
    for epoch in flat.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert flat[:10].tolist() != flat[10:20].tolist()


def test_the_order_is_a_function_of_seed_and_step():
    assert order(10, 4) == order(10, 4)
    assert order(10, 4) != order(10, 4, seed=1)
    assert order(10, 4, first_step=3) == order(10, 4)[3:]
    assert order(7, 20, num_steps=3) == order(7, 20, num_steps=3)  # a batch of several epochs


def test_the_batch_size_does_not_change_the_sequence():
    assert np.concatenate(order(10, 4, num_steps=10)).tolist() == np.concatenate(order(10, 8, num_steps=5)).tolist()


def batches(shards, workers, first_step=0):
    loader = read_batches(
        LatentShards(shards),
        DataConfig(path=str(shards), num_workers=workers),
        batch_size=7,
        seed=0,
        first_step=first_step,
        num_steps=9,
    )
    return [(batch.samples.tolist(), batch.labels.tolist(), batch.moments.sum().item()) for batch in loader]


def test_workers_and_restarts_give_the_same_batches(shards):
    alone = batches(shards, 0)
    assert batches(shards, 2) == alone
    assert batches(shards, 2, first_step=4) == alone[4:]


def test_samples_are_what_was_stored(shards):
    latents = LatentShards(shards)
    assert len(latents) == 24
    moments, label, number = latents[20]
    passport = read_passport(shards)
    assert moments.shape == tuple(passport.moments_shape) and moments.dtype == np.float16
    assert (label, number) == (1, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_lost_while_reading_is_an_error_that_names_it(shards, tmp_path, workers):
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    latents = LatentShards(copied)
    (copied / "shard.00000.mds").unlink()
    loader = read_batches(
        latents, DataConfig(path=str(copied), num_workers=workers), batch_size=4, seed=0, first_step=0, num_steps=3
    )
    with pytest.raises(UserError, match=r"^can't read shard 0 .*shard\.00000\.mds"):
        list(loader)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard.00000.mds").unlink(), r"shard .*shard\.00000\.mds is missing"),
        (
            lambda folder: (folder / "shard.00000.mds").write_bytes(b"short"),
            r"shard\.00000\.mds has 5 bytes, index.json says",
        ),
        (lambda folder: (folder / "index.json").write_text("{"), "has no readable index.json"),
        (lambda folder: (folder / "index.json").unlink(), "has no readable index.json"),
    ],
)
def test_damage_is_found_at_the_start(shards, tmp_path, damage, message):
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    damage(copied)
    with pytest.raises(UserError, match=message):
        LatentShards(copied)


def test_an_unfinished_or_foreign_dataset_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="does not exist; write it with `flowar prepare`"):
        read_passport(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no dataset.json, so it is no finished dataset"):
        read_passport(tmp_path)
    content = json.loads((shards / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"schema_version": 99}))
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
    passport = read_passport(shards)
    check_same_vae(passport, "demo", passport.vae_sha256, "here")
    with pytest.raises(
        UserError, match=rf"made with VAE demo \(weights {passport.vae_sha256[:12]}\), but vae.name=mar has"
    ):
        check_same_vae(passport, "mar", "f" * 64, "here")
