import json

import numpy as np
import pytest
import xxhash
from PIL import Image

from flowar.base.errors import UserError
from flowar.evaluation.image_sets import open_images
from flowar.sampling.packing import pack_images

NUM = 12


@pytest.fixture
def drawn(tmp_path):
    """What `flowar sample` would write: images whose pixels encode their number, of three classes in turn."""
    root = tmp_path / "drawn"
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(NUM):
        file = root / "images" / f"{number:06d}_class{number % 3:04d}.png"
        Image.fromarray(np.full((8, 6, 3), number, dtype=np.uint8)).save(file)
        lines.append(f"{xxhash.xxh64(file.read_bytes()).hexdigest()}  images/{file.name}\n")
    (root / "images.xxh64").write_text("".join(lines))
    (root / "samples.json").write_text(json.dumps({"num_images": NUM}))
    return root


def pack_drawn(root, kind):
    files = sorted((root / "images").glob("*.png"))
    return pack_images(kind, files, [number % 3 for number in range(NUM)], root)


@pytest.mark.parametrize("form", ["samples", "folder", "npz", "tar", "mds"])
def test_all_forms_give_the_same_images_numbers_and_labels(drawn, form):
    path = {"samples": drawn, "folder": drawn / "images"}.get(form)
    images = open_images(path or pack_drawn(drawn, form), "samples")
    pixels = images.read_many(range(len(images)))
    assert images.kind == form and pixels.shape == (NUM, 3, 8, 6) and pixels.dtype == np.uint8
    shown = pixels[:, 0, 0, 0].tolist()
    if form == "npz":  # in its fixed random order
        assert sorted(shown) == list(range(NUM)) and images.labels == [number % 3 for number in shown]
    else:
        assert shown == images.numbers == list(range(NUM))
    if form in ("samples", "tar", "mds"):
        assert images.labels == [number % 3 for number in range(NUM)]


def test_classes_of_a_folder_are_its_sub_folders_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    images = open_images(tmp_path, "samples")
    assert images.labels == [0, 1] and images.numbers == [0, 1]


def test_a_compressed_npz_can_be_read_too(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", array)
    np.savez(tmp_path / "b.npz", array)
    for name in ("a.npz", "b.npz"):
        images = open_images(tmp_path / name, "samples")
        assert np.array_equal(images.read_many(range(5)).transpose(0, 2, 3, 1), array) and images.labels == [-1] * 5


def test_other_images_have_another_identity(drawn):
    before = open_images(drawn / "images", "samples").identity
    Image.new("RGB", (6, 8)).save(drawn / "images" / "000003_class0000.png")
    assert open_images(drawn / "images", "samples").identity != before


def test_an_image_that_changed_after_drawing_is_found_by_its_hash(drawn):
    Image.new("RGB", (6, 8), (9, 9, 9)).save(drawn / "images" / "000003_class0000.png")
    with pytest.raises(UserError, match=r"000003_class0000.png does not have the hash in .*images.xxh64; delete it"):
        open_images(drawn, "samples").read_many(range(NUM))


def test_missing_half_drawn_and_foreign_files_are_one_clear_error(drawn, tmp_path, shards):
    with pytest.raises(UserError, match="samples=/none does not exist; give a folder of images, what"):
        open_images("/none", "samples")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="reference=.*empty holds no images"):
        open_images(tmp_path / "empty", "reference")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(UserError, match="is not an .npz with images in arr_0: it holds other"):
        open_images(tmp_path / "a.npz", "samples")
    np.savez(tmp_path / "b.npz", np.zeros((2, 3, 4, 4)))
    with pytest.raises(UserError, match=r"arr_0 of float64 \(2, 3, 4, 4\); give one with uint8"):
        open_images(tmp_path / "b.npz", "samples")
    with pytest.raises(UserError, match="is an MDS dataset without a column image"):
        open_images(shards, "samples")
    (drawn / "images" / "000003_class0000.png").unlink()
    with pytest.raises(UserError, match="holds 11 images, 12 of them hashed, but 12 were requested; run the same"):
        open_images(drawn, "samples")


def test_mixed_sizes_and_broken_files_are_named(drawn):
    Image.new("RGB", (5, 8)).save(drawn / "images" / "z.png")
    with pytest.raises(UserError, match=r"images of several sizes, 5 x 8 and 6 x 8 pixels"):
        open_images(drawn / "images", "samples").read_many(range(NUM + 1))
    (drawn / "images" / "z.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="image 12 can't be read"):
        open_images(drawn / "images", "samples").read_many(range(NUM + 1))


def test_the_class_number_is_read_from_a_file_name_with_any_class_name():
    from flowar.sampling.folder import SAMPLE_NAME, class_of, file_safe

    for name in ("7", "a_b-3", "class0099", "x_class0004.png", "T-shirt/top", "été", "..", "a" * 300):
        called = file_safe(name)
        file = f"000012_class0345{f'_{called}' if called else ''}.png"
        assert SAMPLE_NAME.fullmatch(file) and class_of(file) == 345, name
    assert file_safe("T-shirt/top") == "T-shirt-top" and file_safe("衣") == ""
