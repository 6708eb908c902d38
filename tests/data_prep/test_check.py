import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_prep.check import main
from data_prep.encode import main as prepare
from flowar.base.errors import UserError
from flowar.config.data import CheckConfig, VAEConfig
from tests.conftest import flip_bit, upload
from tests.data_prep.test_encode import preparing

SHARD = "00001/shard.00000.mds"  # images 10 to 19: rows 20 to 39


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def change(folder, file, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def test_a_good_dataset_passes_and_its_contact_sheet_shows_source_and_decoded(image_folder, copied, capsys):
    main(CheckConfig(path=str(copied), num_images=16))
    found = capsys.readouterr().out
    assert "hashes of 3 shards agree; 48 rows, 2 classes of 12 to 12 images" in found
    assert "16 images encoded again" in found and "is what was written" in found
    sheet = np.asarray(Image.open(f"{copied}.check.png")).astype(int)
    tiles = [sheet[2 + 34 * (n // 8) :][:32, 2 + 34 * (n % 8) :][:, :32] for n in range(32)]
    for source, decoded in zip(tiles[::2], tiles[1::2], strict=True):
        assert abs(source.mean() - decoded.mean()) < 60  # dark stays dark, light stays light


@pytest.mark.parametrize("crop", [{"crop": "random", "views": 3}, {"crop": "ten_crop"}])
def test_other_crops_are_encoded_again_too(image_folder, tmp_path, crop):
    prepare(preparing(image_folder, tmp_path / "out", **crop))
    main(CheckConfig(path=str(tmp_path / "out"), num_images=24))


def test_a_flipped_bit_is_found_and_named(copied):
    flip_bit(copied / SHARD, -1)
    with pytest.raises(UserError, match=rf"shard {SHARD} has xxh64 \w+, its index \w+; damaged rows: 39;"):
        main(CheckConfig(path=str(copied)))
    flip_bit(copied / SHARD, -1)
    flip_bit(copied / SHARD, 40)
    with pytest.raises(UserError, match=rf"shard {SHARD} .*damaged rows: none: what comes before the rows is"):
        main(CheckConfig(path=str(copied)))


def test_missing_and_truncated_shards_are_all_named(copied, capsys):
    (copied / SHARD).unlink()
    other = copied / "00002/shard.00000.mds"
    other.write_bytes(other.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"has 2 problems, the first: .*{SHARD} .*is missing"):
        main(CheckConfig(path=str(copied)))
    assert "WRONG: shard 00002/shard.00000.mds" in (found := capsys.readouterr().out) and "has 100 bytes" in found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_counts": [13, 11]}, r"class 0 \(dark\) has 12 images, not 13"),
        ({"latent_mean": [0.5]}, r"latent_mean is \[.*\], dataset.json says \[0.5\]"),
        ({"num_images": 23}, r"index.json has 48 rows, dataset.json 46"),
        ({"shard_hashes": {}}, r"00000/shard.00000.mds: index.json has hash \w+, dataset.json has None"),
        ({"listing_sha256": "0"}, r"listing.json.gz lists other images or classes"),
    ],
)
def test_a_passport_that_says_something_else_is_found(copied, values, message):
    change(copied, "dataset.json", **values)
    with pytest.raises(UserError, match=message):
        main(CheckConfig(path=str(copied)))


def test_files_that_belong_to_no_dataset_are_found(copied):
    (copied / "00003").mkdir()
    (copied / "00003" / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(UserError, match=r"00003/shard.00000.mds belongs to no dataset; remove it"):
        main(CheckConfig(path=str(copied)))


def test_another_source_is_found(image_folder, copied, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    main(CheckConfig(path=str(copied), images=str(images)))
    shutil.copy(images / "dark" / "0.png", images / "dark" / "5.png")
    with pytest.raises(UserError, match=r"image \d \(dark/5.png\), view \d, encoded again differs by [\d.]+ std"):
        main(CheckConfig(path=str(copied), images=str(images), num_images=24))
    (images / "dark" / "5.png").unlink()
    with pytest.raises(UserError, match=r"images=.* lists other images or classes than those"):
        main(CheckConfig(path=str(copied), images=str(images)))


def test_a_source_that_is_gone_is_said_and_can_be_left_out(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    prepare(preparing(images, tmp_path / "out"))
    shutil.rmtree(images)
    with pytest.raises(UserError, match=r"are in order, but its images aren't at .*images=\.\.\., or .*num_images=0"):
        main(CheckConfig(path=str(tmp_path / "out")))
    main(CheckConfig(path=str(tmp_path / "out"), num_images=0))


def test_another_vae_is_refused(copied, tmp_path):
    from flowar.latents.vae import load_vae

    vae = load_vae("demo")
    next(vae.autoencoder.parameters()).view(-1)[0] += 1
    vae.autoencoder.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"was made with VAE demo \(weights \w+\), but vae.name=.*/vae has weights"):
        main(CheckConfig(path=str(copied), vae=VAEConfig(name=str(tmp_path / "vae"))))


def test_skipped_images_do_not_shift_the_others(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "dark" / "0.png").write_bytes(b"")
    prepare(preparing(images, tmp_path / "out", skip_unreadable=True))
    main(CheckConfig(path=str(tmp_path / "out"), num_images=23))


def test_remote_datasets_are_checked_too(bucket, image_folder, copied, tmp_path):
    path = upload(bucket, copied, "checked")
    main(CheckConfig(path=path, cache=str(tmp_path / "a"), num_images=4, picture=str(tmp_path / "sheet.png")))
    assert (tmp_path / "sheet.png").exists()
    bucket.delete_object(Bucket="data", Key=f"checked/{SHARD}")
    with pytest.raises(UserError, match=rf"has 1 problems, the first: can't fetch s3://data/checked/{SHARD}"):
        main(CheckConfig(path=path, cache=str(tmp_path / "b")))
