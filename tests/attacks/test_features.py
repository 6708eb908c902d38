"""Features, references, scores and numbers that were damaged, swapped, or made by somebody else."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from flowar import evaluate, sweep, train
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import find_latest
from flowar.config.measuring import ReferenceConfig
from flowar.evaluation.extractors import Extractor
from flowar.evaluation.references import prepare_features, prepare_reference
from flowar.evaluation.store import FeatureSink
from flowar.sampling.images import ImageSink
from flowar.sampling.job import open_job
from flowar.sampling.worker import draw_job
from tests.attacks.measured import NUM, drawing, judge, measuring, sweeping
from tests.attacks.test_checkpoints import Trap
from tests.attacks.test_samples import cut, rewrite
from tests.conftest import MORE, change_bytes, flip_bit, read_evaluations, training

STORE = "features-own"


@pytest.fixture(scope="module")
def root(measurable):
    """The objects that are measured."""
    return measurable


@pytest.fixture(scope="module")
def extractor(root):
    return Extractor(judge(root), torch.device("cpu"))


@pytest.fixture
def copied(root, tmp_path):
    """Copies of the features of seed 0 and of a reference."""
    shutil.copytree(root / "seed0", tmp_path / "seed0")
    shutil.copytree(root / "ref_real", tmp_path / "ref_real")
    return tmp_path


def first(folder, place=0):
    return sorted((folder / STORE).glob("features_*.safetensors"))[place]


def take(folder, other, name):
    """Put another's file in the place of this one's."""
    first(folder, 0).unlink() if name == "shard" else None
    source = first(other, 0) if name == "shard" else other / name
    shutil.copy(source, folder / source.relative_to(other))


def rename_shard(folder):
    """The features of images 10 to 19 as those of 0 to 9."""
    digest = first(folder, 1).name.rpartition("_")[2]
    first(folder, 0).unlink()
    shutil.copy(first(folder, 0), folder / STORE / f"features_00000000_00000009_{digest}")


DAMAGED_SHARD = (
    r"features_00000000_00000009_.*safetensors is damaged: .*; delete it and run the same `flowar sample` again"
)
DAMAGED_STORE = r"features.json is damaged \(.*; remove .*features-own and run again"
NOT_ITS_FEATURES = "holds features of samples .*, but .*samples.json describes"
DAMAGED_SAMPLES = r"samples.json is damaged"

SAMPLES = {
    "a bit of a shard": (lambda d, _: flip_bit(first(d), -5), DAMAGED_SHARD),
    "half a shard": (lambda d, _: cut(first(d)), DAMAGED_SHARD),
    "a shard of another seed": (lambda d, root: take(d, root / "seed1", "shard"), DAMAGED_SHARD.replace("; del.*", "")),
    "a shard of other places": (lambda d, _: rename_shard(d), DAMAGED_SHARD),
    "a lost shard": (
        lambda d, _: first(d).unlink(), "features of 10 images, but 20 are needed; run the same `flowar sam",
    ),
    "half a store's record": (lambda d, _: cut(d / STORE / "features.json"), DAMAGED_STORE),
    "an empty store's record": (lambda d, _: (d / STORE / "features.json").write_text("{}"), DAMAGED_STORE),
    "an edited store's record": (
        lambda d, _: rewrite(d / STORE / "features.json", '"num_images": 20', '"num_images": 30'), DAMAGED_STORE,
    ),
    "no store's record": (
        lambda d, _: (d / STORE / "features.json").unlink(), "was drawn with features_only=true and has no",
    ),
    "another's store's record": (
        lambda d, root: take(d, root / "seed1", f"{STORE}/features.json"), NOT_ITS_FEATURES,
    ),
    "another's samples.json": (
        lambda d, root: take(d, root / "seed1", "samples.json"), NOT_ITS_FEATURES,
    ),
    "half of samples.json": (lambda d, _: cut(d / "samples.json"), DAMAGED_SAMPLES),
    "fewer samples": (
        lambda d, _: rewrite(d / "samples.json", '"num_images": 20', '"num_images": 10'), DAMAGED_SAMPLES,
    ),
    "no samples.json": (lambda d, _: (d / "samples.json").unlink(), "but no samples.json, which records"),
}  # fmt: skip


@pytest.mark.parametrize("attack", SAMPLES)
def test_damaged_features_of_samples_are_named(root, extractor, copied, attack):
    damage, message = SAMPLES[attack]
    damage(copied / "seed0", root)
    with pytest.raises(UserError, match=message):
        prepare_features(copied / "seed0", "samples", extractor, copied / "out", measuring(root)).read()


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param("a bit of a shard", marks=MORE),
        pytest.param("half a shard", marks=MORE),
        "a shard of another seed",
        "a lost shard",
    ],
)
def test_following_the_advice_gives_the_same_features(root, extractor, copied, attack):
    folder = copied / "seed0"
    needed = prepare_features(folder, "samples", extractor, copied / "out", measuring(root)).read()
    SAMPLES[attack][0](folder, root)
    if attack != "a lost shard":
        first(folder).unlink()
    job = open_job(drawing(root, folder))
    draw_job(job, FeatureSink(job, extractor))
    found = prepare_features(folder, "samples", extractor, copied / "out", measuring(root)).read()
    assert torch.equal(found.numbers, needed.numbers) and torch.equal(found.labels, needed.labels)
    torch.testing.assert_close(found.layers["features"], needed.layers["features"])


def test_features_without_their_record_are_not_added_to(root, extractor, copied):
    (copied / "seed0" / STORE / "features.json").unlink()
    job = open_job(drawing(root, copied / "seed0"))
    with pytest.raises(
        UserError, match=r"holds features_0.*, but no features.json, .*; restore .* or remove that folder"
    ):
        draw_job(job, FeatureSink(job, extractor))


def object_npz(file):
    np.savez(file, mu=np.array([Trap(file.with_name("sprung"))], dtype=object), sigma=np.eye(1))


def odd_npz(file):
    np.savez(file, mu=np.array(["a"] * 64), sigma=np.eye(64))


def damaged_deflate(file):
    """Statistics that are compressed, with a broken stream in a good archive's directory."""
    np.savez_compressed(file, mu=np.zeros(64), sigma=np.random.default_rng(0).normal(size=(64, 64)))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    file.write_bytes(content)


