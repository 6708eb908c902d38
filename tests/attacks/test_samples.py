"""Samples that were damaged, swapped, or made by somebody else: refused by name, or survived with the same images."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.records import read_record, write_record
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.evaluation.image_sets import open_images
from flowar.models.build import create_model
from flowar.models.folders import save_model
from flowar.sample import main
from flowar.sampling.folder import read_hashes, read_samples, write_new_hashes
from flowar.sampling.images import ImageSink
from flowar.sampling.job import check_same_samples, describe_samples, open_job
from flowar.sampling.worker import draw_job, draw_missing
from tests.conftest import ALL, MORE, change_bytes, flip_bit, randomise
from tests.processes import PATIENCE_S, Death, fork_context, start, stop

NUM = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, and what it drew with seeds 0 and 1."""
    root = tmp_path_factory.mktemp("attacked")
    model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1))
    save_model(model.config, model.state_dict(), root / "model")
    for seed in (0, 1):
        main(drawing(root, root / f"seed{seed}", seed=seed))
    return root


def drawing(root, out_dir, **changes):
    settings = {"num_images": NUM, "batch_size": 2, "chunk_batches": 1, "num_steps": 2, "vae": VAEConfig(name="demo")}
    return SampleConfig(model=str(root / "model"), out_dir=str(out_dir), **(settings | changes))


@pytest.fixture(scope="module")
def job(root):
    """The networks, loaded once."""
    return open_job(drawing(root, root / "seed0"))


@pytest.fixture
def drawn(root, tmp_path):
    """A copy of the samples of seed 0."""
    return shutil.copytree(root / "seed0", tmp_path / "drawn")


def draw(job, out_dir, **changes):
    """`flowar sample`, with networks that are loaded already."""
    own = dataclasses.replace(job, config=dataclasses.replace(job.config, out_dir=str(out_dir), **changes))
    draw_job(own, ImageSink(own))


def measured(folder):
    """Return what `flowar evaluate` measures: the images, by number."""
    images = open_images(folder, "samples")
    assert images.kind == "samples"
    return dict(zip(images.numbers, images.read_many(range(len(images))), strict=True))


def image(folder, number, label=None):
    return folder / "images" / f"{number:06d}_class{number % 10 if label is None else label:04d}.png"


def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def take_anothers(folder, root, names):
    for name in names:
        shutil.copy(root / "seed1" / name, folder / name)


def hash_all_anew(folder, root):
    """Another's image, and hashes that fit: `xxh64sum images/* > images.xxh64`."""
    shutil.copy(image(root / "seed1", 2), image(folder, 2))
    hash_images(folder)


def hash_images(folder):
    files = sorted((folder / "images").iterdir())
    lines = [f"{xxhash.xxh64(file.read_bytes()).hexdigest()}  images/{file.name}\n" for file in files]
    (folder / "images.xxh64").write_text("".join(lines))


def swap_two(folder):
    first, second = image(folder, 1).read_bytes(), image(folder, 2).read_bytes()
    image(folder, 1).write_bytes(second)
    image(folder, 2).write_bytes(first)
    hash_images(folder)


