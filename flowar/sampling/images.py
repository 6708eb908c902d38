"""Write drawn images as PNG files: one of the two sinks. Read next: worker.py, packing.py."""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.files import create_whole
from flowar.base.pictures import save_grid
from flowar.latents.vae import to_uint8
from flowar.sampling.folder import (
    HASHES_FILE,
    IMAGES_FOLDER,
    NEW_HASHES,
    OWNER_KEY,
    HashBook,
    check_owner,
    drawn_names,
    file_safe,
    identify,
    merge_hashes,
    number_of,
    read_drawn,
    read_hashes,
    read_samples,
    write_hashes,
    write_new_hashes,
)
from flowar.sampling.job import SamplingJob, check_finite
from flowar.sampling.packing import find_half_packed, is_packed, pack_images, remove

GRID_IMAGES = 100  # shown in grid.png


class ImageSink:
    """Writes the images of a job as PNG files, and the other formats that `also` names."""

    def __init__(self, job: SamplingJob) -> None:
        self.job = job
        self.folder = job.out_dir / IMAGES_FOLDER
        self.book = HashBook(job.out_dir)
        self._identity = ""  # of the samples; known once samples.json exists

    def __str__(self) -> str:
        return f"images are in {self.folder}, the first of them in {self.job.out_dir / 'grid.png'}"

    def file(self, number: int) -> Path:
        """Return the file of an image."""
        return self.folder / self.name(number)

    def name(self, number: int) -> str:
        """Return the name of an image's file."""
        label, names = self.job.label(number), self.job.class_names
        called = file_safe(names[label]) if self.job.config.names and label < len(names) else ""
        return f"{number:06d}_class{label:04d}{f'_{called}' if called else ''}.png"

    def start(self) -> None:
        """Make the folder; remove images without a recorded hash, which can't be verified and are redrawn.

        Raises:
            UserError: if there are images that don't belong to these samples.
        """
        self.folder.mkdir(exist_ok=True)
        self._identity = identify(read_samples(self.job.out_dir))
        unknown = self._unknown()
        for file in unknown:
            number = number_of(file.name)
            if file != self.file(number):
                raise UserError(
                    f"{file} is not one of these samples: image {number} is {self.file(number).name}; move it elsewhere"
                )
            file.unlink(missing_ok=True)
        for name in sorted(self._existing())[:1]:
            file = self.folder / name
            check_owner(file, file.read_bytes(), self._identity)  # else the record belongs to others
        if unknown:
            print(f"redrawing {len(unknown):,} images in {self.folder} that have no hash, first {unknown[0].name}")

    def _unknown(self) -> list[Path]:
        """Return the images without a hash. Drawing writes hashes first, so list the images before the hashes."""
        names, count = drawn_names(self.job.out_dir), self.job.config.num_images
        hashes = self.book.look()
        return [self.folder / name for name in names if number_of(name) < count and name not in hashes]

    def _existing(self) -> set[str]:
        """Return the names of the existing images that have a hash."""
        names = drawn_names(self.job.out_dir)
        hashes = self.book.look()  # after the names, as drawing writes hashes first
        return {name for name in names if name in hashes}

    def missing_chunks(self) -> list[int]:
        """Return the chunks with a missing image."""
        existing = self._existing()
        return [
            chunk
            for chunk in self.job.chunks
            if any(self.name(number) not in existing for number in self.job.chunk(chunk))
        ]

    def is_missing(self, chunk: int) -> bool:
        """Return whether an image of a chunk is missing."""
        return bool(self._missing(self.job.chunk(chunk)))

    def needs(self, numbers: range) -> bool:
        """Return whether any of these images is missing. Then all are drawn, as the batch's shape affects rounding."""
        return bool(self._missing(numbers))

    def _missing(self, numbers: range) -> list[int]:
        hashes = self.book.look()
        return [n for n in numbers if self.name(n) not in hashes or not self.file(n).exists()]

    def add(self, decoded: Tensor, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Start writing images (B, 3, H, W) in [-1, 1]."""
        return [pool.submit(self._save, decoded, numbers)]

    def end_chunk(self, numbers: range, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Start writing the rest of a chunk: nothing."""
        return []

    @torch.inference_mode()
    def _save(self, decoded: Tensor, numbers: range) -> None:
        """Write the missing images, their hashes first. Runs in a thread, so that the GPU doesn't wait for it.

        Raises:
            UserError: if an image is not finite.
        """
        check_finite(self.job, decoded, numbers)
        missing = self._missing(numbers)
        contents = {
            self.file(number): encode_png(image, f"{self._identity}/{number}")
            for number, image in zip(numbers, to_uint8(decoded).cpu(), strict=True)
            if number in missing
        }
        if not contents:
            return
        hashes = {file.name: xxhash.xxh64(content).hexdigest() for file, content in contents.items()}
        write_new_hashes(self.job.out_dir, hashes)
        for file, content in contents.items():
            try:
                create_whole(file, _writer(content))
            except FileNotFoundError:  # another process has finished and cleaned up
                if not file.exists():
                    raise

    def is_finished(self) -> bool:
        """Return whether all images exist, hashed and packed."""
        count, out_dir = self.job.config.num_images, self.job.out_dir
        if not (out_dir / HASHES_FILE).exists() or self.book.new_files() or self.missing_chunks():
            return False
        hashed = read_hashes(out_dir / HASHES_FILE)
        if any(self.name(number) not in hashed for number in range(count)) or find_half_packed(out_dir):
            return False
        return all(is_packed(kind, count, out_dir) for kind in self.job.config.also)

    def finish(self) -> None:
        """Make the grid and the other formats, and merge the hashes.

        Removes what killed workers left.
        """
        for leftover in (*self.folder.glob(".*"), *(self.job.out_dir / NEW_HASHES).glob(".*")):
            leftover.unlink(missing_ok=True)  # a live process that was about to rename it writes it again
        for leftover in find_half_packed(self.job.out_dir):
            remove(leftover)
        merged = self.book.new_files()
        hashes = merge_hashes(self.job.out_dir, self.book.look(), self._identity)
        files = [self.file(number) for number in range(self.job.config.num_images)]

        def read(file: Path) -> bytes:
            return read_drawn(file, {hashes[file.name]}, self._identity)

        save_grid(load_pngs(files[:GRID_IMAGES], read), self.job.out_dir / "grid.png", columns=10)
        labels = [self.job.label(number) for number in range(len(files))]
        for kind in self.job.config.also:
            print(f"wrote {pack_images(kind, files, labels, self.job.out_dir, read)}")
        write_hashes(self.job.out_dir, hashes, merged)  # last: it marks the samples as complete


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda hidden: hidden.write_bytes(content)


def encode_png(image: Tensor, owner: str) -> bytes:
    """Return a uint8 image (3, H, W) as a PNG file that names the samples it belongs to."""
    text = PngInfo()
    text.add_text(OWNER_KEY, owner)
    written = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(written, format="PNG", pnginfo=text)
    return written.getvalue()


def load_pngs(files: list[Path], read: Callable[[Path], bytes] = Path.read_bytes) -> Tensor:
    """Return PNG files, all of one size, as uint8 RGB (N, 3, H, W)."""
    images = []
    for file in files:
        with Image.open(io.BytesIO(read(file))) as image:
            width, height = image.size
            images.append(torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8))
    return torch.stack(images).view(-1, height, width, 3).permute(0, 3, 1, 2)
