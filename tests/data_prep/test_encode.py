import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_prep.chunks import ChunkWriter
from data_prep.crops import decode_image, make_views
from data_prep.encode import describe_sizes, list_images, main
from data_prep.sources import Source, open_source
from flowar import cli
from flowar.base.errors import UserError
from flowar.config.data import DataConfig, PrepareConfig, VAEConfig
from flowar.latents.schema import read_passport
from flowar.latents.shards import LatentShards
from flowar.latents.vae import from_uint8, load_vae
from tests.conftest import ALL, KILLS_ASKED
from tests.data_prep.test_sources import images_of, write_parquet, write_tars
from tests.processes import draw_deaths, join, run_with_deaths, start, wait_until

NUM_KILLS = KILLS_ASKED or 4


def preparing(images, out_dir, **changes):
    settings = {"vae": VAEConfig(name="demo"), "image_size": 32, "num_workers": 0, "chunk_images": 10}
    return PrepareConfig(images=str(images), out_dir=str(out_dir), **(settings | changes))


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def open_shards(folder):
    return LatentShards(DataConfig(path=str(folder)))


def test_rows_hold_the_moments_of_every_view_of_every_image_in_order(image_folder, shards):
    stored, vae, source = open_shards(shards), load_vae("demo"), open_source(str(image_folder))
    assert len(stored) == 2 * len(source) == 48
    rows = stored.read(range(48))
    for image in (0, 9, 10, 23):
        views = make_views(decode_image(source.read(image)), preparing("", ""), image)
        with torch.no_grad():
            expected = vae.encode(from_uint8(torch.from_numpy(views).permute(0, 3, 1, 2)))
        found = rows[2 * image : 2 * image + 2]
        assert found["label"].tolist() == [source.labels[image]] * 2
        torch.testing.assert_close(torch.from_numpy(found["moments"]).float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "changes", [{"crop": "random", "views": 3}, {"crop": "ten_crop"}, {"flip": False}, {"moments_dtype": "float32"}]
)
def test_every_policy_can_be_stored_and_read(image_folder, tmp_path, changes):
    main(preparing(image_folder, tmp_path / "out", **changes))
    passport = read_passport(tmp_path / "out")
    views = {"random": 3, "ten_crop": 10, "center": 2}[passport.crop] if passport.flip else 1
    assert (passport.num_images, passport.views, passport.num_rows) == (24, views, 24 * views)
    rows = open_shards(tmp_path / "out").read(range(passport.num_rows))
    assert rows["moments"].dtype == passport.moments_dtype
    assert (passport.rounding_error_max == 0) == (passport.moments_dtype == "float32")


def test_loader_processes_give_the_same_bytes(image_folder, shards, tmp_path):
    main(preparing(image_folder, tmp_path / "a", num_workers=2))
    assert contents(tmp_path / "a") == contents(shards)


def test_tar_and_parquet_sources_give_the_same_rows(image_folder, shards, tmp_path):
    images = images_of(image_folder)
    write_tars(tmp_path / "tars", images)
    write_parquet(tmp_path / "parquet", images, names=["dark", "light"])
    needed = read_passport(shards)
    for name, workers in (("tars", 2), ("parquet", 0)):
        main(preparing(tmp_path / name, tmp_path / f"{name}_out", num_workers=workers))
        found = read_passport(tmp_path / f"{name}_out")
        assert found.shard_hashes == needed.shard_hashes
        assert found.source_kind == {"tars": "webdataset", "parquet": "parquet"}[name]


def test_shards_open_with_mosaicml_streaming_alone(shards):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(shards), batch_size=4)
    assert sorted(int(sample["label"]) for sample in dataset) == [0] * 24 + [1] * 24
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["moments"].shape == (4, 2, 8, 8) and batch["moments"].dtype == torch.float16


def test_the_passport_says_what_was_made_and_how(image_folder, shards):
    passport, vae = read_passport(shards), load_vae("demo")
    assert passport.vae_sha256 == vae.weights_sha256
    assert passport.latent_multiplier == vae.latent_multiplier
    assert passport.class_names == ["dark", "light"] and passport.class_counts == [12, 12]
    assert (passport.num_images, passport.image_size, passport.crop, passport.skipped) == (24, 32, "center", {})
    assert passport.listing_sha256 == open_source(str(image_folder)).sha256()
    assert passport.encoded_with[0]["torch"] == torch.__version__.split("+")[0]
    assert sorted(passport.shard_hashes) == [f"{chunk:05d}/shard.00000.mds" for chunk in range(3)]
    assert Source.load(shards / "listing.json.gz").names == open_source(str(image_folder)).names


