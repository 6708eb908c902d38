"""`flowar sample`: images drawn by any number of processes together. No metrics.

Read next: generate.py for how one is drawn, evaluate.py.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_prep.schema import PASSPORT_FILE, read_passport
from flowar import __version__
from flowar.config import ModelConfig, SampleConfig
from flowar.data import check_same_vae
from flowar.distributed import pick_device
from flowar.errors import UserError
from flowar.files import write_text
from flowar.gallery import save_gallery
from flowar.generate import StepNoise, draw_noise, make_time_grids, sample_latents
from flowar.image_sets import HASHES_FILE, IMAGES_FOLDER, identify, read_hashes, settings_of_images
from flowar.image_sets import SAMPLES_FILE as RECORD_FILE
from flowar.leases import Leases, chunk_name, claim_one, finish_together
from flowar.model import FlowAR
from flowar.packing import is_packed, pack
from flowar.pictures import save_grid, save_png
from flowar.precision import decoding_precision, drawing_precision
from flowar.run_folder import checkpoint_step, is_checkpoint
from flowar.shards import hash_file
from flowar.vae import VAE, load_vae, to_uint8
from flowar.weights import find_model_folder, hash_weights, load_model

if TYPE_CHECKING:
    from flowar.features import Extractor

GRID_IMAGES = 100  # shown in grid.png
CLAIMS = "claims"
WRITERS = 4  # threads
WAIT_S = 1  # between two looks at what other workers do


def main(config: SampleConfig, dry_run: bool = False) -> None:
    """Draw the images that are not there yet, together with all others who were given the same command.

    Image i is a function of the settings and i alone.
    """
    job = open_job(config)
    if config.preview:
        folder = job.out_dir / "preview"
        if not dry_run:
            save_gallery(config, job.model, job.vae, job.classes, folder)
        print(f"{'would write' if dry_run else 'wrote'} contact_sheet.png, growth.png and guidance.png in {folder}")
        return
    record = describe_samples(job)
    check_same_samples(job.out_dir, record)
    missing = job.missing()
    print(
        f"{config.num_images:,} images, {len(set(job.classes)):,} classes from {job.folder}, {len(missing):,} still to "
        "draw"
    )
    if dry_run:
        return
    draw(job, record)
    where = job.store if config.features_only else f"{job.images}, the first of them in {job.out_dir / 'grid.png'}"
    print(f"{'features of ' * config.features_only}{config.num_images:,} images are in {where}")


def open_job(config: SampleConfig) -> "Job":
    """Return what the settings ask for, with all networks loaded.

    Raises:
        UserError: if something is missing or does not fit.
    """
    device = pick_device(config.device)
    folder = find_model_folder(config.model)
    model = load_model(folder, config.weights).to(device)
    vae = load_vae(config.vae.name, config.vae.weights).to(device)
    check_decodable(folder, model.config, vae)
    extractor = None
    if config.features_only:
        from flowar.features import Extractor  # torch-fidelity takes seconds to import

        extractor = Extractor(config.extractor, device)
    return Job(
        config,
        model,
        vae,
        device,
        choose_classes(config, model.config),
        folder,
        hash_weights(model.state_dict()),
        extractor,
    )


def draw(job: "Job", record: dict[str, object], *, wait: bool = True) -> bool:
    """Draw what is missing, with whoever else does, and finish; return whether this process drew anything.

    Args:
        job: what is drawn.
        record: `describe_samples`.
        wait: for what others are drawing, until all is there.

    Raises:
        UserError: if it can't be written.
    """
    try:
        job.out_dir.mkdir(parents=True, exist_ok=True)
        write_text(job.out_dir / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        if job.extractor is None:
            job.images.mkdir(exist_ok=True)
        else:
            from flowar.features import describe, start_store

            settings = {"kind": "samples", "root": str(job.out_dir), "identity": identify(record)}
            start_store(job.store, describe(job.extractor, num_images=job.config.num_images, **settings))
        with Leases(job.out_dir / CLAIMS, job.config.lease_s) as leases:
            has_drawn = work(job, leases, wait=wait)
            if not wait:
                return has_drawn
            finish_together(leases, lambda: is_finished(job), lambda: finish(job) if job.extractor is None else None)
            shutil.rmtree(leases.folder, ignore_errors=True)
            return has_drawn
    except OSError as error:
        raise UserError(f"can't write to {job.out_dir}: {error}; mend that and start the same command again") from error


def choose_classes(config: SampleConfig, model: ModelConfig) -> tuple[int, ...]:
    """Return the classes that the images show in turn.

    Raises:
        UserError: if the label file can't be read, or one is no class of the model.
    """
    if config.unconditional:
        return (model.num_classes,)  # stands for "no class"
    classes, source = config.classes, "classes"
    if config.label_file is not None:
        source = f"label_file={config.label_file}"
        try:
            classes = tuple(int(line) for line in Path(config.label_file).read_text().split())
        except (OSError, ValueError) as error:
            raise UserError(f"{source} is no file of one class number per line: {error}") from error
    if classes is None:
        return tuple(range(model.num_classes))
    wrong = [label for label in classes if not 0 <= label < model.num_classes]
    if wrong or not classes:
        found = f"holds {wrong[0]}" if wrong else "is empty"
        raise UserError(f"{source} {found}; classes lie in 0 to {model.num_classes - 1}, as the model has them")
    return classes


@dataclasses.dataclass(frozen=True)
class Job:
    """What is drawn, with what, and where it goes."""

    config: SampleConfig
    model: FlowAR
    vae: VAE
    device: torch.device
    classes: tuple[int, ...]
    folder: Path  # of the model
    weights_sha256: str
    extractor: "Extractor | None" = None  # of features_only

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def images(self) -> Path:
        return self.out_dir / IMAGES_FOLDER

    @property
    def store(self) -> Path:
        """The folder of features."""
        return self.out_dir / f"features-{self.config.extractor.name}"

    @property
    def chunk_images(self) -> int:
        return self.config.chunk_batches * self.config.batch_size

    def chunk(self, number: int) -> range:
        """Return the images of a chunk."""
        start = number * self.chunk_images
        return range(start, min(start + self.chunk_images, self.config.num_images))

    def label(self, number: int) -> int:
        """Return the class of an image."""
        return self.classes[number % len(self.classes)]

    def file(self, number: int) -> Path:
        """Return the file of an image."""
        return self.images / f"{number:06d}_class{self.label(number):04d}.png"

    def missing(self) -> list[int]:
        """Return the numbers of the images that are not there."""
        if self.extractor is not None:
            from flowar.features import list_shards

            there = list_shards(self.store)
            chunks = (self.chunk(number) for number in range(-(-self.config.num_images // self.chunk_images)))
            return [number for own in chunks if (own[0], own[-1]) not in there for number in own]
        there = {entry.name for entry in os.scandir(self.images)} if self.images.is_dir() else set()
        return [number for number in range(self.config.num_images) if self.file(number).name not in there]


def work(job: Job, leases: Leases, *, wait: bool) -> bool:
    """Claim chunks and draw them until no image is missing, whoever draws them; the last one finishes.

    Returns whether this process drew any. It returns early, unless it is to wait for others.

    Threads check and write the images of one chunk while the next is drawn.
    """
    config = job.config
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    drawn: list[tuple[int, list[Future]]] = []  # claimed chunks whose images are still being written
    has_drawn = False

    def settle(keep: int) -> None:
        while len(drawn) > keep:
            chunk, writes = drawn.pop(0)
            for write in writes:
                write.result()
            leases.release(chunk_name(chunk))

    bar = Progress(TextColumn("sampling, all workers"), *columns, disable=not wait)
    with bar as progress, ThreadPoolExecutor(WRITERS) as pool:
        task = progress.add_task("sampling", total=config.num_images, speed=0.0)
        began, there = time.monotonic(), None

        def show(completed: int) -> None:
            nonlocal there
            there = completed if there is None else there
            speed = (completed - there) / max(time.monotonic() - began, 1e-9)
            progress.update(task, completed=completed, speed=speed)

        while missing := job.missing():
            show(config.num_images - len(missing))
            chunks = list(dict.fromkeys(number // job.chunk_images for number in missing))
            claimed = claim_one(leases, chunks)
            if claimed is None:
                if not drawn and not wait:
                    return has_drawn
                if not drawn:
                    time.sleep(WAIT_S)
                settle(keep=0)
                continue
            if not any(number // job.chunk_images == claimed for number in job.missing()):
                leases.release(chunk_name(claimed))  # done by another one while we looked
                continue
            has_drawn = True
            drawn.append((claimed, draw_chunk(job, job.chunk(claimed), pool)))
            settle(keep=1)
        settle(keep=0)
        show(config.num_images)
    return has_drawn


def is_finished(job: Job) -> bool:
    """Return whether all images are there, hashed and packed."""
    if job.missing():
        return False
    if job.extractor is not None:
        return True
    hashed = read_hashes(job.out_dir)
    count = job.config.num_images
    return len(hashed) == count and all(is_packed(kind, count, job.out_dir) for kind in job.config.also)


def finish(job: Job) -> None:
    """Make the grid and what else was asked for of all images, and hash them; remove what killed workers left."""
    for leftover in job.images.glob(".*"):
        leftover.unlink(missing_ok=True)
    files = [job.file(number) for number in range(job.config.num_images)]
    save_grid(load_pngs(files[:GRID_IMAGES]), job.out_dir / "grid.png", columns=10)
    for kind in job.config.also:
        print(f"wrote {pack(kind, files, [job.label(number) for number in range(len(files))], job.out_dir)}")
    with ThreadPoolExecutor(WRITERS) as pool:
        hashes = pool.map(hash_file, files)
        lines = [f"{found}  {IMAGES_FOLDER}/{file.name}\n" for file, found in zip(files, hashes, strict=True)]
    write_text(job.out_dir / HASHES_FILE, "".join(lines))  # as `xxh64sum -c` reads it; says that all is done


def draw_chunk(job: Job, numbers: range, pool: ThreadPoolExecutor) -> list[Future]:
    """Draw the images of one chunk and begin to write them, or their features."""
    size = job.config.batch_size
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    if job.extractor is None:
        return [write for batch in batches for write in save_batch(job, batch, pool)]
    from flowar.features import write_shard

    found = []
    for batch in batches:
        for images, part in decode(job, draw_batch(job, batch), batch):
            check_finite(job, images, part)
            found.append(job.extractor(to_uint8(images)))
    layers = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return [pool.submit(write_shard, job.store, numbers, [job.label(number) for number in numbers], layers)]


def draw_batch(job: Job, numbers: range) -> Tensor:
    """Return the latents of one batch of images."""
    config = job.config
    with drawing_precision(config.precision, job.device):
        return sample_latents(
            job.model,
            torch.tensor([job.label(number) for number in numbers], device=job.device),
            time_grid=make_time_grids(config, len(job.model.config.scales)),
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
            guidance_schedule=config.guidance_schedule,
            solver=config.solver,
            draw_noise=StepNoise(numbers, config.seed, job.device),
            noise=draw_noise(job.model.config, numbers, config.seed).to(job.device),
        )


def decode(job: Job, latents: Tensor, numbers: range) -> Iterator[tuple[Tensor, range]]:
    """Yield images in [-1, 1], decoded in batches of the VAE's own size, with their numbers."""
    size = job.config.decode_batch_size or len(numbers)
    for first in range(0, len(numbers), size):
        with torch.inference_mode(), decoding_precision(job.config.precision, job.device):
            images = job.vae.decode(latents[first : first + size].float())
        yield images, numbers[first : first + size]


