"""Drawn images as PNG files: one of the two places where they go. Read next: worker.py, packing.py."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowar.base.files import write_text
from flowar.base.hashes import hash_file
from flowar.base.pictures import save_grid, save_png
from flowar.latents.vae import to_uint8
from flowar.sampling.folder import HASHES_FILE, IMAGES_FOLDER, read_hashes
from flowar.sampling.job import SamplingJob, check_finite
from flowar.sampling.packing import is_packed, pack_images

GRID_IMAGES = 100  # shown in grid.png
HASHING_THREADS = 4


class ImageSink:
    """Writes the images of a job as PNG files, and what else was asked for of them."""

    def __init__(self, job: SamplingJob) -> None:
        self.job = job
        self.folder = job.out_dir / IMAGES_FOLDER

    def __str__(self) -> str:
        return f"images are in {self.folder}, the first of them in {self.job.out_dir / 'grid.png'}"

    def file(self, number: int) -> Path:
        """Return the file of an image."""
        return self.folder / f"{number:06d}_class{self.job.label(number):04d}.png"

    def start(self) -> None:
        """Make the folder."""
        self.folder.mkdir(exist_ok=True)

    def missing_chunks(self) -> list[int]:
        """Return the chunks of which an image is not there."""
        existing = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [
            chunk
            for chunk in self.job.chunks
            if any(self.file(number).name not in existing for number in self.job.chunk(chunk))
        ]

    def needs(self, numbers: range) -> bool:
        """Return whether any of these images is missing. All are drawn then: the batch's shape decides last bits."""
        return not all(self.file(number).exists() for number in numbers)

    def add(self, decoded: Tensor, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Begin to write images (B, 3, H, W) in [-1, 1]."""
        return [pool.submit(self._save, decoded, numbers)]

    def end_chunk(self, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Begin to write what is left of a chunk: nothing."""
        return []

    @torch.inference_mode()
    def _save(self, decoded: Tensor, numbers: range) -> None:
        """Write those images that are not there. In a thread, so that nobody waits for a GPU.

        Raises:
            UserError: if they are not finite.
        """
        check_finite(self.job, decoded, numbers)
        for number, image in zip(numbers, to_uint8(decoded).cpu(), strict=True):
            if not self.file(number).exists():
                try:
                    save_png(image, self.file(number))
                except FileNotFoundError:  # all is done, and somebody tidied up
                    if not self.file(number).exists():
                        raise

    def is_finished(self) -> bool:
        """Return whether all images are there, hashed and packed."""
        count, out_dir = self.job.config.num_images, self.job.out_dir
        if self.missing_chunks() or len(read_hashes(out_dir)) != count:
            return False
        return all(is_packed(kind, count, out_dir) for kind in self.job.config.also)

    def finish(self) -> None:
        """Make the grid and what else was asked for of all images, and hash them; remove what killed workers left."""
        for leftover in self.folder.glob(".*"):
            leftover.unlink(missing_ok=True)
        files = [self.file(number) for number in range(self.job.config.num_images)]
        save_grid(load_pngs(files[:GRID_IMAGES]), self.job.out_dir / "grid.png", columns=10)
        labels = [self.job.label(number) for number in range(len(files))]
        for kind in self.job.config.also:
            print(f"wrote {pack_images(kind, files, labels, self.job.out_dir)}")
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            hashes = pool.map(hash_file, files)
            lines = [f"{digest}  {IMAGES_FOLDER}/{file.name}\n" for file, digest in zip(files, hashes, strict=True)]
        write_text(self.job.out_dir / HASHES_FILE, "".join(lines))  # as `xxh64sum -c` reads it; says that all is done


def load_pngs(files: list[Path]) -> Tensor:
    """Return RGB images of one size as uint8 (N, 3, H, W)."""
    images = [
        torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8) for file in files
    ]
    with Image.open(files[0]) as first:
        width, height = first.size
    return torch.stack(images).view(-1, height, width, 3).permute(0, 3, 1, 2)
