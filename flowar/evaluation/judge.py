"""A judge: a small classifier of a dataset's classes, trained on its real images; its features measure samples.

Read next: judging.py for its training images and its file, classes.py for class accuracy of samples.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowar import __version__
from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.tensors import load_tensors, read_about, save_tensors
from flowar.evaluation.image_sets import ImageSet
from flowar.latents.vae import from_uint8

FEATURES = 64  # width of the features, small enough for a covariance from a few hundred images
SMALL_SIDE, LARGE_SIDE = 32, 64  # pixels of the network's input, for images up to 32 px and for larger ones
POOLED_SIDE = 4  # of the last convolution's output
TESTED_SHARE = 0.1  # of each class, held out to measure the accuracy
LEAST_OF_A_CLASS = 5  # images
MOST_IMAGES = 60_000  # that are read; larger sets are thinned out class by class
JUDGE_EPOCHS, MOST_JUDGE_STEPS, JUDGE_BATCH = 30, 3000, 64
JUDGE_LR = 3e-3
JUDGED_AT_ONCE = 500
DECODERS = 8  # threads that decode images
MAX_ROTATION = 0.2  # radians, of the augmentation
MAX_SHIFT = 0.15  # of half the image
MAX_ZOOM = 0.15
MANY_IMAGES, MANY_STRENGTH = 10_000, 0.4  # from this many images on, the augmentation is weaker by this factor
RETRAIN_JUDGE = "remove it and run the same command again, which trains a new judge"


@dataclass(frozen=True, kw_only=True)
class AboutJudge:
    """The record beside the weights of a judge."""

    class_names: list[str]  # the class number is the place in this list
    side: int  # pixels of the network's input
    accuracy: float  # on held-out images
    num_held_out: int
    num_images: int  # in training
    images: str  # path of the training images
    identity: str  # hash of the training images
    flip: bool  # whether it was trained on mirror images too
    seed: int
    flowar: str = __version__


class Judge(nn.Module):
    """Three strided convolutions, features of width 64, a logit for each class."""

    def __init__(self, num_classes: int, side: int = SMALL_SIDE) -> None:
        super().__init__()
        self.side = side
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.AdaptiveAvgPool2d(POOLED_SIDE),
        )  # fmt: skip
        self.features = nn.Linear(128 * POOLED_SIDE**2, FEATURES)
        self.logits = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, classes) of images (N, 3, side, side) in [-1, 1]."""
        features = self.features(self.convolutions(images).flatten(1))
        return features, self.logits(F.relu(features))