STATISTICS = r"statistics.npz is not a readable .npz: .*; remove .*features-own and make the reference again"
REMADE = "make-reference` .remove .* first. again"

REFERENCES = {
    "a bit of the statistics": (lambda d, _: flip_bit(d / STORE / "statistics.npz", 900), STATISTICS),
    "half of the statistics": (lambda d, _: cut(d / STORE / "statistics.npz"), STATISTICS),
    "another's statistics": (lambda d, root: take(d, root / "ref_others", f"{STORE}/statistics.npz"), STATISTICS),
    "a bit of its features": (lambda d, _: flip_bit(first(d), -5), REMADE),
    "another's features": (lambda d, root: take(d, root / "ref_others", "shard"), REMADE),
    "half a record": (lambda d, _: cut(d / STORE / "features.json"), DAMAGED_STORE),
    "another's record": (lambda d, root: take(d, root / "ref_others", f"{STORE}/features.json"), STATISTICS),
    "no record": (
        lambda d, _: (d / STORE / "features.json").unlink(),
        "features-own has no features.json; remove",
    ),
}


@pytest.mark.parametrize("attack", REFERENCES)
def test_a_damaged_reference_is_named(root, extractor, copied, attack):
    damage, message = REFERENCES[attack]
    damage(copied / "ref_real", root)
    config = measuring(root, reference=copied / "ref_real")
    with pytest.raises(UserError, match=message):
        prepare_reference(config, extractor, copied / "out").read()


@pytest.mark.parametrize("make", [object_npz, odd_npz, damaged_deflate])
def test_foreign_statistics_are_data_and_named(root, extractor, tmp_path, make):
    make(tmp_path / "foreign.npz")
    with pytest.raises(UserError, match="foreign.npz is not a readable .npz: .*; copy or download it again"):
        prepare_reference(measuring(root, reference=tmp_path / "foreign.npz"), extractor, tmp_path / "out").read()
    assert not (tmp_path / "sprung").exists()


def test_half_made_references_of_dead_processes_are_removed(root, tmp_path):
    left = tmp_path / "ref" / f".{STORE}.abcd1234"
    left.mkdir(parents=True)
    config = ReferenceConfig(images=str(root / "real"), out_dir=str(tmp_path / "ref"), extractor=judge(root))
    evaluate.make_reference(config)
    assert [entry.name for entry in (tmp_path / "ref").iterdir()] == [STORE]


# Numbers.


@pytest.fixture
def without_page(monkeypatch):
    """The page with its pictures takes longer than all numbers, and is read by nobody here."""
    monkeypatch.setattr(evaluate, "write_evaluation_page", lambda *_: None)


