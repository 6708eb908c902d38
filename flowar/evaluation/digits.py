"""scikit-learn's handwritten digits at 32 px, and the small classifier that judges the demo. Read next: demo.py."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowar.base.errors import UserError
from flowar.base.files import write_whole
from flowar.base.tensors import load_tensors, save_tensors

IMAGE_SIZE = 32
NUM_CLASSES = 10
HELD_OUT_SHARE = 0.2  # 360 of 1,797 images
SPLIT_SEED = 0
GREY_LEVELS = 16  # of scikit-learn's 8 x 8 digits: 0 to 16
FEATURES = 64  # width of the classifier's features: few enough for a covariance from 360 images
CLASSIFIER_EPOCHS = 30
CLASSIFIER_BATCH = 64
CLASSIFIER_LR = 3e-3
MAX_ROTATION = 0.2  # radians, of the classifier's augmentation
MAX_SHIFT = 0.15  # of half the image
MAX_ZOOM = 0.15


def load_splits() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return {"train", "held_out"}: images (N, 32, 32, 3) uint8 and labels (N,), split by class with a fixed seed."""
    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    train_images, held_images, train_labels, held_labels = train_test_split(
        images, digits.target, test_size=HELD_OUT_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )
    return {"train": (train_images, train_labels), "held_out": (held_images, held_labels)}


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    grey = Image.fromarray((image / GREY_LEVELS * 255).round().astype(np.uint8))
    return np.asarray(grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def write_image_folders(root: Path) -> None:
    """Write both splits as PNG files, root/SPLIT/CLASS/NUMBER.png: what `flowar prepare` reads."""
    for split, (images, labels) in load_splits().items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:04d}.png")


def to_model_range(images: NDArray[np.uint8]) -> Tensor:
    """Return uint8 images (N, H, W, 3) as (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class DigitClassifier(nn.Module):
    """Three strided convolutions, features of width 64, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        )  # fmt: skip
        self.features = nn.Linear(128 * 4 * 4, FEATURES)
        self.logits = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 64) and logits (N, 10) of images (N, 3, 32, 32) in [-1, 1]."""
        grey = images.mean(dim=1, keepdim=True)
        features = self.features(self.convolutions(grey).flatten(1))
        return features, self.logits(F.relu(features))


def train_classifier(seed: int = 0) -> DigitClassifier:
    """Return a classifier trained on the training split, in evaluation mode."""
    torch.manual_seed(seed)
    splits = load_splits()
    images, labels = to_model_range(splits["train"][0]), torch.from_numpy(splits["train"][1])
    model = DigitClassifier()
    steps = CLASSIFIER_EPOCHS * len(images) // CLASSIFIER_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=CLASSIFIER_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_LR, total_steps=steps)
    for _ in range(steps):
        picked = torch.randint(len(images), (CLASSIFIER_BATCH,))
        loss = F.cross_entropy(model(jitter(images[picked]))[1], labels[picked], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: DigitClassifier, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return the share of uint8 images (N, 32, 32, 3) whose most likely class is the label."""
    logits = model(to_model_range(images))[1]
    return float((logits.argmax(dim=1).numpy() == labels).mean())


def save_classifier(model: DigitClassifier, path: Path) -> None:
    """Write the classifier as safetensors, with their hashes."""
    write_whole(path, lambda hidden: save_tensors(model.state_dict(), hidden))


def load_classifier(path: str | Path) -> DigitClassifier:
    """Return the classifier that `save_classifier` wrote, in evaluation mode.

    Raises:
        UserError: if there is none, or it is not what was written.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no classifier {path}; `flowar demo` writes one to RUN_DIR/classifier.safetensors")
    model = DigitClassifier()
    cure = "remove it and run the same `flowar demo` again, which trains another"
    try:
        model.load_state_dict(load_tensors(Path(path), cure))
    except RuntimeError as error:  # other names or shapes
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not the demo's classifier ({problem}); {cure}") from error
    return model.eval()


class DigitFeatures(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """The classifier as a torch-fidelity feature extractor: layers "features" and "logits"."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)
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
        return torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the asked-for features of uint8 images (N, 3, 32, 32)."""
        features, logits = self.classifier(images.float() / 127.5 - 1)
        outputs = {"features": features, "logits": logits}
        return tuple(outputs[name] for name in self.features_list)


def jitter(images: Tensor) -> Tensor:
    """Return the images, each turned, shifted and zoomed a little, at random."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * MAX_ROTATION
    zoom = 1 + (torch.rand(count, 2) * 2 - 1) * MAX_ZOOM
    shift = (torch.rand(count, 2) * 2 - 1) * MAX_SHIFT
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    transform = torch.cat([rotation * zoom[:, :, None], shift[:, :, None]], dim=2)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
