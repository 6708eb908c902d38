import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from streaming import StreamingDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from flowar.base.hashes import hash_file
from flowar.sampling import packing
from flowar.sampling.packing import pack_images, read_pixels

NUM = 25


@pytest.fixture
def drawn(tmp_path):
    """Images whose pixels encode their number, of five classes in turn."""
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{number:06d}_class{number % 5:04d}.png" for number in range(NUM)]
    for number, file in enumerate(files):
        Image.fromarray(np.full((8, 6, 3), number, dtype=np.uint8)).save(file)
    return files, [number % 5 for number in range(NUM)], tmp_path


def test_the_npz_is_as_adms_evaluator_expects_and_not_sorted_by_class(drawn):
    files, labels, out_dir = drawn
    with np.load(pack_images("npz", files, labels, out_dir)) as content:
        images, classes = content["arr_0"], content["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (NUM, 8, 6, 3) and classes.dtype == np.int64
    numbers = images[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(NUM)) and numbers != list(range(NUM))
    assert classes.tolist() == [number % 5 for number in numbers] and classes.tolist() != sorted(classes)


def test_tars_hold_png_and_class_in_order(drawn, monkeypatch):
    monkeypatch.setattr(packing, "IMAGES_PER_TAR", 10)
    files, labels, out_dir = drawn
    tars = sorted(pack_images("tar", files, labels, out_dir).glob("*.tar"))
    counts = []
    for file in tars:
        with tarfile.open(file) as archive:
            counts.append(len(archive.getnames()))
    assert counts == [20, 20, 10]
    read = list(webdataset.WebDataset([str(file) for file in tars], shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [f"{number:06d}" for number in range(NUM)]
    assert [sample["cls"] for sample in read] == labels
    assert [np.asarray(sample["png"])[0, 0, 0] for sample in read] == list(range(NUM))


def test_mds_opens_with_streaming(drawn):
    files, labels, out_dir = drawn
    read = list(StreamingDataset(local=str(pack_images("mds", files, labels, out_dir)), batch_size=1, shuffle=False))
    assert [sample["number"] for sample in read] == list(range(NUM))
    assert [sample["label"] for sample in read] == labels
    assert [np.asarray(sample["image"])[0, 0, 0] for sample in read] == list(range(NUM))


def test_the_folder_of_png_files_opens_with_torchvision(drawn):
    files, _, out_dir = drawn
    found = ImageFolder(out_dir, loader=pil_loader)
    assert len(found) == NUM and all(np.array_equal(np.asarray(found[n][0]), read_pixels(files[n])) for n in range(NUM))


@pytest.mark.parametrize("kind", ["npz", "tar", "mds"])
def test_packed_files_are_hashed_and_not_packed_again(drawn, kind, monkeypatch):
    files, labels, out_dir = drawn
    target = pack_images(kind, files, labels, out_dir)
    hashes = json.loads((out_dir / "packed.json").read_text())[kind]["xxh64"]
    assert hashes and all(hash_file(out_dir / name) == found for name, found in hashes.items())
    with monkeypatch.context() as patch:
        patch.setitem(packing.PACKERS, kind, None)
        assert pack_images(kind, files, labels, out_dir) == target
    pack_images(kind, files[:10], labels[:10], out_dir)
    assert json.loads((out_dir / "packed.json").read_text())[kind]["num_images"] == 10
