import json

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics

from flowar.config import EvaluateConfig
from flowar.digits import (
    DigitClassifier,
    accuracy,
    load_classifier,
    load_splits,
    save_classifier,
    to_model_range,
    train_classifier,
    write_image_folders,
)
from flowar.errors import UserError
from flowar.evaluate import DEMO_EXTRACTOR, compare, main


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The demo's image folders and an untrained classifier, which is a feature extractor as good as any here."""
    root = tmp_path_factory.mktemp("digits")
    write_image_folders(root)
    torch.manual_seed(0)
    save_classifier(DigitClassifier().eval(), root / "classifier.safetensors")
    return root


def settings(digits):
    return {"extractor": DEMO_EXTRACTOR, "extractor_weights": str(digits / "classifier.safetensors")}


def test_metrics_equal_torch_fidelitys_own(digits):
    found = compare(digits / "train", digits / "held_out", **settings(digits))
    expected = torch_fidelity.calculate_metrics(
        input1=str(digits / "train"),
        input2=str(digits / "held_out"),
        samples_find_deep=True,
        isc=True,
        fid=True,
        prc=True,
        feature_extractor=DEMO_EXTRACTOR,
        feature_extractor_weights_path=str(digits / "classifier.safetensors"),
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert found["num_samples"] == 1437
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_images_against_themselves_have_no_distance_and_full_precision(digits):
    metrics = compare(digits / "held_out", digits / "held_out", **settings(digits))
    assert metrics["frechet_inception_distance"] == pytest.approx(0, abs=1e-3)
    assert metrics["precision"] == metrics["recall"] == 1


def test_few_classes_lower_recall_and_not_precision(digits):
    metrics = compare(digits / "train" / "3", digits / "held_out", **settings(digits))
    assert metrics["precision"] > 2 * metrics["recall"]


def test_saved_statistics_give_the_same_distance(digits, tmp_path):
    images = load_splits()["held_out"][0]
    classifier = load_classifier(digits / "classifier.safetensors")
    with torch.no_grad():
        statistics = fid_features_to_statistics(classifier(to_model_range(images))[0])
    np.savez(tmp_path / "held_out.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    from_file = compare(digits / "train", tmp_path / "held_out.npz", **settings(digits))
    from_images = compare(digits / "train", digits / "held_out", **settings(digits))
    name = "frechet_inception_distance"
    assert from_file[name] == pytest.approx(from_images[name], rel=1e-4)
    assert "precision" not in from_file

    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="holds statistics of 2048 features, .* gives 64"):
        compare(digits / "train", tmp_path / "inception.npz", **settings(digits))


def test_the_command_writes_metrics(digits, tmp_path, capsys):
    file = tmp_path / "metrics.json"
    main(
        EvaluateConfig(
            samples=str(digits / "train"),
            reference=str(digits / "held_out"),
            metrics_file=str(file),
            **settings(digits),
        )
    )
    record = json.loads(file.read_text())
    assert record["extractor"] == DEMO_EXTRACTOR and record["frechet_inception_distance"] > 0
    assert "recall" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "inseption"}, "extractor=inseption is unknown; there are: inception-v3-compat"),
        ({"extractor_weights": "/none"}, "extractor_weights=/none does not exist"),
        ({"samples": "/none"}, "samples=/none does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(digits, change, message):
    arguments = {"samples": digits / "train", "reference": digits / "held_out", **settings(digits)} | change
    with pytest.raises(UserError, match=message):
        compare(**arguments)


def test_too_few_images_and_foreign_files_are_refused(digits, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="holds 1 images, but at least 10 are needed"):
        compare(tmp_path, digits / "held_out", **settings(digits))
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"a.npz is no .npz with mu and sigma"):
        compare(digits / "train", tmp_path / "a.npz", **settings(digits))


@pytest.mark.slow
def test_the_trained_judge_knows_the_held_out_digits():
    images, labels = load_splits()["held_out"]
    assert len(images) == 360 and sorted(np.unique(labels)) == list(range(10))
    assert accuracy(train_classifier(), images, labels) >= 0.98


def test_half_drawn_samples_and_mixed_sizes_are_refused(digits, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "samples.json").write_text(json.dumps({"num_images": 20}))
    with pytest.raises(UserError, match="holds 12 images, but 20 were asked for; run the same `flowar sample`"):
        compare(tmp_path, digits / "held_out", **settings(digits))
    Image.new("RGB", (30, 32)).save(tmp_path / "images" / "11.png")
    with pytest.raises(UserError, match=r"holds images of 2 sizes, .*\(30, 32\).*resize and crop"):
        compare(tmp_path / "images", digits / "held_out", **settings(digits))
