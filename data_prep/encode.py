"""`flowar prepare`: images in one folder per class -> VAE moments -> MDS shards. No training-time scaling.

Read next: schema.py for what is written, flowar/data.py for how it is read.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from data_prep.schema import MOMENTS_DTYPE, PASSPORT_FILE, SCHEMA_VERSION, Passport, shard_columns, write_passport
from flowar.config import PrepareConfig
from flowar.distributed import pick_device, refuse_many_processes
from flowar.errors import UserError
from flowar.vae import VAE, from_uint8, load_vae, sample_posterior

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
SHARD_HASH = "xxh64"
MIB = 2**20


@dataclass(frozen=True)
class Source:
    """The images of a folder, in a fixed order, with their class numbers."""

    class_names: list[str]
    files: list[Path]
    labels: list[int]


def list_images(root: str | Path) -> Source:
    """Return the images below `root`, one sub-folder per class; classes and files in the order of their names.

    Raises:
        UserError: if the folder is missing, has no sub-folders, or one of them has no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"images={root} does not exist; it has to be a folder with one sub-folder of images per class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"images={root} has no sub-folders; put the images of each class into a sub-folder of its own")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"class folder {folder} has no image ({', '.join(IMAGE_SUFFIXES)}); fill it or remove it")
        files += found
        labels += [label] * len(found)
    return Source([folder.name for folder in folders], files, labels)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of `image`, (size, size, 3) uint8, resized as ADM does (Dhariwal & Nichol, 2021).

    Halved by box averages while the short side is at least twice `size`, then bicubic to `size`, then cropped.
    """
    # ADM ignores EXIF; ImageNet's few turned images are upright here.
    image = ImageOps.exif_transpose(image).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class ImageFiles(Dataset):
    """Cropped images by number, or why one can't be read: (image uint8 (3, size, size) or None, label, reason)."""

    def __init__(self, source: Source, image_size: int) -> None:
        self.source = source
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.source.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, int, str]:
        file = self.source.files[index]
        try:
            with Image.open(file) as image:
                pixels = centre_crop(image, self.image_size)
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, self.source.labels[index], f"{file} ({str(error).splitlines()[0]})"
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), self.source.labels[index], ""


def main(config: PrepareConfig, dry_run: bool = False) -> None:
    """Encode a folder of images into a finished dataset, or nothing: until the end it is called OUT_DIR.partial."""
    refuse_many_processes("prepare")
    out_dir = Path(config.out_dir)
    source = list_images(config.images)
    vae = load_vae(config.vae.name, config.vae.weights)
    if config.image_size % vae.stride:
        raise UserError(
            f"image_size={config.image_size} is not a multiple of the stride {vae.stride} of VAE {vae.name}"
        )
    side = config.image_size // vae.stride
    moments_shape = (2 * vae.latent_channels, side, side)
    num_bytes = len(source.files) * int(np.prod(moments_shape)) * np.dtype(MOMENTS_DTYPE).itemsize
    print(
        f"{len(source.files):,} images of {len(source.class_names)} classes in {config.images} -> moments "
        f"{moments_shape} of VAE {vae.name}, {num_bytes / MIB:,.1f} MiB in {out_dir}"
    )
    if (out_dir / PASSPORT_FILE).exists():
        raise UserError(f"out_dir={out_dir} already holds a finished dataset; use it, or remove it to prepare it again")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"out_dir={out_dir} is not empty and no dataset; give a new folder")
    if dry_run:
        return
    partial = out_dir.with_name(out_dir.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # what an interrupted run left
    passport = encode(config, source, vae, partial)
    write_passport(passport, partial)
    if out_dir.exists():
        out_dir.rmdir()
    partial.replace(out_dir)
    measured = np.sqrt(np.mean(np.square(passport.latent_std)))
    print(
        f"wrote {passport.num_samples:,} samples to {out_dir}; latent std x multiplier = "
        f"{measured * passport.latent_multiplier:.3f} (1 is ideal)"
    )


def encode(config: PrepareConfig, source: Source, vae: VAE, folder: Path) -> Passport:
    """Write the shards and their index into `folder`, in the order of `source`, and return the passport."""
    from streaming import MDSWriter

    logging.getLogger("streaming").setLevel(logging.ERROR)
    device = pick_device(config.device)
    vae.to(device)
    side = config.image_size // vae.stride
    moments_shape = (2 * vae.latent_channels, side, side)
    loader = DataLoader(
        ImageFiles(source, config.image_size),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        collate_fn=list,
    )
    generator = torch.Generator().manual_seed(0)
    total, squares = np.zeros(vae.latent_channels), np.zeros(vae.latent_channels)
    counts = [0] * len(source.class_names)
    unreadable: list[str] = []
    seen = 0
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    with (
        MDSWriter(
            out=str(folder),
            columns=shard_columns(moments_shape),
            hashes=[SHARD_HASH],
            size_limit=config.shard_size_mib * MIB,
        ) as writer,
        Progress(TextColumn("encoding"), *columns) as progress,
    ):
        task = progress.add_task("encoding", total=len(source.files), speed=0.0)
        for batch in loader:
            seen += len(batch)
            unreadable += [reason for _, _, reason in batch if reason]
            if unreadable and not config.skip_unreadable:
                raise UserError(
                    f"{len(unreadable)} of the first {seen} images can't be read: {', '.join(unreadable[:5])}; mend or "
                    "remove them, or leave such images out with skip_unreadable=true"
                )
            good = [(pixels, label) for pixels, label, _ in batch if pixels is not None]
            if good:
                images = from_uint8(torch.stack([pixels for pixels, _ in good]).to(device))
                with torch.inference_mode():
                    moments = vae.encode(images).cpu()
                stored = moments.numpy().astype(MOMENTS_DTYPE)
                for (_, label), sample in zip(good, stored, strict=True):
                    writer.write({"label": label, "moments": sample})
                    counts[label] += 1
                noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator)
                latents = sample_posterior(moments, noise, latent_multiplier=1.0).double().numpy()
                total += latents.sum(axis=(0, 2, 3))
                squares += np.square(latents).sum(axis=(0, 2, 3))
            progress.update(task, advance=len(batch), speed=progress.tasks[task].speed or 0.0)
    num_samples = sum(counts)
    if not num_samples:
        raise UserError(f"none of the {len(source.files)} images in {config.images} can be read")
    if unreadable:
        print(f"left out {len(unreadable)} images that can't be read: {', '.join(unreadable[:5])}")
    values = num_samples * side * side
    mean = total / values
    return Passport(
        schema_version=SCHEMA_VERSION,
        vae_name=vae.name,
        vae_sha256=vae.weights_sha256,
        latent_multiplier=vae.latent_multiplier,
        latent_mean=mean.tolist(),
        latent_std=np.sqrt(squares / values - np.square(mean)).tolist(),
        image_size=config.image_size,
        crop="center",
        moments_shape=list(moments_shape),
        class_names=source.class_names,
        class_counts=counts,
        num_samples=num_samples,
        skipped=unreadable,
    )


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("prepare")