def to_side(images: Tensor, side: int) -> Tensor:
    """Return the middle squares of uint8 images (N, 3, H, W) as uint8 (N, 3, side, side)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = images[..., top : top + short, left : left + short]
    if short == side:
        return square
    resized = F.interpolate(square.float(), size=(side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def jitter(
    images: Tensor, generator: torch.Generator | None = None, *, flip: bool = False, strength: float = 1
) -> Tensor:
    """Return the images, each randomly rotated, shifted and zoomed a little; half of them mirrored if `flip`."""
    count = len(images)

    def draw(*size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) * 2 - 1) * strength

    angle = draw(count) * MAX_ROTATION
    zoom = 1 + draw(count, 2) * MAX_ZOOM
    shift = draw(count, 2) * MAX_SHIFT
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    if flip:
        rotation[:, 0] *= draw(count).sign()[:, None]
    transform = torch.cat([rotation * zoom[:, :, None], shift[:, :, None]], dim=2).to(images.device)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def split_classes(labels: Sequence[int], seed: int, most: int = MOST_IMAGES) -> tuple[list[int], list[int]]:
    """Return the places of the training images, and of the held-out ones, a tenth of each class."""
    random = np.random.default_rng(seed)
    array = np.asarray(labels)
    train: list[int] = []
    held_out: list[int] = []
    for label in np.unique(array):
        places = random.permutation(np.flatnonzero(array == label))
        places = places[: max(LEAST_OF_A_CLASS, round(len(places) * min(1, most / len(array))))]
        count = max(1, round(len(places) * TESTED_SHARE))
        held_out += places[:count].tolist()
        train += places[count:].tolist()
    return sorted(train), sorted(held_out)


def train_judge(
    images: ImageSet, class_names: Sequence[str], device: torch.device, *, flip: bool = False, seed: int = 0
) -> tuple[Judge, AboutJudge]:
    """Return a classifier trained on real images, in evaluation mode on the CPU, and its record.

    Args:
        images: each with a label among the classes.
        class_names: by label.
        device: to train on.
        flip: whether to show it mirror images too.
        seed: of the split, the first weights and all draws.

    Raises:
        UserError: if an image can't be read.
    """
    strength = 1.0 if len(images) < MANY_IMAGES else MANY_STRENGTH
    side = SMALL_SIDE if max(images.read(0).shape[:2]) <= SMALL_SIDE else LARGE_SIDE
    train, held_out = split_classes(images.labels, seed)
    print(f"training a judge of {len(class_names):,} classes on {len(train):,} images of {images.root}", flush=True)
    pixels, labels = read_squares(images, train, side), torch.tensor([images.labels[place] for place in train])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Judge(len(class_names), side).to(device)
    steps = max(1, min(JUDGE_EPOCHS * len(train) // JUDGE_BATCH, MOST_JUDGE_STEPS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=JUDGE_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE_LR, total_steps=steps)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with torch.enable_grad(), Progress(TextColumn("training the judge"), *columns) as progress:
        for _ in progress.track(range(steps)):
            picked = torch.randint(len(train), (min(JUDGE_BATCH, len(train)),), generator=generator)
            batch = from_uint8(pixels[picked].to(device))
            logits = model(jitter(batch, generator, flip=flip, strength=strength))[1]
            loss = F.cross_entropy(logits, labels[picked].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    tested = torch.tensor([images.labels[place] for place in held_out])
    found = classify(model, read_squares(images, held_out, side))
    about = AboutJudge(
        class_names=list(class_names), side=side, accuracy=(found == tested).double().mean().item(),
        num_held_out=len(held_out), num_images=len(train), images=str(images.root.absolute()),
        identity=images.identity, flip=flip, seed=seed,
    )  # fmt: skip
    return model.cpu(), about


def read_squares(images: ImageSet, places: Sequence[int], side: int) -> Tensor:
    """Return images as uint8 (N, 3, side, side); they may have different sizes."""
    pixels = torch.empty(len(places), 3, side, side, dtype=torch.uint8)

    def read(row: int) -> None:
        image: NDArray[np.uint8] = images.read_checked(places[row])
        pixels[row] = to_side(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], side)[0]

    with ThreadPoolExecutor(DECODERS) as pool:
        for _ in pool.map(read, range(len(places))):
            continue
    return pixels


@torch.inference_mode()
def classify(judge: Judge, images: Tensor) -> Tensor:
    """Return the most likely classes (N,) of uint8 images (N, 3, H, W), on the CPU."""
    device = next(judge.parameters()).device
    parts = images.split(JUDGED_AT_ONCE)
    return torch.cat([judge(from_uint8(to_side(part.to(device), judge.side)))[1].argmax(dim=1).cpu() for part in parts])


def save_judge(judge: Judge, about: AboutJudge, file: Path) -> None:
    """Write a judge as safetensors with hashes, whole or not at all."""
    write_whole(file, lambda hidden: save_tensors(judge.state_dict(), hidden, about=asdict(about)))


def load_judge(file: str | Path) -> tuple[Judge, AboutJudge]:
    """Return the judge that `save_judge` wrote, in evaluation mode, and its record.

    Raises:
        UserError: if the file doesn't exist, or is not what was written.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(
            f"the judge {file} does not exist; `flowar evaluate samples=... reference=... extractor.name=own "
            f"extractor.weights={file}` trains one"
        )
    about, tensors = read_about_judge(file), load_tensors(file, RETRAIN_JUDGE)
    judge = Judge(len(about.class_names), about.side)
    try:
        judge.load_state_dict(tensors)
    except RuntimeError as error:  # other names or shapes
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{file} is not a judge ({problem}); {RETRAIN_JUDGE}") from error
    return judge.eval(), about


def read_about_judge(file: Path) -> AboutJudge:
    """Return the record of a judge.

    Raises:
        UserError: if the file is not what was written.
    """
    values: dict[str, Any] = read_about(file, RETRAIN_JUDGE)
    try:
        about = AboutJudge(**values)
    except TypeError as error:
        raise UserError(f"{file} is not a judge (its record is {json.dumps(values)[:80]}); {RETRAIN_JUDGE}") from error
    return about


class JudgeFeatures(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A judge as a torch-fidelity feature extractor: layers "features" and "logits"."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.judge, self.about = load_judge(feature_extractor_weights_path)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, SMALL_SIDE, SMALL_SIDE, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 images (N, 3, H, W)."""
        features, logits = self.judge(from_uint8(to_side(images, self.judge.side)))
        outputs = {"features": features, "logits": logits}
        return tuple(outputs[name] for name in self.features_list)