def save_batch(job: Job, numbers: range, pool: ThreadPoolExecutor) -> list[Future]:
    """Draw the images of one batch and begin to write them.

    All are drawn if any is missing: the batch's shape decides the last bits.
    """
    if all(job.file(number).exists() for number in numbers):
        return []
    return [pool.submit(save_images, job, *decoded) for decoded in decode(job, draw_batch(job, numbers), numbers)]


def check_finite(job: Job, decoded: Tensor, numbers: range) -> None:
    """Raise a UserError if images are not finite."""
    if not decoded.isfinite().all():
        raise UserError(
            f"images {numbers[0]} to {numbers[-1]} are not finite; the weights of {job.config.model} are broken"
        )


@torch.inference_mode()
def save_images(job: Job, decoded: Tensor, numbers: range) -> None:
    """Write those of some images, (B, 3, H, W) in [-1, 1], that are not there. For a thread: a GPU isn't waited for.

    Raises:
        UserError: if they are not finite.
    """
    check_finite(job, decoded, numbers)
    for number, image in zip(numbers, to_uint8(decoded).cpu(), strict=True):
        if not job.file(number).exists():
            try:
                save_png(image, job.file(number))
            except FileNotFoundError:  # all is done, and somebody tidied up
                if not job.file(number).exists():
                    raise


