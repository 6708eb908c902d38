"""Images, labels and names beyond all limits: refused by name, whatever format they come in. And advice that works."""

import io
import json
import os
import re
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_prep.crops import decode_image
from data_prep.encode import main as prepare
from data_prep.limits import LARGEST_ASPECT, LARGEST_IMAGE, MOST_CLASSES
from data_prep.sources import open_source
from flowar.base.errors import UserError
from flowar.latents.schema import read_passport
from tests.data_prep.test_encode import preparing
from tests.data_prep.test_sources import images_of, write_parquet, write_tars


@pytest.fixture
def images(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_line_of_20000_pixels_is_named_and_takes_no_memory(tmp_path):
    images = tmp_path / "images"
    (images / "dark").mkdir(parents=True)
    Image.new("RGB", (20_000, 1)).save(images / "dark" / "line.png")
    before = peak_bytes()
    with pytest.raises(UserError, match=rf"dark/line.png \(20000 x 1 pixels; at most {LARGEST_ASPECT} times as long"):
        prepare(preparing(images, tmp_path / "out", image_size=256))
    assert peak_bytes() - before < 2**29
    with pytest.raises(UserError, match=r"dark/line.png \(20000 x 1"):
        prepare(preparing(images, tmp_path / "random", crop="random"))


def test_an_image_of_usual_shape_is_within_the_limits():
    buffer = io.BytesIO()
    Image.new("L", (LARGEST_ASPECT * 4, 4)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).size == (LARGEST_ASPECT * 4, 4)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded():
    buffer = io.BytesIO()
    Image.new("1", (11_000, 10_000)).save(buffer, "TIFF", compression="group4")
    before = peak_bytes()
    with pytest.raises(ValueError, match=rf"11000 x 10000 pixels; at most {LARGEST_IMAGE:,} in all"):
        decode_image(buffer.getvalue())
    assert peak_bytes() - before < 2**27


def test_a_lack_of_memory_stops_the_run_and_drops_no_good_image(images, tmp_path):
    prepare(preparing(images, tmp_path / "warm"))  # loads what it needs
    Image.new("L", (9_900, 9_900)).save(images / "dark" / "large.png", compress_level=1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"not enough memory to decode dark/large.png, which says nothing about"):
            prepare(preparing(images, tmp_path / "out", skip_unreadable=True))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dark/pipe.png", "dark/below/pipe.jpg", "dark/link.png", "pipes.tar"])
def test_a_named_pipe_is_refused_and_not_waited_for(images, name):
    (images / "dark" / "below").mkdir()
    os.mkfifo(images / "real")
    if "link" in name:
        (images / name).symlink_to(images / "real")
    else:
        os.mkfifo(images / name)
    with pytest.raises(UserError, match=rf"{name}.* is not a regular file; remove it"):
        open_source(str(images))


@pytest.mark.parametrize("name", [b"dark/\xff.png", b"\xfe/a.png"])
def test_a_name_that_is_not_utf_8_is_refused(images, name, capsys):
    path = images / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(images / "dark" / "0.png", path)
    with pytest.raises(UserError, match=r"the name b'.*\\xf[ef].*' is not UTF-8") as caught:
        open_source(str(images))
    print(caught.value)  # can be printed


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_left_out(images, monkeypatch):
    (images / "dark" / "below").mkdir()
    shutil.copy(images / "dark" / "0.png", images / "dark" / "below")
    assert len(open_source(str(images))) == 25
    (images / "dark" / "a.png").symlink_to("nowhere")
    assert len(open_source(str(images))) == 26  # an error when it is read


def one_tar(root, members):
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


LABELS = {
    "huge": ("cls", b"99999999", rf"label 99999999; class numbers below {MOST_CLASSES:,}"),
    "huge in JSON": ("json", b'{"label": 99999999}', rf"label 99999999; class numbers below {MOST_CLASSES:,}"),
    "negative": ("cls", b"-1", "has label -1; class numbers from 0 on"),
    "deep": ("json", b"[" * 100_000, r"a.tar is not a readable WebDataset shard \(RecursionError"),
    "infinite": ("json", b'{"label": 1e999}', "a.tar is not a readable WebDataset shard"),
    "not a number": ("json", b'{"label": NaN}', "a.tar is not a readable WebDataset shard"),
    "half": ("json", b'{"label": 1.5}', "label 1.5, not a class number"),
    "a list": ("json", b'{"label": [1]}', "a.tar is not a readable WebDataset shard"),
    "null": ("json", b"null", "a.tar is not a readable WebDataset shard"),
    "text": ("cls", b"cat", "a.tar is not a readable WebDataset shard"),
    "many digits": ("cls", b"9" * 10_000, "a.tar is not a readable WebDataset shard"),
    "too long": ("cls", b" " * 17_000_000 + b"1", "a label file has 16,777,216 at most"),
}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_that_is_no_class_number_is_refused(image_folder, tmp_path, label):
    suffix, content, message = LABELS[label]
    one_tar(tmp_path / "tars", {"0.png": (image_folder / "dark" / "0.png").read_bytes(), f"0.{suffix}": content})
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "tars"))


def test_an_image_of_a_tar_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UserError, match=r"a.tar is not .*'0.png' is not a regular file"):
        open_source(str(tmp_path / "tars"))


METADATA = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "null": b'{"info": null}',
    "a list of features": b'{"info": {"features": []}}',
    "a feature that is text": b'{"info": {"features": {"label": "int"}}}',
    "names that are numbers": b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
    "names in one": b'{"info": {"features": {"label": {"names": "ab"}}}}',
    "no text": b"\xff",
}


def parquet_with(root, metadata, name="a", labels=(0, 1)):
    root.mkdir(exist_ok=True)
    table = pyarrow.table({"image": [b"x"] * len(labels), "label": list(labels)})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), root / f"{name}.parquet")


