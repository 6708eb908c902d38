import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from flowar import evaluate
from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig
from flowar.config.drawing import SampleConfig
from flowar.config.measuring import EvaluateConfig
from flowar.evaluation import judging
from flowar.evaluation.classes import count_confusion, to_judge_classes
from flowar.evaluation.demo_images import load_fashion
from flowar.evaluation.extractors import OWN
from flowar.evaluation.image_sets import open_images
from flowar.evaluation.judge import AboutJudge, jitter, load_judge, split_classes, to_side, train_judge
from flowar.evaluation.judging import choose_judge_file, prepare_judge
from flowar.sample import main as sample
from flowar.train import main as train
from tests.conftest import training

CPU = torch.device("cpu")


def about(*names):
    return AboutJudge(
        class_names=list(names), side=32, accuracy=1.0, num_held_out=1, num_images=9, images="there", identity="x",
        flip=False, seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Forty colour images of two classes that differ, of 40 x 36 pixels."""
    root, random = tmp_path_factory.mktemp("clothes"), np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 200)):
        (root / "all" / name).mkdir(parents=True)
        for index in range(20):
            pixels = (brightness + random.normal(0, 20, (40, 36, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "all" / name / f"{index}.png")
    return root / "all"


def test_two_trainings_give_the_same_judge_and_it_tells_the_classes_apart(clothes):
    images = open_images(clothes, "images")
    (first, said), (second, _) = (train_judge(images, images.class_names, CPU) for _ in range(2))
    assert said.accuracy == 1.0 and said.num_held_out == 4 and said.class_names == ["dark", "light"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_judge_is_trained_once_and_a_damaged_one_refused(clothes, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(judging, "train_judge", lambda *a, **k: (calls.append(1), train_judge(*a, **k))[1])
    file, settings = tmp_path / "judge.safetensors", ExtractorConfig(name=OWN)
    threads = [threading.Thread(target=prepare_judge, args=(settings, file, clothes, None, CPU, 60)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and load_judge(file)[1].class_names == ["dark", "light"]
    assert prepare_judge(settings, file, tmp_path / "gone", None, CPU, 60).weights == str(file)
    (tmp_path / "others" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "others" / "a" / "0.png")
    with pytest.raises(UserError, match="was trained on other images"):
        prepare_judge(
            dataclasses.replace(settings, images=str(tmp_path / "others")), file, clothes, None, CPU, 60
        )  # fmt: skip
    with pytest.raises(UserError, match="has no classes that could train a judge; set extractor.images to a folder"):
        prepare_judge(settings, tmp_path / "other", tmp_path / "others", None, CPU, 60)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged .*; remove it and run the same command again"):
        prepare_judge(settings, file, clothes, None, CPU, 60)


def test_a_judge_is_kept_beside_images_and_inside_a_made_reference(tmp_path):
    (tmp_path / "val").mkdir()
    own = ExtractorConfig(name=OWN)
    assert choose_judge_file(own, tmp_path / "val", tmp_path / "out") == tmp_path / "val.judge.safetensors"
    (tmp_path / "ref" / "features-own").mkdir(parents=True)
    (tmp_path / "ref" / "features-own" / "statistics.npz").touch()
    assert choose_judge_file(own, tmp_path / "ref", tmp_path / "out") == tmp_path / "ref" / "judge.safetensors"
    given = dataclasses.replace(own, weights=str(tmp_path / "x"))
    assert choose_judge_file(given, tmp_path / "ref", tmp_path / "out") == tmp_path / "x"


def test_a_tenth_of_each_class_is_held_out_and_too_many_images_are_thinned_out():
    labels = [0] * 100 + [1] * 50
    train_places, held_out = split_classes(labels, seed=0)
    assert sorted(train_places + held_out) == list(range(150))
    assert [sum(labels[place] == label for place in held_out) for label in (0, 1)] == [10, 5]
    assert sum(map(len, split_classes(labels, 0, most=75))) == 75


def test_images_become_squares_and_are_mirrored_only_if_set():
    wide = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    wide[..., 16:48] = 200
    assert torch.equal(to_side(wide, 32), wide[..., 16:48])
    assert to_side(torch.full((2, 3, 100, 80), 7, dtype=torch.uint8), 64).eq(7).all()
    left = torch.full((200, 3, 32, 32), -1.0)
    left[..., :8] = 1
    sides = [jitter(left, torch.Generator().manual_seed(0), flip=flip)[..., :16].mean() for flip in (False, True)]
    assert sides[0] > -0.6 and sides[1] < sides[0] - 0.1


def test_classes_are_matched_by_name_and_an_unknown_one_is_named():
    judge = about("bag", "boot", "7")
    assert to_judge_classes(("7", "bag"), judge, "samples", strict=True) == {0: 2, 1: 0}
    assert to_judge_classes((), judge, "samples", strict=True) == {0: 0, 1: 1, 2: 2}
    assert to_judge_classes(("first", "second"), judge, "samples", strict=False) is None
    with pytest.raises(UserError, match="the first is 'boots'; did you mean boot"):
        to_judge_classes(("bag", "boots"), judge, "samples", strict=True)
    table = count_confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), ["bag", "boot"])
    assert table == {"bag": {"bag": 1, "boot": 1}, "boot": {"boot": 1}}


@pytest.mark.slow
def test_samples_are_judged_beside_real_images_through_the_vae(shards, image_folder, tmp_path, capsys):
    """The judge is trained on the run's training images; class names in any form select the same samples."""
    run = tmp_path / "run"
    train(training(shards, run, epochs=1))
    for name in ("dark", "light"):  # a reference in the samples' size
        (tmp_path / "real" / name).mkdir(parents=True)
        for file in (image_folder / name).iterdir():
            Image.open(file).resize((32, 32)).save(tmp_path / "real" / name / file.name)
    drawing = SampleConfig(
        model=str(run), out_dir=str(tmp_path / "samples"), num_images=20, num_steps=2, names=True,
        classes=("light", 0), device="cpu",
    )  # fmt: skip
    sample(drawing)
    sample(dataclasses.replace(drawing, classes=(1, "dark")))
    assert "0 still to draw" in capsys.readouterr().out
    files = sorted(file.name for file in (tmp_path / "samples" / "images").iterdir())
    assert files[:2] == ["000000_class0001_light.png", "000001_class0000_dark.png"]
    with pytest.raises(UserError, match="classes=lihgt is not a class of the model; did you mean light"):
        sample(dataclasses.replace(drawing, classes=("lihgt",)))
    evaluate.main(
        EvaluateConfig(
            samples=drawing.out_dir,
            reference=str(tmp_path / "real"),
            extractor=ExtractorConfig(name=OWN),
            interval_groups=0,
            protocol="torch-fidelity",
        )
    )
    record = json.loads((tmp_path / "samples" / "evaluation" / "metrics.json").read_text())
    assert record["judge"]["class_names"] == ["dark", "light"] and record["judge"]["flip"]
    assert record["judge"]["images"] == str(image_folder) and record["judge"]["accuracy_on_reference"] == 1.0
    assert sum(sum(row.values()) for row in record["classes"]["confusion"].values()) == 20
    assert record["metrics"]["class_accuracy"]["value"] == record["classes"]["class_accuracy"]
    assert record["ceiling"]["num_images"] == 20 and record["ceiling"]["metrics"]["fid"]["value"] >= 0
    page = (tmp_path / "samples" / "evaluation" / "report.html").read_text()
    assert "real images through the VAE" in page and "shows light" in page
    assert (tmp_path / "real.judge.safetensors").is_file()

    own = ExtractorConfig(name=OWN, weights=str(tmp_path / "real.judge.safetensors"))
    evaluate.main(EvaluateConfig(samples=drawing.out_dir, out_dir=str(tmp_path / "b"), extractor=own))
    assert f"reference={image_folder}, the images that the model was trained on" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["reference"] == str(image_folder)
    with pytest.raises(UserError, match="reference is required: the samples' record names no dataset"):
        evaluate.main(EvaluateConfig(samples=str(tmp_path / "real"), out_dir=str(tmp_path / "c"), extractor=own))


def test_a_missing_or_damaged_fashion_mnist_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="install Debian's package dataset-fashion-mnist"):
        load_fashion(str(tmp_path))
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not readable as an idx file: it begins with"):
        load_fashion(str(tmp_path))


def test_fashion_mnist_is_padded_to_32_pixels(tmp_path):
    for split, count in (("train", 3), ("t10k", 2)):
        sizes = b"".join(number.to_bytes(4, "big") for number in (count, 28, 28))
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + sizes + bytes([9]) * count * 784)
        labels = bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + bytes(range(count))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    train_images, labels = load_fashion(str(tmp_path))["train"]
    assert train_images.shape == (3, 32, 32, 3) and labels.tolist() == [0, 1, 2]
    assert train_images[0, 2:30, 2:30].min() == 9 and train_images[0, 0].max() == 0
