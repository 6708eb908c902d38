import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources import Source, open_source
from flowar.base.errors import UserError


def images_of(folder):
    """Every image of the folder as (bytes, label), in the order of a listing."""
    source = open_source(str(folder))
    return [(source.read(number), source.labels[number]) for number in range(len(source))]


def write_tars(root, images, per_tar=10, labels_as="cls"):
    root.mkdir()
    for start in range(0, len(images), per_tar):
        with tarfile.open(root / f"train-{start:05d}.tar", "w") as archive:
            for number, (content, label) in enumerate(images[start : start + per_tar], start=start):
                label = str(label) if labels_as == "cls" else json.dumps({"label": label, "width": 40})
                for suffix, data in ((labels_as, label.encode()), ("png", content)):
                    member = tarfile.TarInfo(f"part/{number:06d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def write_parquet(root, images, names=None, **columns):
    root.mkdir(exist_ok=True)
    table = pyarrow.table(
        columns
        or {
            "image": [{"bytes": content, "path": None} for content, _ in images],
            "label": [label for _, label in images],
        }
    )
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, root / "train-00000.parquet", row_group_size=7)


def same_images(source, images):
    return [(source.read(number), source.labels[number]) for number in range(len(source))] == images


def test_a_folder_lists_classes_and_files_in_the_order_of_their_names(image_folder):
    source = open_source(str(image_folder))
    assert (source.kind, source.class_names, len(source)) == ("folder", ["dark", "light"], 24)
    assert source.names[:2] == ["dark/0.png", "dark/1.png"] and source.labels == [0] * 12 + [1] * 12
    assert source.read(1) == (image_folder / "dark" / "1.png").read_bytes()


@pytest.mark.parametrize("labels_as", ["cls", "json"])
def test_webdataset_shards_hold_the_same_images(image_folder, tmp_path, labels_as):
    images = images_of(image_folder)
    write_tars(tmp_path / "tars", images, labels_as=labels_as)
    source = open_source(str(tmp_path / "tars"))
    assert source.kind == "webdataset" and source.class_names == ["0", "1"]
    assert same_images(source, images)
    assert len(open_source(f"{tmp_path}/tars/train-0000[0].tar")) == 10


def test_parquet_holds_the_same_images_and_its_class_names(image_folder, tmp_path):
    images = images_of(image_folder)
    write_parquet(tmp_path / "a", images, names=["night", "day"])
    source = open_source(str(tmp_path / "a"))
    assert source.kind == "parquet" and source.class_names == ["night", "day"]
    assert same_images(source, images)
    write_parquet(tmp_path / "b", [], picture=[content for content, _ in images], target=[label for _, label in images])
    plain = open_source(f"{tmp_path}/b/*.parquet", image_column="picture", label_column="target")
    assert same_images(plain, images) and plain.class_names == ["0", "1"]


def test_a_saved_listing_is_the_same_listing_in_the_same_bytes(image_folder, tmp_path):
    source = open_source(str(image_folder))
    source.save(tmp_path / "a.json.gz")
    open_source(str(image_folder)).save(tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert Source.load(tmp_path / "a.json.gz") == source
    assert Source.load(tmp_path / "a.json.gz").sha256() == source.sha256()


def test_the_hash_of_a_listing_changes_with_names_and_labels(image_folder):
    source = open_source(str(image_folder))
    renamed = Source(source.root, source.kind, source.class_names, ["x", *source.names[1:]], source.labels, [])
    relabelled = Source(source.root, source.kind, source.class_names, source.names, [1, *source.labels[1:]], [])
    assert len({source.sha256(), renamed.sha256(), relabelled.sha256()}) == 3


def test_wrong_folders_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="none does not exist; it has to hold one sub-folder of images per class, or"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no sub-folders and no \*.tar or \*.parquet"):
        open_source(str(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cats has no image"):
        open_source(str(tmp_path))


def test_wrong_shards_are_one_clear_error_with_the_file(image_folder, tmp_path):
    images = images_of(image_folder)
    write_tars(tmp_path / "a", images[:2], labels_as="txt")
    with pytest.raises(
        UserError, match=r"train-00000.tar: 2 images have no label, the first is part/000000; each needs"
    ):
        open_source(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cut.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"cut.tar is not a readable WebDataset shard"):
        open_source(str(tmp_path / "b"))
    write_parquet(tmp_path / "c", [], picture=[b""], label=[0])
    with pytest.raises(UserError, match=r"has no column image_column=image; it has picture, label"):
        open_source(str(tmp_path / "c"))
    (tmp_path / "c" / "train-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"train-00000.parquet is not a readable parquet file"):
        open_source(str(tmp_path / "c"))
    write_tars(tmp_path / "twice", images[:2])
    for path in (tmp_path / "twice").iterdir():
        with tarfile.open(path, "a") as archive:
            archive.addfile(tarfile.TarInfo("part/000000.jpg"))
        with pytest.raises(UserError, match=r"two images of one key, part/000000"):
            open_source(str(tmp_path / "twice"))
    write_tars(tmp_path / "cut", images)
    path = tmp_path / "cut" / "train-00000.tar"
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(UserError, match=r"train-00000.tar .*it is cut off: its closing block is missing"):
        open_source(str(tmp_path / "cut"))
    write_parquet(tmp_path / "empty", [])
    with pytest.raises(UserError, match="empty holds no image"):
        open_source(str(tmp_path / "empty"))
    write_parquet(tmp_path / "d", [(b"", -1)])
    with pytest.raises(UserError, match=r"has label -1; class numbers from 0 on are needed"):
        open_source(str(tmp_path / "d"))
