import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image, ImageFilter
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics

from flowar import evaluate
from flowar.base.errors import UserError
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.measuring import EvaluateConfig, ExtractorConfig, ReferenceConfig
from flowar.evaluation import protocols
from flowar.evaluation.demo_images import write_image_folders
from flowar.evaluation.extractors import OWN
from flowar.evaluation.judge import load_judge, save_judge
from flowar.evaluation.store import list_shards, read_features
from flowar.latents.vae import from_uint8
from flowar.models.build import create_model
from flowar.models.folders import save_model
from flowar.sample import main as sample
from flowar.sampling.packing import pack_images
from tests.conftest import randomise, save_untrained_judge
from tests.processes import run_ranks

NUM_TRAIN, NUM_HELD_OUT = 300, 200


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Some of the demo's images, and an untrained classifier, which is good enough as a feature extractor here."""
    root = tmp_path_factory.mktemp("digits")
    write_image_folders(root)
    for split, count in (("train", NUM_TRAIN), ("held_out", NUM_HELD_OUT)):
        for folder in (root / split).iterdir():
            for file in sorted(folder.iterdir())[count // 10 :]:
                file.unlink()
        assert len(list((root / split).rglob("*.png"))) == count
    save_untrained_judge(root / "classifier.safetensors")
    return root


def judge(digits):
    return ExtractorConfig(name=OWN, weights=str(digits / "classifier.safetensors"))


def measure(digits, out_dir, **changes):
    """Return metrics.json of an evaluation."""
    settings = {"samples": digits / "train", "reference": digits / "held_out", "out_dir": out_dir}
    settings |= {"protocol": "torch-fidelity", "extractor": judge(digits), "interval_groups": 0} | changes
    paths = {name: str(value) for name, value in settings.items() if name in ("samples", "reference", "out_dir")}
    evaluate.main(EvaluateConfig(**settings | paths))
    return json.loads((out_dir / "metrics.json").read_text())


def values(record):
    return {name: metric["value"] for name, metric in record["metrics"].items()}


THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def measure_by_torch_fidelity(samples, reference, extractor, weights, subset):
    return torch_fidelity.calculate_metrics(
        input1=str(samples),
        input2=str(reference),
        samples_find_deep=True,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=subset,
        feature_extractor=extractor,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )


def test_metrics_equal_torch_fidelitys_own(digits, tmp_path):
    found = values(measure(digits, tmp_path))
    expected = measure_by_torch_fidelity(
        digits / "train", digits / "held_out", OWN, digits / "classifier.safetensors", NUM_HELD_OUT
    )
    for name, theirs in THEIR_NAMES.items():
        assert found[name] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-9), name


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with an Inception of random weights, as torch-fidelity's would be."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return file


def store_of(folder, start):
    """Return the folder of features with the most images."""
    return max(
        folder.glob(f"{start}*"), key=lambda store: json.loads((store / "features.json").read_text())["num_images"]
    )


@pytest.mark.slow
def test_inception_metrics_equal_torch_fidelitys_with_one_and_with_three_ranks(digits, inception, tmp_path):
    """On few images, as an Inception takes a third of a second per image on a CPU."""
    for name, count in (("train", 20), ("held_out", 8)):
        (tmp_path / name).mkdir()
        for number, file in enumerate(sorted((digits / name).rglob("*.png"))[:: 15 if name == "train" else 25]):
            if number < count:
                shutil.copy(file, tmp_path / name / f"{number:03d}.png")
    settings = {"samples": str(tmp_path / "train"), "reference": str(tmp_path / "held_out"), "chunk_images": 8}
    settings |= {"protocol": "torch-fidelity", "batch_size": 8, "interval_groups": 0, "more": ()}
    settings["extractor"] = ExtractorConfig(weights=str(inception), other_weights=True)
    expected = measure_by_torch_fidelity(tmp_path / "train", tmp_path / "held_out", "inception-v3-compat", inception, 8)
    for world_size in (1, 3):
        out_dir = tmp_path / f"out{world_size}"
        config = EvaluateConfig(out_dir=str(out_dir), **settings)
        run_ranks(evaluate.main, config, world_size=world_size, log=tmp_path / f"log{world_size}")
        found = values(json.loads((out_dir / "metrics.json").read_text()))
        for name, theirs in THEIR_NAMES.items():
            assert found[name] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-9), (name, world_size)
    stores = [store_of(tmp_path / out / "features", "inception") for out in ("out1", "out3")]
    shards = [sorted(file.name for file in list_shards(store).values()) for store in stores]
    assert shards[0] == shards[1] and len(shards[0]) == 3  # the same bytes, by the hashes in their names

    # The adm protocol reads the same features, and adds sFID on 17 x 17 x 7 spatial ones.
    adm = EvaluateConfig(out_dir=str(tmp_path / "out1"), **settings | {"protocol": "adm"})
    evaluate.main(adm)
    found = values(json.loads((tmp_path / "out1" / "metrics.json").read_text()))
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4) and found["sfid"] > 0
    layers = read_features(stores[0], 20).layers
    assert {name: own.shape[1] for name, own in layers.items()} == {"features": 2048, "logits": 1008, "spatial": 2023}