@pytest.mark.parametrize("metadata", METADATA)
def test_class_names_of_another_shape_are_refused(tmp_path, metadata):
    parquet_with(tmp_path, METADATA[metadata])
    with pytest.raises(UserError, match=r'a.parquet: the metadata "huggingface" of its schema, .*, is damaged'):
        open_source(str(tmp_path))


def test_parquet_files_whose_class_names_differ_are_refused(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        metadata = {"info": {"features": {"label": {"names": classes}}}}
        parquet_with(tmp_path, json.dumps(metadata).encode(), name)
    with pytest.raises(UserError, match=r"b.parquet has other class names than .*a.parquet"):
        open_source(str(tmp_path))


def test_a_huge_label_or_images_that_are_no_bytes_are_refused_in_parquet(tmp_path):
    parquet_with(tmp_path / "a", b"{}", labels=(0, 99_999_999))
    with pytest.raises(UserError, match="has label 99999999; class numbers below"):
        open_source(str(tmp_path / "a"))
    write_parquet(tmp_path / "b", [], image=[1], label=[0])
    with pytest.raises(UserError, match="image_column=image holds int64; bytes, or a struct"):
        open_source(str(tmp_path / "b"))


def test_a_damaged_row_group_is_named(image_folder, tmp_path):
    write_parquet(tmp_path / "parquet", images_of(image_folder))
    file = tmp_path / "parquet" / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    content[20:60] = bytes(40)  # of the first page
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"row group 0 of .*train-00000.parquet is damaged: .*copy the file again"):
        prepare(preparing(tmp_path / "parquet", tmp_path / "out"))


def broken(images):
    """Break an image of the last chunk, and return the error of preparing."""
    (images / "light" / "9.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"images can't be read: light/9.png \(.*\); put readable ones") as caught:
        prepare(preparing(images, images.parent / "out"))
    return str(caught.value)


def chunks_done(capsys):
    return re.findall(r"chunk (\d+) done", capsys.readouterr().out)


def test_a_broken_image_can_be_replaced(images, tmp_path, capsys):
    broken(images)
    capsys.readouterr()
    shutil.copy(images / "light" / "8.png", images / "light" / "9.png")
    prepare(preparing(images, tmp_path / "out"))
    assert chunks_done(capsys) == ["2"] and read_passport(tmp_path / "out").num_images == 24


def test_a_broken_image_can_be_left_out_afterwards(images, tmp_path, capsys):
    broken(images)
    capsys.readouterr()
    prepare(preparing(images, tmp_path / "out", skip_unreadable=True))
    assert chunks_done(capsys) == ["2"] and len(read_passport(tmp_path / "out").skipped) == 1
    with pytest.raises(UserError, match="holds a dataset without 1 unreadable images; accept that with skip_unread"):
        prepare(preparing(images, tmp_path / "out"))


def test_a_broken_image_can_be_removed_with_a_new_listing(images, tmp_path):
    advice = broken(images)
    (images / "light" / "9.png").unlink()
    with pytest.raises(UserError, match=r"light/9.png in .* was removed after the images had been listed; ") as caught:
        prepare(preparing(images, tmp_path / "out"))
    assert "storage" not in str(caught.value)
    for text in (advice, str(caught.value)):
        assert f"remove {tmp_path / 'out.partial'} (its 2 finished chunks are encoded again) and run the" in text
    shutil.rmtree(tmp_path / "out.partial")
    prepare(preparing(images, tmp_path / "out"))
    assert read_passport(tmp_path / "out").num_images == 23


def test_a_removed_image_can_be_left_out(images, tmp_path, capsys):
    broken(images)
    (images / "light" / "9.png").unlink()
    capsys.readouterr()
    prepare(preparing(images, tmp_path / "out", skip_unreadable=True))
    assert chunks_done(capsys) == ["2"]
    assert list(read_passport(tmp_path / "out").skipped.values()) == ["light/9.png (removed after it was listed)"]


def test_a_broken_image_can_be_removed_once_it_was_left_out(images, tmp_path):
    """It is broken in the first chunk; another one stops the run in the last."""
    (images / "dark" / "0.png").write_bytes(b"no image")
    (images / "light" / "9.png").unlink()
    (images / "light" / "9.png").symlink_to("nowhere")
    config = preparing(images, tmp_path / "out", skip_unreadable=True)
    with pytest.raises(UserError, match="cannot read light/9.png"):
        prepare(config)
    (images / "dark" / "0.png").unlink()
    (images / "light" / "9.png").unlink()
    prepare(config)
    assert len(read_passport(tmp_path / "out").skipped) == 2


def test_a_storage_that_is_away_is_no_removed_image(images, tmp_path):
    broken(images)
    (images / "light").rename(tmp_path / "away")
    for is_there in (False, True):  # a mount point is there when nothing is mounted
        with pytest.raises(UserError, match=r"cannot read light/6.png in .*; check that its storage is mounted"):
            prepare(preparing(images, tmp_path / "out", skip_unreadable=True))
        if not is_there:
            (images / "light").mkdir()


def test_a_broken_image_of_a_tar_can_be_left_out_or_written_again(images, tmp_path, capsys):
    found = images_of(images)
    found[-1] = (b"no image", 1)
    write_tars(tmp_path / "tars", found)
    with pytest.raises(UserError, match="write the file again without them and remove .*out.partial"):
        prepare(preparing(tmp_path / "tars", tmp_path / "out"))
    capsys.readouterr()
    prepare(preparing(tmp_path / "tars", tmp_path / "out", skip_unreadable=True))
    assert chunks_done(capsys) == ["2"]
    assert np.sum(read_passport(tmp_path / "out").class_counts) == 23
