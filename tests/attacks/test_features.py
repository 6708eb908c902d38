"""Features, references, scores and numbers that were damaged, swapped, or made by somebody else."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from PIL import Image

from flowar import evaluate, sweep, train
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import find_latest
from flowar.config.data import ExtractorConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.measuring import EvaluateConfig, ReferenceConfig, SweepConfig
from flowar.evaluation.digits import DigitClassifier, save_classifier
from flowar.evaluation.extractors import DEMO_EXTRACTOR, Extractor
from flowar.evaluation.references import prepare_features, prepare_reference
from flowar.evaluation.store import FeatureSink
from flowar.models.build import create_model
from flowar.models.folders import save_model
from flowar.sampling.images import ImageSink
from flowar.sampling.job import open_job
from flowar.sampling.worker import draw_job
from tests.attacks.test_checkpoints import Trap
from tests.attacks.test_samples import cut, rewrite
from tests.conftest import flip_bit, randomise, read_evaluations, training

NUM = 20
STORE = "features-demo-classifier"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, an untrained judge, real images, features of samples of seeds 0 and 1, and two references."""
    root = tmp_path_factory.mktemp("features")
    model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1))
    save_model(model.config, model.state_dict(), root / "model")
    torch.manual_seed(0)
    save_classifier(DigitClassifier().eval(), root / "judge.safetensors")
    random = np.random.default_rng(0)
    for name in ("real", "others"):
        (root / name).mkdir()
        for number in range(NUM):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
        settings = {"images": str(root / name), "out_dir": str(root / f"ref_{name}"), "extractor": judge(root)}
        evaluate.make_reference(ReferenceConfig(**settings))
    job, extractor = open_job(drawing(root, root / "seed0")), Extractor(judge(root), torch.device("cpu"))
    for seed in (0, 1):
        config = drawing(root, root / f"seed{seed}", seed=seed)
        own = dataclasses.replace(job, config=config)
        draw_job(own, FeatureSink(own, extractor))
    own = dataclasses.replace(job, config=drawing(root, root / "images"))
    draw_job(own, ImageSink(own))
    return root


def judge(root):
    return ExtractorConfig(name=DEMO_EXTRACTOR, weights=str(root / "judge.safetensors"))


def drawing(root, out_dir, **changes):
    settings = {"num_images": NUM, "batch_size": 10, "chunk_batches": 1, "num_steps": 2, "vae": VAEConfig(name="demo")}
    return SampleConfig(model=str(root / "model"), out_dir=str(out_dir), extractor=judge(root), **(settings | changes))


@pytest.fixture(scope="module")
def extractor(root):
    return Extractor(judge(root), torch.device("cpu"))


def measuring(root, **changes):
    settings = {"samples": root / "images", "reference": root / "ref_real", "out_dir": root / "out"} | changes
    more = {name: settings.pop(name) for name in list(settings) if name not in ("samples", "reference", "out_dir")}
    paths = {name: str(value) for name, value in settings.items()}
    return EvaluateConfig(extractor=judge(root), protocol="torch-fidelity", interval_groups=0, **paths, **more)


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
DAMAGED_STORE = r"features.json is damaged \(.*; remove .*features-demo-classifier and run again"
NOT_ITS_FEATURES = "holds features of samples .*, but .*samples.json says"
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
    "no samples.json": (lambda d, _: (d / "samples.json").unlink(), "but no samples.json, which says of which"),
}  # fmt: skip


@pytest.mark.parametrize("attack", SAMPLES)
def test_damaged_features_of_samples_are_named(root, extractor, copied, attack):
    damage, message = SAMPLES[attack]
    damage(copied / "seed0", root)
    with pytest.raises(UserError, match=message):
        prepare_features(copied / "seed0", "samples", extractor, copied / "out", measuring(root)).read()


@pytest.mark.parametrize("attack", ["a bit of a shard", "half a shard", "a shard of another seed", "a lost shard"])
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


STATISTICS = (
    r"statistics.npz is not a readable .npz: .*; remove .*features-demo-classifier and make the reference again"
)
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
        "features-demo-classifier has no features.json; remove",
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


