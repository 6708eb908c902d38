import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.encode import centre_crop, list_images, main
from data_prep.schema import read_passport
from flowar.config import PrepareConfig, VAEConfig
from flowar.data import LatentShards
from flowar.errors import UserError
from flowar.vae import from_uint8, load_vae


def preparing(images, out_dir, **changes):
    settings = {"vae": VAEConfig(name="demo"), "image_size": 32, "num_workers": 0, "batch_size": 5}
    return PrepareConfig(images=str(images), out_dir=str(out_dir), **(settings | changes))


def test_shards_hold_the_moments_of_every_image_in_order(image_folder, shards):
    latents, vae = LatentShards(shards), load_vae("demo")
    source = list_images(image_folder)
    assert len(latents) == len(source.files) == 24
    for index in (0, 11, 23):
        moments, label, _ = latents[index]
        pixels = torch.from_numpy(centre_crop(Image.open(source.files[index]), 32).copy()).permute(2, 0, 1)
        with torch.no_grad():
            expected = vae.encode(from_uint8(pixels)[None])[0]
        assert label == source.labels[index]
        torch.testing.assert_close(torch.from_numpy(moments.copy()).float(), expected, rtol=2e-3, atol=2e-3)


def test_workers_give_the_same_bytes(image_folder, shards, tmp_path):
    main(preparing(image_folder, tmp_path / "a", num_workers=2, batch_size=32))
    assert (tmp_path / "a" / "shard.00000.mds").read_bytes() == (shards / "shard.00000.mds").read_bytes()


def test_shards_open_with_mosaicml_streaming_alone(shards):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(shards), batch_size=4)
    samples = list(dataset)
    assert sorted(int(sample["label"]) for sample in samples) == [0] * 12 + [1] * 12
    assert samples[0]["moments"].dtype == np.float16


def test_the_passport_says_what_was_made_and_how(image_folder, shards):
    passport = read_passport(shards)
    vae = load_vae("demo")
    assert passport.vae_sha256 == vae.weights_sha256
    assert passport.latent_multiplier == vae.latent_multiplier
    assert passport.class_names == ["dark", "light"] and passport.class_counts == [12, 12]
    assert (passport.num_samples, passport.image_size, passport.skipped) == (24, 32, [])
    assert len(passport.latent_std) == vae.latent_channels and min(passport.latent_std) > 0


@pytest.mark.parametrize("size", [(100, 40), (33, 90), (32, 32), (200, 300), (20, 25)])
def test_the_crop_is_the_central_square_at_the_asked_size(size):
    width, height = size
    columns = np.abs(np.linspace(-1, 1, width))[None, :] + np.abs(np.linspace(-1, 1, height))[:, None]
    image = Image.fromarray((columns * 100).astype(np.uint8)).convert("RGB")
    cropped = centre_crop(image, 32)
    assert cropped.shape == (32, 32, 3)
    assert np.abs(cropped.astype(int) - cropped[::-1, ::-1].astype(int)).max() <= 12  # symmetric about the centre


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(centre_crop(Image.fromarray(pixels), 32), pixels)


def test_grey_palette_and_rotated_images_are_read(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    upright.save(tmp_path / "turned.png", exif=exif)
    assert centre_crop(Image.open(tmp_path / "turned.png"), 32)[0, 0].tolist() == [0, 0, 0]
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert centre_crop(upright.convert(mode), 32).shape == (32, 32, 3)


def test_unreadable_images_stop_by_name_or_are_left_out_on_request(image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "dark" / "3.png").write_bytes(b"no image")
    cut = images / "light" / "0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    message = r"1 of the first 5 images can't be read: .*3\.png .*; .*skip_unreadable=true"
    with pytest.raises(UserError, match=message.replace("first 5", r"first \d+")):
        main(preparing(images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    main(preparing(images, tmp_path / "out", skip_unreadable=True))
    passport = read_passport(tmp_path / "out")
    assert passport.class_counts == [11, 11] and len(passport.skipped) == 2
    assert "left out 2 images" in capsys.readouterr().out
    assert len(LatentShards(tmp_path / "out")) == 22


def test_wrong_folders_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="does not exist; it has to be a folder with one sub-folder"):
        main(preparing(tmp_path / "none", tmp_path / "out"))
    with pytest.raises(UserError, match="has no sub-folders; put the images of each class"):
        main(preparing(tmp_path, tmp_path / "out"))
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cats has no image"):
        main(preparing(tmp_path, tmp_path / "out"))


def test_a_size_that_the_vae_cannot_encode_is_refused(image_folder, tmp_path):
    with pytest.raises(UserError, match="image_size=30 is not a multiple of the stride"):
        main(preparing(image_folder, tmp_path / "out", image_size=30))


def test_a_finished_or_foreign_folder_is_not_overwritten(image_folder, shards, tmp_path):
    before = (shards / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="already holds a finished dataset"):
        main(preparing(image_folder, shards))
    assert (shards / "dataset.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no dataset"):
        main(preparing(image_folder, tmp_path))


def test_what_an_interrupted_run_left_is_not_taken_for_a_dataset(image_folder, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "shard.00000.mds").write_bytes(b"half")
    main(preparing(image_folder, tmp_path / "out"))
    assert not partial.exists()
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == 24