@pytest.fixture(scope="module")
def measured(root):
    """An evaluation of the images."""
    evaluate.main(measuring(root, out_dir=root / "measured"))
    return root / "measured"


NUMBERS = {
    "half": cut,
    "nothing": lambda file: file.write_text(""),
    "a list": lambda file: file.write_text("[]"),
    "an edited number": lambda file: rewrite(file, '"value": ', '"value": 1'),
}


@pytest.mark.usefixtures("without_page")
@pytest.mark.parametrize("attack", NUMBERS)
def test_damaged_numbers_are_named_and_made_again(root, measured, tmp_path, attack, capsys):
    out_dir = shutil.copytree(measured, tmp_path / "out")
    before = read_record(out_dir / "metrics.json", "")
    NUMBERS[attack](out_dir / "metrics.json")
    config = measuring(root, out_dir=out_dir)
    with pytest.raises(
        UserError, match="metrics.json is damaged .*; delete it and run the same `flowar evaluate` again"
    ):
        evaluate.main(config)
    (out_dir / "metrics.json").unlink()
    evaluate.main(config)
    assert read_record(out_dir / "metrics.json", "")["metrics"] == before["metrics"]


@pytest.mark.usefixtures("without_page")
def test_numbers_against_statistics_that_were_replaced_since_are_made_again(root, tmp_path):
    statistics = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(tmp_path / "ref.npz", **statistics)
    config = measuring(root, reference=tmp_path / "ref.npz", out_dir=tmp_path / "out")
    found = []
    for shift in (0, 1):
        np.savez(tmp_path / "ref.npz", **(statistics | {"mu": statistics["mu"] + shift, "more": np.zeros(shift)}))
        evaluate.main(config)
        found.append(read_record(tmp_path / "out" / "metrics.json", "")["metrics"]["fid"]["value"])
    assert abs(found[1] - found[0]) > 1


def test_brackets_in_paths_are_neither_markup_nor_html(root, tmp_path, capsys):
    folder = tmp_path / "[" / "x]{x}<img src=x>&"
    for name in ("images", "ref_real"):
        shutil.copytree(root / name, folder / name)
    evaluate.main(measuring(root, samples=folder / "images", reference=folder / "ref_real", out_dir=folder / "out"))
    assert f"{folder / 'out'}/metrics.json and report.html are written" in capsys.readouterr().out
    page = (folder / "out" / "report.html").read_text()
    assert "[/x]{x}&lt;img src=x&gt;&amp;/images" in page and "<img src=x>" not in page


@MORE
def test_brackets_in_paths_are_no_markup_where_a_sweep_names_them(root, tmp_path, capsys):
    folder = tmp_path / "[" / "x]{x}<img src=x>&"
    shutil.copytree(root / "ref_real", folder / "ref_real")
    sweep.main(sweeping(root, folder / "swept", reference=str(folder / "ref_real"), guidance=(1.0,)))
    assert f"see {folder / 'swept'}/recipe.yaml" in capsys.readouterr().out


@pytest.mark.usefixtures("without_page")
def test_numbers_of_another_command_are_not_shown_as_ones_own(root, measured, tmp_path, monkeypatch):
    """Another process with other settings writes its numbers just after this one: the patch chooses that moment."""
    out_dir = shutil.copytree(measured, tmp_path / "out")
    finish = evaluate.finish_together

    def finish_and_be_overtaken(*arguments):
        has_finished = finish(*arguments)
        shutil.copy(measured / "metrics.json", out_dir / "metrics.json")
        return has_finished

    monkeypatch.setattr(evaluate, "finish_together", finish_and_be_overtaken)
    with pytest.raises(UserError, match="metrics.json holds other numbers: another `flowar evaluate` with other"):
        evaluate.main(dataclasses.replace(measuring(root, out_dir=out_dir), protocol="adm"))


@pytest.fixture(scope="module")
def of_a_run(root, shards, tmp_path_factory):
    """Two runs, and samples of one of them, drawn with the VAE that the run names."""
    runs = tmp_path_factory.mktemp("runs")
    train.main(training(shards, runs / "a", epochs=1))
    train.main(training(shards, runs / "b", epochs=1, seed=1))
    config = dataclasses.replace(drawing(root, runs / "samples"), model=str(runs / "a"), vae=None)
    job = open_job(config)
    draw_job(job, ImageSink(job))
    return runs