def test_numbers_of_another_command_are_not_shown_as_ones_own(root, measured, tmp_path, monkeypatch):
    """Another process with other settings writes its numbers just after this one."""
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
def runs(of_a_run):
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
    assert [note for note in notes if "it has no checkpoint of step 2 any more; to add it, give run_dir=" in note]
    shutil.rmtree(tmp_path / "samples")
    evaluate_copy(root, runs, tmp_path, {"step": 2}, run_dir=str(runs / "a"))
    assert [record["step"] for record in read_evaluations(runs / "a")] == [2]


def test_samples_whose_record_was_edited_are_added_to_nothing(root, runs, tmp_path):
    samples = shutil.copytree(runs / "samples", tmp_path / "samples")
    rewrite(samples / "samples.json", '"step": 3', '"step": 5')
    with pytest.raises(UserError, match=DAMAGED_SAMPLES):
        evaluate.main(measuring(root, samples=samples, out_dir=tmp_path / "out"))
    assert read_evaluations(runs / "a") == []


# Sweeps.


def sweeping(root, out_dir, **changes):
    base = dataclasses.replace(drawing(root, "x"), features_only=False)
    settings = {
        "model": str(root / "model"),
        "reference": str(root / "ref_real"),
        "out_dir": str(out_dir),
        "sample": base,
        "guidance": (1.0, 2.0),
        "interval_ends": (1.0,),
        "num_steps": (2,),
        "num_images": (NUM,),
        "interval_groups": 0,
        "extractor": judge(root),
    }
    return SweepConfig(**(settings | changes))


@pytest.fixture(scope="module")
def swept(root):
    sweep.main(sweeping(root, root / "swept"))
    return root / "swept"


def score_file(folder, place):
    return sorted(folder.glob(f"settings/*/score_{NUM}.json"))[place]


SWEEPS = {
    "half the settings": (lambda d: cut(d / "config.json"), "config.json is damaged"),
    "no settings": (lambda d: (d / "config.json").unlink(), "is of a sweep, but .*config.json is not there"),
    "edited settings": (lambda d: rewrite(d / "config.json", '"seed": 0', '"seed": 3'), "config.json is damaged"),
    "half the results": (lambda d: cut(d / "sweep.json"), "sweep.json is damaged .*; delete it and run the same"),
    "half a score": (lambda d: cut(score_file(d, 0)), f"score_{NUM}.json is damaged .*; delete it and run the same"),
    "an edited score": (lambda d: rewrite(score_file(d, 0), '"fid": ', '"fid": 1'), f"score_{NUM}.json is damaged"),
    "a score of nothing": (lambda d: score_file(d, 0).write_text("{}"), f"score_{NUM}.json is damaged"),
    "another's score": (
        lambda d: shutil.copy(score_file(d, 1), score_file(d, 0)), f"score_{NUM}.json is of other images: setting is",
    ),
    "half the reference": (lambda d: cut(d / "reference.json"), "reference.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("attack", SWEEPS)
def test_a_damaged_sweep_is_named(root, swept, tmp_path, attack):
    shutil.copytree(swept, tmp_path / "swept", ignore=shutil.ignore_patterns("models"))
    (tmp_path / "swept" / "models").symlink_to(swept / "models")
    damage, message = SWEEPS[attack]
    damage(tmp_path / "swept")
    with pytest.raises(UserError, match=message):
        sweep.main(sweeping(root, tmp_path / "swept"))


def test_another_reference_at_the_same_place_is_noticed(root, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "swept")
    reference = shutil.copytree(root / "ref_real", tmp_path / "ref")
    record = read_record(tmp_path / "swept" / "config.json", "") | {"reference": str(reference)}
    write_record(tmp_path / "swept" / "config.json", record)
    config = sweeping(root, tmp_path / "swept", reference=str(reference))
    sweep.main(config)
    shutil.rmtree(reference)
    shutil.copytree(root / "ref_others", reference)
    with pytest.raises(UserError, match="has other statistics than when this sweep began"):
        sweep.main(config)


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