def test_other_inception_weights_are_refused_unless_asked_for(inception):
    with pytest.raises(
        UserError, match=r"random.pth have sha256 .*, but weights-inception-2015-12-05-6726825d.pth has"
    ):
        evaluate.Extractor(ExtractorConfig(weights=str(inception)), torch.device("cpu"))


def test_absent_weights_are_named_with_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=f"download https://github.com/toshas/.* to {file}, or set extractor.weights"):
        evaluate.Extractor(ExtractorConfig(), torch.device("cpu"))


def no_network(*_, **__):
    raise OSError("no network")


HUB_CODE = """
import torch
class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))
def dinov2_vitl14(pretrained=True, **kwargs):
    torch.manual_seed(0)
    return Tiny()
dependencies = ["torch"]
"""


def test_fd_dinov2_comes_from_torch_hubs_folder_and_is_left_out_with_a_note_elsewhere(digits, tmp_path, monkeypatch):
    """Uses a tiny network in the place of DINOv2 in torch hub's folder, as tests download no weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small = {"samples": digits / "held_out" / "3", "reference": digits / "held_out" / "4"}
    with pytest.raises(
        UserError, match="extractor.weights=x can't be used: dinov2-vit-l-14 is read from torch hub's folder"
    ):
        evaluate.Extractor(ExtractorConfig(name="dinov2-vit-l-14", weights="x"), torch.device("cpu"))
    notes = []
    config = EvaluateConfig(samples="a", reference="b")
    assert evaluate.load_more(config, torch.device("cpu"), notes) == {}
    assert "no metrics by dinov2" in notes[0] and f"to {tmp_path / 'hub'}" in notes[0]

    code = tmp_path / "hub" / "facebookresearch_dinov2_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUB_CODE)
    (tmp_path / "hub" / "checkpoints").mkdir()
    (tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth").touch()
    monkeypatch.setattr("torch.hub._parse_repo_info", lambda *_: ("facebookresearch", "dinov2", "main"))
    record = measure(digits, tmp_path / "out", more=("dinov2",), interval_groups=10, **small)
    metric = record["metrics"]["fd_dinov2"]
    assert metric["value"] > 0 and metric["low"] < metric["value"] < metric["high"]
    np.savez(tmp_path / "inception.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="has Inception's statistics; for dinov2-vit-l-14 give images, or a reference"):
        measure(
            digits, tmp_path / "b", more=("dinov2",), samples=small["samples"], reference=tmp_path / "inception.npz"
        )
    # If it is not requested by name, missing weights are only a note.
    monkeypatch.setattr(protocols, "OWN", "")
    record = measure(
        digits, tmp_path / "c", protocol="adm", samples=small["samples"], reference=tmp_path / "inception.npz"
    )
    assert "no metrics by dinov2: reference=" in " ".join(record["notes"]) and "fd_dinov2" not in record["metrics"]


def test_images_against_themselves_have_no_distance_and_full_precision(digits, tmp_path):
    found = values(measure(digits, tmp_path, samples=digits / "held_out"))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1


def test_few_classes_lower_recall_and_not_precision(digits, tmp_path):
    found = values(measure(digits, tmp_path, samples=digits / "train" / "3"))
    assert found["precision"] > 2 * found["recall"]


@pytest.mark.slow
def test_blur_lowers_precision(digits, tmp_path):
    for number, file in enumerate(sorted((digits / "train").rglob("*.png"))):
        for name, radius in (("sharp", 0), ("blurred", 6)):
            (tmp_path / name).mkdir(exist_ok=True)
            with Image.open(file) as image:
                image.filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / name / f"{number}.png")
    sharp, blurred = (
        values(measure(digits, tmp_path / f"{name}_out", samples=tmp_path / name)) for name in ("sharp", "blurred")
    )
    assert blurred["precision"] < 0.7 * sharp["precision"] and blurred["fid"] > sharp["fid"]


@pytest.mark.slow
def test_saved_statistics_give_the_same_distance(digits, tmp_path):
    files = sorted((digits / "held_out").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    classifier, _ = load_judge(digits / "classifier.safetensors")
    with torch.no_grad():
        statistics = fid_features_to_statistics(classifier(from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)))[0])
    np.savez(tmp_path / "held_out.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    record = measure(digits, tmp_path / "a", reference=tmp_path / "held_out.npz")
    assert values(record)["fid"] == pytest.approx(values(measure(digits, tmp_path / "b"))["fid"], rel=1e-4)
    assert "precision" not in values(record) and "holds only statistics" in " ".join(record["notes"])

    # ADM's files have both parts: statistics of all images, and some images.
    shifted = {"mu": statistics["mu"] + 1, "sigma": statistics["sigma"]}
    np.savez(tmp_path / "virtual.npz", arr_0=images, **shifted)
    found = values(measure(digits, tmp_path / "c", reference=tmp_path / "virtual.npz"))
    assert found["fid"] == pytest.approx(values(record)["fid"] + 64, rel=0.05)  # of the statistics, not of the images
    assert found["precision"] == pytest.approx(values(measure(digits, tmp_path / "b"))["precision"])

    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="holds statistics of 2048 features, .* has 64"):
        measure(digits, tmp_path / "d", reference=tmp_path / "inception.npz")


def test_a_made_reference_serves_like_its_images(digits, tmp_path):
    config = ReferenceConfig(
        images=str(digits / "held_out"), out_dir=str(tmp_path / "ref"), extractor=judge(digits), keep_images=100
    )
    evaluate.make_reference(config)
    evaluate.make_reference(config)  # nothing to do
    store = tmp_path / "ref" / "features-own"
    assert len(read_features(store, 100)) == 100 and len(list_shards(store)) == 1
    assert sorted(entry.name for entry in (tmp_path / "ref").iterdir()) == ["features-own"]
    found = measure(digits, tmp_path / "a", reference=tmp_path / "ref")
    by_images = measure(digits, tmp_path / "b")
    assert values(found)["fid"] == pytest.approx(values(by_images)["fid"], rel=1e-9)
    assert found["metrics"]["precision"]["note"] == "against 100 real images"
    assert (tmp_path / "a" / "neighbours.png").exists()

    other = tmp_path / "other.safetensors"
    network, about = load_judge(digits / "classifier.safetensors")
    save_judge(randomise(network), about, other)
    with pytest.raises(UserError, match="holds features by weights .* of own, but this machine has weights"):
        measure(
            digits,
            tmp_path / "c",
            reference=tmp_path / "ref",
            extractor=ExtractorConfig(name=OWN, weights=str(other)),
        )


def test_images_of_the_evaluation_itself_are_not_measured(digits, tmp_path):
    """By default the evaluation is beside a plain folder, so that a second protocol finds the same images."""
    shutil.copytree(digits / "held_out", tmp_path / "images")
    settings = {"samples": str(tmp_path / "images"), "reference": str(digits / "train"), "extractor": judge(digits)}
    for protocol in ("adm", "torch-fidelity", "adm"):
        evaluate.main(EvaluateConfig(protocol=protocol, interval_groups=0, **settings))
    record = json.loads((tmp_path / "images.evaluation" / "metrics.json").read_text())
    assert record["num_samples"] == NUM_HELD_OUT and record["protocol"] == "adm"


def test_a_reference_is_made_whole_or_not_at_all(digits, tmp_path, monkeypatch):
    config = ReferenceConfig(
        images=str(digits / "held_out"), out_dir=str(tmp_path / "ref"), extractor=judge(digits), keep_images=100
    )

    def die(*_, **__):
        raise KeyboardInterrupt

    for place in ("publish_folder", "shutil.rmtree"):  # before and after it appears
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"flowar.evaluation.references.{place}", die)
            evaluate.make_reference(config)
    evaluate.make_reference(config)
    measure(digits, tmp_path / "out", reference=tmp_path / "ref")


def test_the_command_writes_numbers_with_intervals_and_a_page_without_links(digits, tmp_path, capsys):
    record = measure(digits, tmp_path, protocol="adm", interval_groups=20)
    assert record["extractor"]["name"] == OWN and len(record["extractor"]["weights_sha256"]) == 64
    for name in ("fid", "inception_score", "precision", "recall"):
        metric = record["metrics"][name]
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert "sorted by class" in " ".join(record["notes"])  # train/0/..., train/1/...
    printed = capsys.readouterr().out
    assert "recall" in printed and "report.html are written" in printed
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and not re.search("https?:", page.split("<h2>Settings")[0])
    by_class = json.loads((tmp_path / "metrics_by_class.json").read_text())
    assert sorted(by_class) == [str(label) for label in range(10)] and all(own["fid"] > 0 for own in by_class.values())


def test_existing_features_are_not_computed_again(digits, tmp_path, monkeypatch):
    measure(digits, tmp_path)
    monkeypatch.setattr(evaluate.Extractor, "__call__", None)
    measure(digits, tmp_path, protocol="adm")
    shard = next(iter(list_shards(store_of(tmp_path / "features", "own")).values()))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: it does not have the hash in its name; delete it and run"):
        measure(digits, tmp_path, interval_groups=10)


@pytest.fixture(scope="module")
def drawn(digits, tmp_path_factory):
    """Samples of two models with the same seed, as images and as features."""
    root = tmp_path_factory.mktemp("drawn")
    for name, seed in (("a", 0), ("b", 1)):
        model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1), seed)
        save_model(model.config, model.state_dict(), root / name)
        settings = {"model": str(root / name), "vae": VAEConfig(name="demo"), "num_steps": 2}
        settings |= {"num_images": 60, "batch_size": 20, "chunk_batches": 1, "extractor": judge(digits)}
        sample(SampleConfig(out_dir=str(root / f"{name}_images"), **settings))
        sample(SampleConfig(out_dir=str(root / f"{name}_features"), features_only=True, **settings))
    return root


def test_features_alone_give_the_same_numbers_as_images(digits, drawn, tmp_path):
    assert not (drawn / "a_features" / "images").exists()
    of_images = values(measure(digits, tmp_path / "a", samples=drawn / "a_images"))
    of_features = values(measure(digits, tmp_path / "b", samples=drawn / "a_features"))
    for name, value in of_images.items():
        assert of_features[name] == pytest.approx(value, rel=1e-5, abs=1e-9)
    record = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert record["sampling"]["seed"] == 0 and record["sampling"]["variant"] == "flowar-demo"


@pytest.mark.parametrize("kind", ["npz", "tar", "mds"])
def test_packed_samples_give_the_same_distance(digits, drawn, tmp_path, kind):
    files = sorted((drawn / "a_images" / "images").glob("*.png"))
    packed = pack_images(kind, files, [number % 10 for number in range(60)], tmp_path)
    found = values(measure(digits, tmp_path / "out", samples=packed))
    assert found["fid"] == pytest.approx(values(measure(digits, tmp_path / "b", samples=drawn / "a_images"))["fid"])


@pytest.mark.slow
def test_a_paired_difference_has_a_narrower_interval_than_two_distances(digits, drawn, tmp_path):
    same = measure(digits, tmp_path / "same", samples=drawn / "a_images", against=str(drawn / "a_features"))
    assert values(same)["fid_difference"] == pytest.approx(0, abs=1e-6)
    record = measure(
        digits, tmp_path / "out", samples=drawn / "a_images", against=str(drawn / "b_images"), interval_groups=20
    )
    other = measure(digits, tmp_path / "b", samples=drawn / "b_images", interval_groups=20)
    metrics = record["metrics"]
    assert metrics["fid_difference"]["value"] == pytest.approx(metrics["fid"]["value"] - values(other)["fid"])
    widths = [own["high"] - own["low"] for own in (metrics["fid_difference"], metrics["fid"], other["metrics"]["fid"])]
    assert 0 < widths[0] < (widths[1] ** 2 + widths[2] ** 2) ** 0.5
    with pytest.raises(
        UserError, match=rf"against=.* \({NUM_HELD_OUT} images\) and samples=.* \(60 images\) must hold the same"
    ):
        measure(digits, tmp_path / "c", samples=drawn / "a_images", against=str(digits / "held_out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"extractor": ExtractorConfig(name="inseption")},
            "extractor.name=inseption is unknown; choose one of ",
        ),
        ({"extractor": ExtractorConfig(weights="/none")}, "extractor.weights=/none does not exist"),
        ({"extractor": ExtractorConfig(name=OWN, images="/none")}, "extractor.images=/none does not exist"),
        ({"samples": "/none"}, "samples=/none does not exist"),
        ({"reference": "/none.npz"}, "reference=/none.npz does not exist"),
        ({"run_dir": "/none"}, "run_dir=/none must be a training run"),
    ],
)
def test_bad_input_is_one_clear_error(digits, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        measure(digits, tmp_path, **change)


def test_too_few_images_and_foreign_files_are_refused(digits, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "few" / "one.png")
    with pytest.raises(UserError, match="holds 1 images, but at least 20 are needed"):
        measure(digits, tmp_path / "out", samples=tmp_path / "few")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"a.npz holds other; give an .npz with mu and sigma, or with images in arr_0"):
        measure(digits, tmp_path / "out2", reference=tmp_path / "a.npz")