def cut(file):
    """Leave the first half, and no whole number of lines."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 + 7])


def keep_three(file):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))


NOT_ITS_HASH = r"000002_class0002.png does not have the hash in .*images.xxh64; delete it and run the same `flowar sam"
IN_THE_RECORD = r"samples.json is damaged \(.*; restore it from a copy, or draw the samples again"
OF_OTHERS = r"should be image [0-9a-f]{16}/\d by .*samples.json, but is"
OTHER_SETTINGS = "holds images drawn with other settings: seed was 1, now 0; give another out_dir"
IN_THE_HASHES = r"images.xxh64 is damaged \(.*; restore it from a copy, or delete it and run the same `flowar sample`"
IMAGE_2 = "images/000002_class0002.png"
NOT_ONE_OF_THESE = r"000002_class0005.png is not one of these samples: .*; move it elsewhere"
INCOMPLETE = "run the same `flowar sample` again to draw and hash the rest"
NO_RECORD = r"holds images/000000_class0000.png, but no samples.json, .*; restore .*samples.json from a copy, or draw"

# name -> what is done (to the folder, root), what evaluate says, what sample says (None: it is content and changes
# nothing, or draws again what is missing)
ATTACKS = {
    "no record": (lambda d, _: (d / "samples.json").unlink(), NO_RECORD, NO_RECORD),
    "half a record": (lambda d, _: cut(d / "samples.json"), IN_THE_RECORD, IN_THE_RECORD),
    "a list for a record": (lambda d, _: (d / "samples.json").write_text("[]"), IN_THE_RECORD, IN_THE_RECORD),
    "an empty record": (lambda d, _: (d / "samples.json").write_text("{}"), IN_THE_RECORD, IN_THE_RECORD),
    "an edited seed": (
        lambda d, _: rewrite(d / "samples.json", '"seed": 0', '"seed": 1'), IN_THE_RECORD, IN_THE_RECORD,
    ),
    "an edited count": (
        lambda d, _: rewrite(d / "samples.json", '"num_images": 6', '"num_images": 4'), IN_THE_RECORD, IN_THE_RECORD,
    ),
    "another's record": (
        lambda d, root: take_anothers(d, root, ["samples.json"]), OF_OTHERS, OTHER_SETTINGS,
    ),
    "another's record and hashes": (
        lambda d, root: take_anothers(d, root, ["samples.json", "images.xxh64"]), NOT_ITS_HASH.replace("2", "0"),
        OTHER_SETTINGS,
    ),
    "a cut image": (lambda d, _: cut(image(d, 2)), NOT_ITS_HASH, None),
    "an empty image": (lambda d, _: image(d, 2).write_bytes(b""), NOT_ITS_HASH, None),
    "a bit of an image": (lambda d, _: flip_bit(image(d, 2), 200), NOT_ITS_HASH, None),
    "another image of the set": (lambda d, _: shutil.copy(image(d, 1), image(d, 2)), NOT_ITS_HASH, None),
    "an image of another seed": (lambda d, root: take_anothers(d, root, [IMAGE_2]), NOT_ITS_HASH, None),
    "that, hashed anew": (hash_all_anew, OF_OTHERS, None),
    "two swapped, hashed anew": (lambda d, _: swap_two(d), OF_OTHERS, None),
    "a lost image": (lambda d, _: image(d, 2).unlink(), INCOMPLETE, None),
    "another label": (lambda d, _: image(d, 2).rename(image(d, 2, 5)), INCOMPLETE, NOT_ONE_OF_THESE),
    "one image more": (
        lambda d, _: shutil.copy(image(d, 1), image(d, 2, 5)), NOT_ONE_OF_THESE, NOT_ONE_OF_THESE,
    ),
    "half the hashes": (lambda d, _: cut(d / "images.xxh64"), IN_THE_HASHES, IN_THE_HASHES),
    "hashes of nothing": (lambda d, _: (d / "images.xxh64").write_text("a  b\n"), IN_THE_HASHES, IN_THE_HASHES),
    "hashes that are no text": (lambda d, _: (d / "images.xxh64").write_bytes(b"\xff\0"), IN_THE_HASHES, IN_THE_HASHES),
    "a hash elsewhere": (
        lambda d, _: rewrite(d / "images.xxh64", "images/", "../../images/"), IN_THE_HASHES, IN_THE_HASHES,
    ),
    "some of the hashes": (lambda d, _: keep_three(d / "images.xxh64"), INCOMPLETE, None),
    "no hashes": (lambda d, _: (d / "images.xxh64").unlink(), INCOMPLETE, None),
    "empty hashes": (lambda d, _: (d / "images.xxh64").write_text(""), INCOMPLETE, None),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_evaluate_names_what_is_wrong(root, drawn, attack):
    damage, message, _ = ATTACKS[attack]
    damage(drawn, root)
    with pytest.raises(UserError, match=message):
        measured(drawn)


@pytest.mark.parametrize("attack", ATTACKS)
def test_sample_refuses_or_draws_again_and_what_is_measured_then_is_what_was_drawn(root, job, drawn, attack):
    before = measured(drawn)
    damage, _, message = ATTACKS[attack]
    damage(drawn, root)
    if message is not None:
        with pytest.raises(UserError, match=message):
            draw(job, drawn)
        return
    follow_advice(job, drawn)
    after = measured(drawn)
    assert [number for number in before if np.abs(after[number].astype(int) - before[number]).max() > 1] == []
    assert_hashes_are_right(drawn)


def follow_advice(job, folder):
    """Draw, and delete the images that are to be deleted: that leads out, and not in circles."""
    for _ in range(3):
        try:
            draw(job, folder)
            measured(folder)
            return
        except UserError as error:
            assert "delete it and run the same `flowar sample` again" in str(error)
            Path(re.search(r"\S*images/\d+_class\d+.png", str(error))[0]).unlink()
    pytest.fail("no way out")


def assert_hashes_are_right(folder):
    hashes = read_hashes(folder / "images.xxh64")
    found = {file.name: xxhash.xxh64(file.read_bytes()).hexdigest() for file in (folder / "images").iterdir()}
    assert found == {name: hashes[name] for name in found} and not (folder / "hashes").exists()


@pytest.mark.parametrize("grid_images", [1, 100], ids=["not in the grid", "in the grid"])
def test_enlarging_a_set_does_not_make_a_replaced_image_valid(root, job, drawn, monkeypatch, grid_images):
    monkeypatch.setattr("flowar.sampling.images.GRID_IMAGES", grid_images)  # else 101 images would have to be drawn
    shutil.copy(image(root / "seed1", 2), image(drawn, 2))
    with pytest.raises(UserError, match=NOT_ITS_HASH):
        draw(job, drawn, num_images=NUM + 2)
        assert read_samples(drawn)["num_images"] == len(read_hashes(drawn / "images.xxh64")) == NUM + 2
        measured(drawn)


def test_an_image_cut_before_the_set_is_finished_is_not_hashed_as_good(job, tmp_path):
    draw_missing(own := with_folder(job, tmp_path), ImageSink(own), wait=False)  # all but the end
    cut(image(tmp_path, 2))
    with pytest.raises(UserError, match=NOT_ITS_HASH):  # the grid shows it
        draw(job, tmp_path)
    assert not (tmp_path / "images.xxh64").exists()
    image(tmp_path, 2).unlink()
    draw(job, tmp_path)
    assert len(measured(tmp_path)) == NUM
    assert_hashes_are_right(tmp_path)


def with_folder(job, out_dir, **changes):
    return dataclasses.replace(job, config=dataclasses.replace(job.config, out_dir=str(out_dir), **changes))


def test_a_redrawn_image_that_differs_in_a_bit_is_accepted(job, drawn):
    """As on another GPU: here the hash of what was there before is another one."""
    rewrite(drawn / "images.xxh64", xxhash.xxh64(image(drawn, 2).read_bytes()).hexdigest(), "0" * 16)
    with pytest.raises(UserError, match=NOT_ITS_HASH):
        measured(drawn)
    image(drawn, 2).unlink()
    draw(job, drawn)
    assert len(measured(drawn)) == NUM
    assert_hashes_are_right(drawn)


def test_images_of_which_nobody_noted_a_hash_are_drawn_again(root, job, tmp_path, capsys):
    draw_missing(own := with_folder(job, tmp_path, num_images=4), ImageSink(own), wait=False)
    for number in (4, 5):
        shutil.copy(image(root / "seed1", number), image(tmp_path, number))
    draw(job, tmp_path)
    assert "2 images in" in capsys.readouterr().out
    needed, found = measured(root / "seed0"), measured(tmp_path)
    assert all(np.array_equal(found[number], needed[number]) for number in needed)


def test_hashes_without_their_images_are_of_a_process_that_died_in_between(root, job, tmp_path):
    draw_missing(own := with_folder(job, tmp_path, num_images=4), ImageSink(own), wait=False)
    write_new_hashes(tmp_path, {image(tmp_path, number).name: "1" * 16 for number in (0, 4, 5)})
    draw(job, tmp_path)
    needed, found = measured(root / "seed0"), measured(tmp_path)
    assert all(np.array_equal(found[number], needed[number]) for number in needed)
    assert_hashes_are_right(tmp_path)


def test_a_half_written_note_of_hashes_is_named(job, tmp_path):
    draw_missing(own := with_folder(job, tmp_path, num_images=4), ImageSink(own), wait=False)
    note = sorted((tmp_path / "hashes").iterdir())[0]
    cut(note)
    with pytest.raises(UserError, match=f"{note.name} is damaged"):
        draw(job, tmp_path)
    note.unlink()
    draw(job, tmp_path)
    assert len(measured(tmp_path)) == NUM


def test_samples_of_an_unfinished_redraw_are_not_measured(job, drawn):
    image(drawn, 2).unlink()
    draw_missing(own := with_folder(job, drawn), ImageSink(own), wait=False)
    with pytest.raises(UserError, match=INCOMPLETE):
        measured(drawn)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, *(pytest.param(more, marks=MORE) for more in ({"num_steps": 3}, {"classes": (1, 2)}))]
)
def test_of_two_that_both_found_the_folder_empty_the_second_is_refused(job, tmp_path, change):
    jobs = [with_folder(job, tmp_path), with_folder(job, tmp_path, **change)]
    for own in jobs:
        check_same_samples(tmp_path, describe_samples(own))  # nothing there yet
    for own in jobs[:1]:
        draw_missing(own, ImageSink(own), wait=False)
    with pytest.raises(UserError, match="holds images drawn with other settings: "):
        draw_missing(jobs[1], ImageSink(jobs[1]))
    draw(job, tmp_path)
    assert len(measured(tmp_path)) == NUM


def race(config, barrier):
    """`flowar sample` as soon as the other process is there too."""
    barrier.wait(PATIENCE_S)
    main(config)


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, pytest.param(5, marks=MORE)])
def test_two_commands_with_other_seeds_started_together_never_mix(root, tmp_path, attempts):
    for attempt in range(attempts):
        out_dir, log = tmp_path / f"{attempt}", tmp_path / f"log{attempt}"
        barrier = fork_context().Barrier(2)
        racing = [start(race, drawing(root, out_dir, seed=seed), barrier, log=log) for seed in (0, 1)]
        for process in racing:
            process.join(PATIENCE_S)
        codes = [process.exitcode for process in racing]
        stop(racing)
        assert sorted(codes) == [0, 1], log.read_text()
        winner = codes.index(0)
        assert "holds images drawn with other settings: seed was" in log.read_text()
        needed, found = measured(root / f"seed{winner}"), measured(out_dir)
        assert all(np.array_equal(found[number], needed[number]) for number in needed)


def test_a_set_grows_and_a_smaller_number_is_refused(job, drawn):
    draw(job, drawn, num_images=NUM + 1)
    with pytest.raises(
        UserError, match=r"num_images=6 is less than the 7 images that out_dir=.*; set num_images=7, or give"
    ):
        draw(job, drawn)
    small = with_folder(job, drawn)
    draw_missing(small, ImageSink(small))  # one of the smaller call that is still at work
    assert len(measured(drawn)) == NUM + 1


def test_a_label_file_that_has_changed_is_noticed(job, tmp_path):
    file = tmp_path / "labels.txt"
    own = {"label_file": str(file)}
    file.write_text("3\n")
    draw(dataclasses.replace(job, classes=(3,)), tmp_path / "out", **own)
    with pytest.raises(UserError, match="holds images drawn with other settings: labels_xxh64 was"):
        draw(dataclasses.replace(job, classes=(4,)), tmp_path / "out", **own)


def pack_and_die(file):
    """Begin to write a file in a process of its own, which is killed in the middle of it; return its number."""
    pid = os.fork()
    if pid == 0:
        write_whole(file, lambda hidden: (hidden.write_bytes(b"gigabytes"), os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(pid, 0)
    return pid


@pytest.mark.parametrize("also", [(), ("npz",)])
def test_what_a_killed_packer_left_is_removed_by_the_next_run(job, drawn, also):
    pid = pack_and_die(drawn / "samples.npz")
    assert len(list(drawn.glob(f".samples.npz.{pid}.*"))) == 1
    (drawn / ".tar").mkdir()
    alive = drawn / f".samples.npz.{os.getpid()}.abcd"
    alive.touch()
    draw(job, drawn, also=also)
    assert [file.name for file in drawn.glob(".*")] == [alive.name]


def test_a_damaged_image_is_not_packed(job, drawn):
    image(drawn, NUM - 1).write_bytes(image(drawn, 1).read_bytes())
    with pytest.raises(UserError, match="000005_class0005.png does not have the hash"):
        draw(job, drawn, also=("tar",))
    assert not (drawn / "tar").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"npz": {"num_images": 7}, "xxh3": "0"}'])
def test_a_damaged_record_of_what_is_packed_is_named(job, drawn, damage):
    (drawn / "packed.json").write_text(damage)
    with pytest.raises(UserError, match="packed.json is damaged .*; delete it and run again, which packs"):
        draw(job, drawn, also=("npz",))


def test_samples_of_0_1_have_no_hash_in_their_record_and_none_of_their_own(job, drawn):
    record = read_record(drawn / "samples.json", "")
    (drawn / "samples.json").write_text(json.dumps({key: record[key] for key in record if key != "identity"}))
    for file in (drawn / "images").iterdir():
        Image.open(file).save(file)  # without the text
    hash_images(drawn)
    before = measured(drawn)
    draw(job, drawn, num_images=NUM + 1)
    assert all(np.array_equal(measured(drawn)[number], before[number]) for number in before)
    assert read_samples(drawn)["identity"]
    write_record(drawn / "samples.json", read_samples(drawn) | {"seed": 1})
    with pytest.raises(UserError, match="seed was 1, now 0"):
        draw(job, drawn, num_images=NUM + 1)


@pytest.mark.slow
def test_whenever_a_process_is_killed_every_image_has_its_hash_or_is_drawn_again(root, tmp_path):
    """While hashes are noted, while images are written, and while all is put together."""
    out_dir, log = tmp_path / "out", tmp_path / "log"
    deaths = [Death(at, str(out_dir / "hashes"), calls) for at, calls in ((2, 0), (4, 1))]
    deaths += [Death(at, str(out_dir / "images"), calls) for at, calls in ((5, 0), (8, 2))]
    deaths += [Death(1, str(out_dir / ".images.xxh64"))]  # with all images drawn, before their hashes are together
    deaths = deaths if ALL else deaths[::2]
    config = drawing(root, out_dir, num_images=24)
    for death in deaths:
        process = start(main, config, log=log, death=death)
        process.join(PATIENCE_S)
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
    with pytest.raises(UserError, match=INCOMPLETE):
        measured(out_dir)
    (out_dir / "hashes").mkdir(exist_ok=True)
    pack_and_die(out_dir / "hashes" / "000000_class0000.0123abcd.xxh64")  # two threads at once leave one half-written
    main(config)
    assert len(measured(out_dir)) == 24
    assert_hashes_are_right(out_dir)


@pytest.mark.parametrize("number", [100, pytest.param(2000, marks=MORE)])
def test_no_single_changed_byte_of_samples_passes_in_silence(drawn, number):
    """Either it is refused, or what is measured is the same."""
    needed, refused = measured(drawn), 0
    files = [drawn / "samples.json", drawn / "images.xxh64", *sorted((drawn / "images").iterdir())]
    for place in change_bytes(files, number):
        try:
            found = measured(drawn)
        except UserError:
            refused += 1
        else:
            assert all(np.array_equal(found[image], needed[image]) for image in needed), place
    assert refused > number / 2