def load_pngs(files: list[Path]) -> Tensor:
    """Return RGB images of one size as uint8 (N, 3, H, W)."""
    images = [
        torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8) for file in files
    ]
    with Image.open(files[0]) as first:
        width, height = first.size
    return torch.stack(images).view(-1, height, width, 3).permute(0, 3, 1, 2)


def check_decodable(folder: Path, model: ModelConfig, vae: VAE) -> None:
    """Raise a UserError if the model's latents are not those of the VAE, naming both sides."""
    if model.latent_channels != vae.latent_channels:
        raise UserError(
            f"the model in {folder} makes latents of {model.latent_channels} channels, but VAE {vae.name} decodes "
            f"{vae.latent_channels}; set vae.name to the VAE that the model was trained with"
        )
    if (folder / PASSPORT_FILE).is_file():
        check_same_vae(read_passport(folder), vae, str(folder))


def describe_samples(job: Job) -> dict[str, object]:
    """Return all that the images depend on, for samples.json."""
    settings = dataclasses.asdict(job.config)
    for key in ("out_dir", "model", "vae"):
        settings.pop(key)
    model = {"model": str(job.folder.absolute()), "variant": job.model.config.variant}
    if is_checkpoint(job.folder):
        model["step"] = checkpoint_step(job.folder)
    identity = {"weights_sha256": job.weights_sha256, "vae_sha256": job.vae.weights_sha256, "vae_name": job.vae.name}
    return {**model, "flowar": __version__, "torch": torch.__version__, **identity, **settings}


def check_same_samples(out_dir: Path, record: dict[str, object]) -> None:
    """Raise a UserError if `out_dir` holds images of other settings, naming what differs."""
    file = out_dir / RECORD_FILE
    if not file.exists():
        return
    before, now = json.loads(file.read_text()), settings_of_images(record)
    changed = [f"{key} was {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"out_dir={out_dir} holds images of other settings: {'; '.join(changed)}; give another out_dir")


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("sample")
