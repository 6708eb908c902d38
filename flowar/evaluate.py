"""`flowar evaluate`: Frechet distance, Inception score, precision and recall, all by torch-fidelity.

Read next: digits.py, which holds the demo's feature extractor.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

from flowar.config import EvaluateConfig
from flowar.distributed import pick_device, refuse_many_processes
from flowar.errors import UserError
from flowar.files import write_text
from flowar.sample import IMAGES_FOLDER, RECORD_FILE

DEMO_EXTRACTOR = "demo-classifier"
NEIGHBOURHOOD = 3  # of precision and recall (Kynkaanniemi et al., 2019)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg")
MIN_IMAGES = 10  # the Inception score is a mean over ten parts


def compare(
    samples: str | Path,
    reference: str | Path,
    *,
    extractor: str,
    extractor_weights: str | None = None,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return the metrics of the images in one folder against a reference.

    Args:
        samples: folder of generated images, or what `flowar sample` wrote.
        reference: folder of real images, searched deeply; or an .npz with "mu" and "sigma" of the extractor's features,
            which gives no precision and recall.
        extractor: a torch-fidelity feature extractor, or "demo-classifier".
        extractor_weights: file with its weights; None for torch-fidelity's usual place.
        batch_size: images at once.
        device: where the features are computed; the CPU if None.

    Raises:
        UserError: if images, statistics or weights are missing or don't fit.
    """
    if extractor == DEMO_EXTRACTOR and DEMO_EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
        from flowar.digits import DigitFeatures

        register_feature_extractor(DEMO_EXTRACTOR, DigitFeatures)
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"extractor={extractor} is unknown; there are: {', '.join(FEATURE_EXTRACTORS_REGISTRY)}, demo-classifier"
        )
    kind = FEATURE_EXTRACTORS_REGISTRY[extractor]
    score_layer = kind.get_default_feature_layer_for_metric("isc")
    layer = kind.get_default_feature_layer_for_metric("fid")

    samples, reference = Path(samples), Path(reference)
    asked = None
    if (samples / RECORD_FILE).is_file():
        asked = json.loads((samples / RECORD_FILE).read_text())["num_images"]
        samples = samples / IMAGES_FOLDER
    _check_images("samples", samples, asked)
    statistics = _load_statistics(reference) if reference.suffix == ".npz" else None
    if statistics is None:
        _check_images("reference", reference)
    network = _create_extractor(extractor, [layer, score_layer], extractor_weights, device)

    def features(folder: Path) -> dict[str, Tensor]:
        return extract_featuresdict_from_input_id(
            1,
            network,
            input1=str(folder),
            samples_find_deep=True,
            samples_find_ext=",".join(IMAGE_SUFFIXES),
            batch_size=batch_size,
            cuda=device is not None and device.type == "cuda",
            save_cpu_ram=True,
            verbose=False,
        )

    generated = features(samples)
    metrics = dict(isc_features_to_metric(generated[score_layer]))
    generated_statistics = fid_features_to_statistics(generated[layer])
    if statistics is None:
        real = features(reference)
        statistics = fid_features_to_statistics(real[layer])
        metrics |= prc_features_to_metric(
            generated[layer],
            real[layer],
            prc_neighborhood=NEIGHBOURHOOD,
            prc_batch_size=10_000,
            save_cpu_ram=True,
            verbose=False,
        )
    if statistics["mu"].shape != generated_statistics["mu"].shape:
        raise UserError(
            f"reference={reference} holds statistics of {len(statistics['mu'])} features, extractor={extractor} gives "
            f"{len(generated_statistics['mu'])}; use statistics of the same extractor"
        )
    metrics |= fid_statistics_to_metric(_double(generated_statistics), _double(statistics), verbose=False)
    return {"num_samples": len(generated[layer]), **{name: float(value) for name, value in metrics.items()}}


def main(config: EvaluateConfig, dry_run: bool = False) -> None:
    """Measure a folder of images, print a table and write metrics.json."""
    refuse_many_processes("evaluate")
    device = pick_device(config.device)
    if dry_run:
        for name in ("samples", "reference"):
            if not Path(getattr(config, name)).exists():
                raise UserError(f"{name}={getattr(config, name)} does not exist")
        return
    metrics = compare(
        config.samples,
        config.reference,
        extractor=config.extractor,
        extractor_weights=config.extractor_weights,
        batch_size=config.batch_size,
        device=device,
    )
    table = Table("metric", "value", title=f"{config.samples} against {config.reference}, {config.extractor}")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
    file = Path(config.metrics_file or Path(config.samples) / "metrics.json")
    record = {"samples": config.samples, "reference": config.reference, "extractor": config.extractor, **metrics}
    write_text(file, json.dumps(record, indent=2) + "\n")
    print(f"wrote {file}")


def _create_extractor(
    name: str, layers: list[str], weights: str | None, device: torch.device | None
) -> torch.nn.Module:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"extractor_weights={weights} does not exist")
    try:
        return create_feature_extractor(
            name,
            sorted(set(layers)),
            cuda=device is not None and device.type == "cuda",
            feature_extractor_weights_path=weights,
            verbose=False,
        )
    except OSError as error:  # urllib's URLError is one
        raise UserError(
            f"the weights of extractor={name} are not here and can't be fetched ({error}); on a machine with a "
            "network, torch-fidelity downloads them to ~/.cache/torch/hub/checkpoints; copy that file here and set "
            "extractor_weights=/path/to/it"
        ) from error


def _check_images(name: str, folder: Path, asked: int | None = None) -> None:
    """Raise a UserError if there are too few images, not as many as were asked for, or images of several sizes."""
    if not folder.is_dir():
        raise UserError(f"{name}={folder} does not exist; it has to be a folder of images")
    files = [file for file in folder.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    if len(files) < MIN_IMAGES:
        raise UserError(f"{name}={folder} holds {len(files)} images, but at least {MIN_IMAGES} are needed")
    if asked not in (None, len(files)):
        raise UserError(
            f"{name}={folder} holds {len(files)} images, but {asked} were asked for; run the same `flowar sample` "
            "again to draw what is missing, or sample into a new folder"
        )
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        with Image.open(file) as image:  # reads the header only
            sizes.setdefault(image.size, file)
    if len(sizes) > 1:
        (size, file), (other_size, other) = list(sizes.items())[:2]
        raise UserError(
            f"{name}={folder} holds images of {len(sizes)} sizes, {file.name} has {size} pixels and {other.name} "
            f"{other_size}; resize and crop them to one size first"
        )


def _load_statistics(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as content:
            return {"mu": content["mu"], "sigma": content["sigma"]}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"reference={file} is no .npz with mu and sigma: {error}") from error


def _double(statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return statistics in float64: torch-fidelity refuses to compare means of two dtypes."""
    return {name: np.asarray(value, dtype=np.float64) for name, value in statistics.items()}


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("evaluate")
