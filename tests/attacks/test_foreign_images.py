"""Images and weights of somebody else's: data, and never code; what is damaged is named."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.image_sets import open_images
from tests.attacks.test_checkpoints import Trap
from tests.attacks.test_samples import cut


def pickled_mds(folder, file):
    with MDSWriter(out=str(folder), columns={"image": "png", "label": "pkl"}) as writer:
        writer.write({"image": Image.new("RGB", (4, 4)), "label": Trap(file)})


def test_code_in_foreign_images_and_weights_is_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    pickled_mds(tmp_path / "mds", sprung)
    with pytest.raises(UserError, match="mds is not a readable MDS dataset: .*unsafe type: pkl"):
        open_images(tmp_path / "mds", "samples").read_many(range(1))
    np.savez(tmp_path / "a.npz", np.array([Trap(sprung)], dtype=object))
    with pytest.raises(UserError, match="a.npz is not an .npz with images in arr_0: arr_0.npy holds Python objects"):
        open_images(tmp_path / "a.npz", "samples")
    for name in ("inception-v3-compat", "vgg16"):
        torch.save({"weight": Trap(sprung)}, tmp_path / "weights.pth")
        config = ExtractorConfig(name=name, weights=str(tmp_path / "weights.pth"), other_weights=True)
        with pytest.raises(UserError, match="weights of .* in .*weights.pth can't be used; .*Weights only load failed"):
            Extractor(config, torch.device("cpu"))
    assert not sprung.exists()


def test_weights_in_torch_hubs_folder_are_checked_before_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    torch.save(Trap(tmp_path / "sprung"), file)
    with pytest.raises(
        UserError, match="6726825d.pth have sha256 .*, but weights-inception-2015-12-05-6726825d.pth has"
    ):
        Extractor(ExtractorConfig(), torch.device("cpu"))
    assert not (tmp_path / "sprung").exists()


def mds_elsewhere(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../shard.00000.mds"
    (folder / "index.json").write_text(json.dumps(index))
    shutil.copy(folder / "shard.00000.mds", folder.parent)


MDS = {
    "half an index": lambda d: cut(d / "index.json"),
    "an index of nothing": lambda d: (d / "index.json").write_text("{}"),
    "an index of numbers": lambda d: (d / "index.json").write_text('{"shards": [1]}'),
    "a shard elsewhere": mds_elsewhere,
    "half a shard": lambda d: cut(d / "shard.00000.mds"),
    "an empty shard": lambda d: (d / "shard.00000.mds").write_bytes(b""),
    "no shard": lambda d: (d / "shard.00000.mds").unlink(),
}


@pytest.mark.parametrize("attack", MDS)
def test_damaged_mds_images_are_named(tmp_path, attack):
    with MDSWriter(out=str(tmp_path / "mds"), columns={"image": "png", "label": "int"}) as writer:
        for number in range(4):
            writer.write({"image": Image.new("RGB", (16, 16), (number, 0, 0)), "label": number})
    MDS[attack](tmp_path / "mds")
    with warnings.catch_warnings(), pytest.raises(UserError, match="mds"):
        warnings.simplefilter("ignore")
        open_images(tmp_path / "mds", "samples").read_many(range(4))


def odd_labels(file):
    np.savez(file, arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8), arr_1=np.array(["cat", "dog"]))


def huge_header(file):
    """A header that promises more than there is."""
    np.savez(file, arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    content = file.read_bytes()
    assert b"(2, 4, 4, 3)" in content
    file.write_bytes(content.replace(b"(2, 4, 4, 3)", b"(9, 9, 9, 3)"))


def broken_stream(file):
    random = np.random.default_rng(0)
    np.savez_compressed(file, arr_0=random.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 99] = bytes(99)
    file.write_bytes(content)


@pytest.mark.parametrize("make", [odd_labels, huge_header, broken_stream])
def test_odd_archives_are_named(tmp_path, make):
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match="a.npz is not an .npz with images in arr_0: "):
        open_images(tmp_path / "a.npz", "samples").read_many(range(2))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\xffIHDR", b"GIF89a"])
def test_broken_images_in_a_folder_are_named(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="images: image 0 can't be read"):
        open_images(tmp_path / "images", "samples").read_many(range(1))


def test_an_image_of_a_billion_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="image 0 can't be read: .*decompression bomb"):
        open_images(tmp_path, "samples").read_many(range(1))