def test_measured_figures_are_those_of_the_stored_moments(image_folder, shards, tmp_path):
    passport = read_passport(shards)
    mean, log_variance = np.split(open_shards(shards).read(range(48))["moments"].astype(np.float64), 2, axis=1)
    latents = mean + np.exp(log_variance / 2) * np.random.default_rng(0).standard_normal(mean.shape)
    assert passport.latent_mean == pytest.approx(mean.mean(axis=(0, 2, 3)))
    assert passport.latent_std == pytest.approx(latents.std(axis=(0, 2, 3)), rel=0.01)
    assert 1 / passport.measured_multiplier == pytest.approx(latents.std(), rel=0.01)
    main(preparing(image_folder, tmp_path / "exact", moments_dtype="float32"))
    exact = open_shards(tmp_path / "exact").read(range(48))["moments"]
    error = exact.astype(np.float16).astype(np.float64) - exact
    assert passport.rounding_error_max == pytest.approx(np.abs(error).max(), rel=0.01)
    assert passport.rounding_error_rms == pytest.approx(np.sqrt(np.square(error).mean()), rel=0.01)


def test_what_the_vae_loses_is_measured_and_a_vae_that_does_not_fit_is_said(shards, image_folder, tmp_path, capsys):
    vae, squared = load_vae("demo"), []
    for file in sorted(image_folder.glob("*/*.png")):  # 24 of them: every one is looked at
        view = torch.from_numpy(make_views(decode_image(file.read_bytes()), preparing("", ""), 0)[:1]).permute(
            0, 3, 1, 2
        )
        mean, _ = vae.encode(from_uint8(view)).chunk(2, dim=1)
        back = ((vae.decode(mean * vae.latent_multiplier) + 1) * 127.5).round().clamp(0, 255)
        squared.append((back - view).square())
    psnr = 10 * torch.log10(255**2 / torch.cat(squared).mean())
    assert read_passport(shards).psnr_db == pytest.approx(psnr.item(), abs=0.06)
    (tmp_path / "noise" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise" / "a" / "0.png")
    main(preparing(tmp_path / "noise", tmp_path / "out"))
    assert "WARNING: below 22 dB the VAE doesn't fit these images" in capsys.readouterr().out


def test_unreadable_images_stop_by_name_or_are_left_out_on_request(image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "dark" / "3.png").write_bytes(b"no image")
    cut = images / "light" / "0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(UserError, match=r"images can't be read: dark/3\.png \(.*\); .*skip_unreadable=true"):
        main(preparing(images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    out = tmp_path / "skipped"
    main(preparing(images, out, skip_unreadable=True))
    passport = read_passport(out)
    assert passport.class_counts == [11, 11] and passport.num_images == 22
    listed = open_source(str(images)).names
    assert {listed[int(number)] for number in passport.skipped} == {"dark/3.png", "light/0.png"}
    assert "left out 2 images" in capsys.readouterr().out
    assert open_shards(out).read([43])["label"] == 1


def test_images_that_nobody_can_read_make_no_dataset(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images in .* can be read"):
        main(preparing(tmp_path / "images", tmp_path / "out", skip_unreadable=True))
    assert not (tmp_path / "out").exists()


def test_a_wrong_source_or_size_leaves_nothing_behind(image_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for images, changes, message in (
        (tmp_path / "none", {}, "does not exist; it has to hold"),
        (tmp_path / "empty", {}, "has no sub-folders"),
        (image_folder, {"image_size": 30}, "image_size=30 is not a multiple of the stride"),
    ):
        with pytest.raises(UserError, match=message):
            main(preparing(images, tmp_path / "out", **changes))
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_a_finished_dataset_is_left_alone_and_refused_for_other_settings(image_folder, shards, capsys):
    before = contents(shards)
    main(preparing(image_folder, shards))
    assert "24 images x 2 views" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"holds a dataset with crop=center, not random; views=2, not 10; resize=32, not 36"
    ):
        main(preparing(image_folder, shards, crop="random"))
    assert contents(shards) == before


def test_a_finished_dataset_of_version_0_1_is_left_alone(image_folder, shards, tmp_path):
    """Its passport is of schema version 2, and has no hash."""
    out = shutil.copytree(shards, tmp_path / "out")
    passport = json.loads((out / "dataset.json").read_text()) | {"schema_version": 2, "skip_unreadable": True}
    for name in ("xxh3", "shards"):
        del passport[name]
    (out / "dataset.json").write_text(json.dumps(passport))
    before = contents(out)
    main(preparing(image_folder, out))
    assert contents(out) == before


def test_a_foreign_folder_is_not_written_into(image_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, but not a dataset"):
        main(preparing(image_folder, tmp_path))


def test_a_worker_with_other_settings_is_refused(image_folder, tmp_path):
    partial = tmp_path / "out.partial"
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "light" / "11.png").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        main(preparing(images, tmp_path / "out"))
    assert partial.exists()  # two of three chunks are done
    with pytest.raises(UserError, match=r"out\.partial was begun with chunk_images=10, not 5; use the same settings"):
        main(preparing(images, tmp_path / "out", chunk_images=5))


def test_only_unfinished_chunks_are_done_again(image_folder, shards, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(image_folder, images)
    last = images / "light" / "9.png"  # the last by name
    content = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(UserError):
        main(preparing(images, out))
    last.write_bytes(content)
    capsys.readouterr()
    main(preparing(images, out))
    assert re.findall(r"chunk (\d+) done", capsys.readouterr().out) == ["2"]
    assert read_passport(out).shard_hashes == read_passport(shards).shard_hashes


def prepare_on_a_full_disk(words):
    """Where no file gets larger than 2,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    cli.main(["prepare", *words])


@pytest.mark.slow
def test_a_full_disk_stops_with_a_message(image_folder, tmp_path):
    words = [f"images={image_folder}", f"out_dir={tmp_path / 'out'}", "vae.name=demo", "image_size=32", "num_workers=0"]
    log = tmp_path / "log"
    join([start(prepare_on_a_full_disk, words, log=log)], log, code=1)
    found = log.read_text().splitlines()[-1]
    assert re.match(r"flowar prepare: can't write to .*out\.partial: .*File too large", found)
    assert not (tmp_path / "out").exists()


NUM_CHUNKS, CHUNK_IMAGES = 40, 75 if ALL else 10


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """Images of five classes, for 40 chunks."""
    root = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0).integers(0, 256, (NUM_CHUNKS * CHUNK_IMAGES, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        folder = root / str(number % 5)
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=1)
    return root


@pytest.mark.slow
def test_sigkill_of_workers_at_random_moments_ends_in_the_same_bytes(many_images, tmp_path):
    """Four workers at a time."""
    settings = {"chunk_images": CHUNK_IMAGES, "crop": "random", "views": 4, "lease_s": 5}
    main(preparing(many_images, tmp_path / "undisturbed", **settings))
    config, log = preparing(many_images, tmp_path / "killed", num_workers=1, **settings), tmp_path / "log"
    uses = 8 * NUM_CHUNKS  # and more, of files that begin with the name
    deaths = draw_deaths(2 * NUM_KILLS, uses // (2 * NUM_KILLS), tmp_path / "killed")
    run_with_deaths(main, config, num_workers=4, deaths=deaths, log=log)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["killed", "log", "undisturbed"]
    done = re.findall(r"chunk (\d+) done", log.read_text())
    assert len(done) == len(set(done)) >= NUM_CHUNKS - len(deaths)  # who dies in between can't say that one is done


@pytest.mark.slow
def test_torchrun_ranks_share_the_work(image_folder, shards, tmp_path):
    words = [f"images={image_folder}", f"out_dir={tmp_path / 'out'}", "vae.name=demo", "image_size=32", "num_workers=0"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "flowar", "prepare"]
    found = subprocess.run(
        [sys.executable, *command, *words, "chunk_images=10"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "out") == contents(shards)
    encoded = [int(count) for count in re.findall(r"encoded (\d+) images", found.stdout)]
    assert len(encoded) in (1, 2) and sum(encoded) == 24  # one that comes when all is done has nothing to say


@pytest.mark.slow
def test_workers_may_join_at_any_time_and_all_of_them_end_well(image_folder, tmp_path):
    """Some come before the plan, some while the last one tidies up, some when all is done; chunks are empty."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    for number in range(12):
        (images / "dark" / f"{number}.png").write_bytes(b"")
    log = tmp_path / "log"
    (tmp_path / "out").mkdir()
    for attempt in range(4):
        out = tmp_path / "out" / str(attempt)
        config = preparing(images, out, skip_unreadable=True, chunk_images=3)
        workers = [start(main, config, log=log) for _ in range(4)]
        partial = out.with_name(f"{attempt}.partial")
        for sight in (partial, partial / "plan.json", partial / "dataset.json"):
            wait_until(lambda sights=(sight, out): any(path.exists() for path in sights), workers, log)
            workers.append(start(main, config, log=log))
        join([*workers, start(main, config, log=log)], log)
        assert len(open_shards(out)) == 24 and sorted(entry.name for entry in out.iterdir())[:4] == [
            "00004",
            "00005",
            "00006",
            "00007",
        ]
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["0", "1", "2", "3"]


def test_a_chunk_of_a_silent_worker_of_another_machine_is_taken_over_after_a_lease(image_folder, shards, tmp_path):
    claims = tmp_path / "out.claims"
    claims.mkdir()
    owner = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "started": "0.000", "beat": "000000001"}
    (claims / "000001.0").write_text(json.dumps(owner))
    began = time.monotonic()
    main(preparing(image_folder, tmp_path / "out", lease_s=3))
    assert time.monotonic() - began > 3  # the least that it waits, on any machine
    assert contents(tmp_path / "out") == contents(shards)
    assert not claims.exists()


def test_a_chunk_that_another_has_finished_meanwhile_is_left_as_it_is(shards, tmp_path):
    settings = vars(read_passport(shards))
    writers = []
    for _ in range(2):
        writers.append(ChunkWriter(tmp_path, 0, settings, {}))
        writers[-1].hidden = writers[-1].hidden.rename(tmp_path / f".{len(writers)}")  # as if of another process
    for number, writer in enumerate(writers):
        writer.add(np.full((2, 2, 8, 8), number, np.float32), [0], ["a"])
        writer.writer.local = str(writer.hidden)
        writer.publish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000"]
    assert json.loads((tmp_path / "00000" / "chunk.json").read_text())["statistics"]["means"] == [0.0]


def test_images_that_cannot_be_got_at_stop_the_run_and_are_not_skipped(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "dark" / "3.png").unlink()
    (images / "dark" / "3.png").symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"cannot read dark/3.png in .*No such file.*; check that its storage is mounted"
    ):
        main(preparing(images, tmp_path / "out", skip_unreadable=True))


def test_a_merge_that_was_cut_off_is_finished(image_folder, shards, tmp_path):
    """Every state between the written passport and the renamed folder."""
    needed = contents(shards)
    for left_over in (["plan.json", "00002/chunk.json", "00001/index.json"], ["00002/chunk.json"], []):
        partial = tmp_path / "out.partial"
        shutil.copytree(shards, partial)
        for name in left_over:
            (partial / name).write_text("{}")
        if "plan.json" in left_over:
            record = json.loads((shards / "dataset.json").read_text())
            (partial / "plan.json").write_text(json.dumps(record))
        main(preparing(image_folder, tmp_path / "out"))
        assert contents(tmp_path / "out") == needed
        shutil.rmtree(tmp_path / "out")
        assert not any(tmp_path.iterdir())


def test_a_chunk_with_more_than_ten_classes_is_finished(tmp_path):
    """Class numbers are keys of its record: as numbers 9 comes before 10, as texts after it."""
    for label in range(12):
        (tmp_path / "images" / f"{label:02d}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * label, 0, 0)).save(tmp_path / "images" / f"{label:02d}" / "0.png")
    main(
        PrepareConfig(
            images=str(tmp_path / "images"),
            out_dir=str(tmp_path / "shards"),
            vae=VAEConfig(name="demo"),
            image_size=32,
            num_workers=0,
        )
    )
    assert read_passport(tmp_path / "shards").class_counts == [1] * 12


def test_sizes_that_do_not_fit_are_said_before_anything_is_encoded(image_folder):
    """Its images are 36 x 40 px."""
    config = PrepareConfig(images=str(image_folder), out_dir="out", image_size=64)
    enlarged, cut = describe_sizes(list_images(config), config)
    assert enlarged.startswith(
        "WARNING: 24 of 24 images looked at are smaller than image_size=64 (the smallest: 36 px)"
    )
    assert cut.startswith("24 of 24 images looked at are not square: 10% of them is cut off on average, 10% at most")


def test_latents_whose_std_is_not_one_are_said_with_the_remedy(image_folder, tmp_path, capsys):
    config = PrepareConfig(
        images=str(image_folder),
        out_dir=str(tmp_path / "out"),
        vae=VAEConfig(name="pixels"),
        image_size=32,
        num_workers=0,
    )
    main(config)
    assert re.search(
        r"WARNING: by its own number 1 .* std of 0\.\d+ instead of 1; train with data.normalize=channel",
        capsys.readouterr().out,
    )
