"""Images per second of the whole `flowar prepare` over those of the VAE alone, on the same images.

Run `python -m benchmarks.prepare [--vae mar]`. It uses an autoencoder of the real size with random weights, 256 px, and
JPEG files of about ImageNet's size. The VAE alone encodes cropped images from memory in the same batches; `flowar
prepare` lists the files, decodes and crops them, encodes, writes, hashes and merges. Neither time includes loading the
VAE.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_prep import encode
from data_prep.crops import decode_image, make_views
from data_prep.sources import open_source
from flowar.config.data import PrepareConfig
from flowar.latents.vae import MAR_CONFIG, VAE, from_uint8

SD_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def write_images(root: Path, count: int) -> None:
    """Write JPEG files of 500 x 375 pixels with structure at all scales, about 100 KB each."""
    random = np.random.default_rng(0)
    (root / "class").mkdir(parents=True)
    for number in range(count):
        layers = [
            np.asarray(
                Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((500, 375)), float
            )
            for side in (4, 16, 64, 256)
        ]
        pixels = np.mean([np.asarray(layer, float) for layer in layers], axis=0).astype(np.uint8)
        Image.fromarray(pixels).save(root / "class" / f"{number:04d}.jpg", quality=95)


def encode_alone(vae: VAE, batches: list[torch.Tensor]) -> float:
    """Return the seconds that the VAE takes for images that are ready in memory."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            vae.encode(from_uint8(batch))
    return time.perf_counter() - began


def prepare_all(vae: VAE, config: PrepareConfig) -> float:
    """Return the seconds of `flowar prepare` with a VAE that is already loaded."""
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        encode.prepare(config, vae, torch.device("cpu"))
        return time.perf_counter() - began


def main() -> None:
    """Print images per second of both, medians of alternating runs, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=("sd", "mar"), default="sd")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = VAE(AutoencoderKL(**(SD_CONFIG if options.vae == "sd" else MAR_CONFIG)), options.vae)
    vae.weights_sha256  # noqa: B018 - computed once, as loading is
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", options.images)
        config = PrepareConfig(images=str(root / "images"), out_dir="", flip=False, batch_size=8, num_workers=1)
        source = open_source(config.images)
        views = [make_views(decode_image(source.read(number)), config, number) for number in range(len(source))]
        batches = torch.from_numpy(np.concatenate(views)).permute(0, 3, 1, 2).split(config.batch_size)
        encode_alone(vae, batches[:1])  # torch's one-time setup
        alone, whole = [], []
        for repeat in range(options.repeats):
            alone.append(encode_alone(vae, batches))
            out_dir = str(root / f"out{repeat}")
            whole.append(prepare_all(vae, PrepareConfig(**(vars(config) | {"out_dir": out_dir}))))
            print(f"run {repeat}: VAE alone {alone[-1]:.1f} s, flowar prepare {whole[-1]:.1f} s", flush=True)
    speeds = [options.images / statistics.median(times) for times in (alone, whole)]
    print(
        f"{options.vae} VAE, {options.images} images of 256 px, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}: VAE alone {speeds[0]:.3f} images/s, flowar prepare {speeds[1]:.3f} images/s, ratio "
        f"{speeds[1] / speeds[0]:.3f}"
    )


if __name__ == "__main__":
    main()