def evaluate_copy(root, runs, tmp_path, change=None, **settings):
    """Evaluate a copy of the samples whose record was changed."""
    samples = shutil.copytree(runs / "samples", tmp_path / "samples")
    if change is not None:
        values = read_record(samples / "samples.json", "") | change
        write_record(samples / "samples.json", values)
    evaluate.main(measuring(root, samples=samples, out_dir=tmp_path / "out", **settings))
    return read_record(tmp_path / "out" / "metrics.json", "")["notes"]


@pytest.fixture
def runs(of_a_run, without_page):
    """Both runs without evaluations."""
    for name in ("a", "b"):
        shutil.rmtree(of_a_run / name / "evaluations", ignore_errors=True)
    return of_a_run


def test_samples_of_a_runs_checkpoint_are_added_to_it(root, runs, tmp_path):
    evaluate_copy(root, runs, tmp_path)
    (record,) = read_evaluations(runs / "a")
    assert record["step"] == 3 and record["num_samples"] == NUM


def test_samples_that_name_another_run_are_not_added_to_it(root, runs, tmp_path):
    notes = evaluate_copy(root, runs, tmp_path, {"model": str(find_latest(runs / "b"))})
    assert read_evaluations(runs / "b") == [] and read_evaluations(runs / "a") == []
    assert [note for note in notes if f"not added to {runs / 'b'}: samples=" in note]
    shutil.rmtree(tmp_path / "samples")
    with pytest.raises(
        UserError, match=r"were drawn with weights [0-9a-f]{12}, which .*b/checkpoints/.* does not have"
    ):
        evaluate_copy(root, runs, tmp_path, run_dir=str(runs / "b"))
    assert read_evaluations(runs / "b") == []


def test_samples_of_a_checkpoint_that_is_gone_go_only_to_a_run_that_is_named(root, runs, tmp_path):
    notes = evaluate_copy(root, runs, tmp_path, {"step": 2})
    assert read_evaluations(runs / "a") == []
    assert [note for note in notes if "it no longer has a checkpoint of step 2; to add it, give run_dir=" in note]
    shutil.rmtree(tmp_path / "samples")
    evaluate_copy(root, runs, tmp_path, {"step": 2}, run_dir=str(runs / "a"))
    assert [record["step"] for record in read_evaluations(runs / "a")] == [2]


def test_samples_whose_record_was_edited_are_added_to_nothing(root, runs, tmp_path):
    samples = shutil.copytree(runs / "samples", tmp_path / "samples")
    rewrite(samples / "samples.json", '"step": 3', '"step": 5')
    with pytest.raises(UserError, match=DAMAGED_SAMPLES):
        evaluate.main(measuring(root, samples=samples, out_dir=tmp_path / "out"))
    assert read_evaluations(runs / "a") == []


def test_shards_of_0_1_name_nobody_and_are_read(root, extractor, copied):
    folder = copied / "seed0"
    store = prepare_features(folder, "samples", extractor, copied / "out", measuring(root))
    found = store.read()
    for file in [first(folder, 0), first(folder, 1)]:
        content = safetensors.torch.save(safetensors.torch.load(file.read_bytes()))  # without the metadata
        start = file.name.rpartition("_")[0]
        file.unlink()
        file.with_name(f"{start}_{xxhash.xxh64(content).hexdigest()}.safetensors").write_bytes(content)
    record = read_record(folder / STORE / "features.json", "")
    (folder / STORE / "features.json").write_text(json.dumps(record))
    assert torch.equal(store.read().layers["features"], found.layers["features"])


@pytest.mark.parametrize("number", [100, pytest.param(2000, marks=MORE)])
def test_no_single_changed_byte_of_features_passes_in_silence(root, extractor, copied, number):
    """Either it is refused, or all that is read is the same."""
    config = measuring(root, reference=copied / "ref_real")

    def read():
        own = prepare_features(copied / "seed0", "samples", extractor, copied / "out", config).read()
        real = prepare_reference(config, extractor, copied / "out").read()
        statistics = [torch.from_numpy(array) for array in real.statistics["features"]]
        both = [
            (found.numbers, found.labels, *(found.layers[name] for name in sorted(found.layers)))
            for found in (own, real.features)
        ]
        return [*statistics, *both[0], *both[1]]

    needed, refused = read(), 0
    files = [file for folder in ("seed0", "ref_real") for file in (copied / folder).rglob("*") if file.is_file()]
    for place in change_bytes(sorted(files), number):
        try:
            found = read()
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(own, other) for own, other in zip(found, needed, strict=True)), place
    assert refused > number / 2
