"""`flowar prepare`: images -> VAE moments -> MDS shards, by any number of workers. No training-time scaling.

The images are cut into chunks of a fixed order. Each worker claims a chunk, writes it, claims the next; the last one
puts the index together. After any kill the same command resumes, and the bytes are the same.
Read next: chunks.py for the files, sources.py and crops.py for the images, flowar/latents/schema.py for the passport.
"""

import contextlib
import errno
import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.chunks import ChunkWriter, has_dataset, merge_chunks, publish_dataset
from data_prep.crops import decode_image, make_views, num_views, resize_side
from data_prep.plan import EncodingJob, Plan, agree_on_plan, check_same_settings, describe_plan, list_images
from data_prep.progress import PrepareProgress
from data_prep.sources import ChangedSourceError, Source, Stamp
from flowar import __version__
from flowar.base.devices import convolution_precision, pick_device
from flowar.base.errors import UserError
from flowar.base.leases import WAIT_S, Leases, any_live, claim_name, claimed_chunks
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.data import PrepareConfig
from flowar.config.load import decisive_settings
from flowar.latents.schema import SCHEMA_VERSION, Passport, read_passport
from flowar.latents.vae import VAE, from_uint8, load_vae, sample_posterior, to_uint8
from flowar.latents.workers import BATCHES_AHEAD, check_shared_memory, from_workers

SETTLE_S = 60  # within which a network file system shows what another machine did
MEASURED_IMAGES = 16  # images, up to twice as many, that are decoded again to measure what the VAE loses
LOW_PSNR_DB = 22
OFF_SCALE = 0.15  # by which the latents' std may differ from 1

GONE = (errno.ENOENT, errno.ESTALE)

RECORDED_VERSIONS = ("torch", "diffusers", "pillow", "numpy", "mosaicml-streaming")


def main(config: PrepareConfig, dry_run: bool = False) -> None:
    """Encode a source into a finished dataset, together with all others who were given the same command."""
    if not has_dataset(Path(config.out_dir)):
        check_images_exist(config)
    device = pick_device(config.device)
    vae = load_vae(config.vae.name, config.vae.weights)
    if dry_run:
        source = list_images(config)
        print(describe_plan(source, settings_of_dataset(config, vae), config))
        print("".join(f"{line}\n" for line in describe_sizes(source, config)), end="")
        return
    prepare(config, vae, device)
    print_summary(read_passport(config.out_dir), Path(config.out_dir))


def prepare(config: PrepareConfig, vae: VAE, device: torch.device) -> None:
    """Do what `main` does, with a loaded VAE."""
    out_dir = Path(config.out_dir)
    settings = settings_of_dataset(config, vae)
    job = EncodingJob(config, settings, out_dir, out_dir.with_name(out_dir.name + ".partial"), vae.to(device), device)
    claims = out_dir.with_name(out_dir.name + ".claims")
    try:
        while not has_dataset(out_dir):
            if out_dir.exists() and any(out_dir.iterdir()) and not has_dataset(out_dir):
                raise UserError(f"out_dir={out_dir} is not empty, but not a dataset; give a new folder")
            try:
                job.partial.mkdir(parents=True, exist_ok=True)
                with Leases(claims, config.lease_s) as leases:
                    encode_chunks(job, leases)
            except OSError as error:
                if error.errno not in GONE or not another_finished(job):
                    raise
        check_finished(config, settings, read_passport(out_dir))
    except OSError as error:
        raise UserError(f"can't write to {job.partial}: {error}; fix that and run the same command again") from error
    finally:
        # Otherwise the next run needs them, or another worker does, even one that has not yet written anything.
        if has_dataset(out_dir) or not (any_file(job.partial) or any_live(claims)):
            shutil.rmtree(claims, ignore_errors=True)
            with contextlib.suppress(OSError):
                job.partial.rmdir()


def check_finished(config: PrepareConfig, settings: dict[str, Any], passport: Passport) -> None:
    """Raise a UserError if the dataset that is there is not the one that was asked for."""
    found = vars(passport) | {"schema_version": settings["schema_version"]}  # an older one is as good
    check_same_settings(settings, found, f"out_dir={config.out_dir} holds a dataset with")
    if passport.skipped and not config.skip_unreadable:
        raise UserError(
            f"out_dir={config.out_dir} holds a dataset without {len(passport.skipped)} unreadable images; "
            "accept that with skip_unreadable=true, or give another out_dir"
        )


def another_finished(job: EncodingJob) -> bool:
    """Return whether files went away because another worker gave the dataset its name.

    Network file systems may show that late, so this looks again for a minute.
    """
    ended = time.monotonic() + SETTLE_S
    while not job.partial.exists() and not has_dataset(job.out_dir) and time.monotonic() < ended:
        time.sleep(WAIT_S)
    return has_dataset(job.out_dir)


def any_file(folder: Path) -> bool:
    """Return whether there is anything in a folder that may not exist."""
    with contextlib.suppress(OSError):
        return any(folder.iterdir())
    return False


def settings_of_dataset(config: PrepareConfig, vae: VAE) -> dict[str, Any]:
    """Return all settings that the bytes of the dataset depend on, as they stand in the passport.

    Raises:
        UserError: if the VAE can't encode images of this size.
    """
    if config.image_size % vae.stride:
        raise UserError(
            f"image_size={config.image_size} is not a multiple of the stride {vae.stride} of VAE {vae.name}"
        )
    if vae.image_size is not None and config.image_size != vae.image_size:
        raise UserError(
            f"image_size={config.image_size}, but VAE {vae.name} takes only images of {vae.image_size} px; set "
            f"image_size={vae.image_size}"
        )
    side = config.image_size // vae.stride
    given = decisive_settings(config)
    del given["vae"]  # its weights' hash says more
    del given["skip_unreadable"]  # changes nothing where all can be read
    return given | {
        "schema_version": SCHEMA_VERSION,
        "resize": resize_side(config),
        "views": num_views(config),
        "vae_name": vae.name,
        "vae_sha256": vae.weights_sha256,
        "latent_multiplier": vae.latent_multiplier,
        "latent_shift": vae.latent_shift,
        "moments_shape": [2 * vae.latent_channels, side, side],
    }


def describe_sizes(source: Source, config: PrepareConfig) -> list[str]:
    """Return what the sizes of some of the images mean: small ones are enlarged, of others the margins are cut off."""
    sizes = []
    for number in range(0, len(source), max(1, len(source) // MEASURED_IMAGES)):
        try:
            image = decode_image(source.read(number))
        except Exception:  # any problem is reported, with its name, when it is encoded
            continue
        sizes.append((min(image.size), max(image.size)))
    lines = []
    small = [short for short, _ in sizes if short < config.image_size]
    if small:
        lines.append(
            f"WARNING: {len(small)} of {len(sizes)} images looked at are smaller than image_size={config.image_size} "
            f"(the smallest: {min(small)} px) and are enlarged, which makes them blurry; a smaller image_size may do"
        )
    cut = [1 - short / long for short, long in sizes if short < long]
    if cut:
        lines.append(
            f"{len(cut)} of {len(sizes)} images looked at are not square: {100 * sum(cut) / len(cut):.0f}% of them is "
            f"cut off on average, {100 * max(cut):.0f}% at most (crop={config.crop})"
        )
    return lines


def check_images_exist(config: PrepareConfig) -> None:
    """Raise the source's UserError before anything is written, where that takes no listing."""
    if not Path(config.images).exists() and not any(mark in config.images for mark in "*?["):
        list_images(config)


def encode_chunks(job: EncodingJob, leases: Leases) -> None:
    """Do what is left to do, until the dataset is finished."""
    plan = agree_on_plan(job, leases)
    if plan is None:
        return
    print(describe_plan(plan.source, job.settings, job.config))
    print("".join(f"{line}\n" for line in describe_sizes(plan.source, job.config)), end="")
    with PrepareProgress(len(plan.source), job.config.chunk_images, plan.done()) as progress:
        while not has_dataset(job.out_dir):
            unfinished = plan.unfinished()
            if not unfinished:
                merge(job, plan, leases)
            elif not encode_free_chunks(job, plan, leases, progress):
                progress.wait_for([f"chunk {n}, held by {leases.holder(claim_name(n))}" for n in unfinished[:3]])
                time.sleep(WAIT_S)


def merge(job: EncodingJob, plan: Plan, leases: Leases) -> None:
    """Finish the dataset, or wait a moment for the worker that does."""
    if has_dataset(job.out_dir):
        return
    if not leases.claim("merge"):
        time.sleep(WAIT_S)
        return
    if not has_dataset(job.partial):
        plan.check_files()
        plan.check_images()
        merge_chunks(
            job.partial,
            job.settings | plan.identity(),
            plan.source.class_names,
            num_chunks=plan.num_chunks,
            plan_hash=plan.hash,
            psnr_db=measure_psnr(job, plan),
        )
    if leases.is_mine("merge"):
        publish_dataset(job.partial, job.out_dir)


@torch.inference_mode()
def measure_psnr(job: EncodingJob, plan: Plan) -> float:
    """Return the PSNR of some images that the VAE gives back, over all their pixels, dB to a tenth; 0 of no image.

    Everything that a model will ever draw comes through the same decoder.
    """
    images, squared, values = DecodedImages(plan, job.config), 0.0, 0
    for number in range(0, len(plan.source), max(1, len(plan.source) // MEASURED_IMAGES)):
        views = images[0, number].views
        if views is None:
            continue
        view = views[:1].to(job.device)
        with convolution_precision(job.config.precision):
            moments = job.vae.encode(from_uint8(view)).float()
            mean = sample_posterior(moments, torch.zeros_like(moments).chunk(2, dim=1)[0], job.vae.latent_multiplier)
            back = to_uint8(job.vae.decode(mean))
        squared += (back.float() - view.float()).square().sum().item()
        values += view.numel()
    return round(10 * math.log10(255**2 * values / max(squared, 1.0)), 1) if values else 0.0


class Decoded(NamedTuple):
    """One image of a chunk, or the reason why it is missing."""

    chunk: int
    number: int
    views: Tensor | None  # (V, 3, size, size) uint8
    stamp: Stamp | None = None  # of the file that it was read from
    damage: str = ""  # the file is there, but is not an image
    trouble: str = ""  # the run has to stop: the image cannot be reached, which is not its own fault


class DecodedImages(Dataset[Decoded]):
    """The views of the images, by (chunk, number)."""

    def __init__(self, plan: Plan, config: PrepareConfig) -> None:
        self.plan = plan
        self.source = plan.source
        self.config = config

    def __getitem__(self, key: tuple[int, int]) -> Decoded:
        chunk, number = key
        name = self.source.names[number]
        try:
            content, stamp = self.source.read_stamped(number)
        except FileNotFoundError as error:
            if self.plan.was_removed(number):
                if self.config.skip_unreadable:
                    return Decoded(chunk, number, None, damage=f"{name} (removed after it was listed)")
                return Decoded(chunk, number, None, trouble=self.plan.describe_removed(number))
            return Decoded(chunk, number, None, trouble=self.plan.describe_unreachable(number, error))
        except OSError as error:
            return Decoded(chunk, number, None, trouble=self.plan.describe_unreachable(number, error))
        except ChangedSourceError as error:
            return Decoded(chunk, number, None, trouble=f"{error}; {self.plan.cure_of_change()}")
        except UserError as error:
            return Decoded(chunk, number, None, trouble=str(error))
        except MemoryError:
            return Decoded(chunk, number, None, trouble=describe_lack_of_memory(name, self.config))
        try:
            views = make_views(decode_image(content), self.config, number)
        except MemoryError:
            return Decoded(chunk, number, None, trouble=describe_lack_of_memory(name, self.config))
        except Exception as error:  # Pillow raises many kinds; the image is named, and stops the run or is left out
            problem = (str(error) or type(error).__name__).splitlines()[0]
            return Decoded(chunk, number, None, stamp, damage=f"{name} ({problem})")
        return Decoded(chunk, number, torch.from_numpy(views).permute(0, 3, 1, 2), stamp)


def describe_lack_of_memory(name: str, config: PrepareConfig) -> str:
    """Return the error about an image that does not fit in memory."""
    return (
        f"there is not enough memory to decode {name}, which says nothing about the image; use fewer processes than "
        f"num_workers={config.num_workers}, or ask for more memory, and run the same command again"
    )


def encode_free_chunks(job: EncodingJob, plan: Plan, leases: Leases, progress: PrepareProgress) -> int:
    """Claim and write chunks until none is free; return how many were written.

    Raises:
        UserError: if an image cannot be reached, or is damaged and skip_unreadable is off.
    """
    config, views = job.config, job.settings["views"]
    images_per_batch = max(1, config.batch_size // views)
    batches = claimed_batches(plan, leases, images_per_batch)
    first = next(batches, None)
    if first is None:
        return 0
    check_shared_memory(config.num_workers, images_per_batch * views * 3 * config.image_size**2, "num_workers")
    loader = DataLoader(
        DecodedImages(plan, config),
        batch_sampler=itertools.chain([first], batches),
        num_workers=config.num_workers,
        collate_fn=list,
        prefetch_factor=BATCHES_AHEAD if config.num_workers else None,
        multiprocessing_context="fork" if config.num_workers else None,
    )
    encoded_with = describe_worker(job.device)
    writer, written = None, 0
    try:
        for batch, moments in encode_ahead(from_workers(loader, config.images, "num_workers"), job):
            chunk = batch[0].chunk
            if writer is None:
                writer = ChunkWriter(job.partial, chunk, job.settings, encoded_with, plan.hash)
            add_images(writer, batch, moments, plan, config)
            progress.advance(len(batch))
            if batch[-1].number == plan.images_of(chunk)[-1]:
                writer.publish()
                leases.finish(claim_name(chunk))
                writer, written = None, written + 1
                progress.chunk_done(chunk, plan.done())
    except OSError:
        if writer is None or leases.is_mine(claim_name(writer.chunk)):
            raise
        # Else this process was suspended for a lease, and another one took over the chunk.
    finally:
        if writer is not None:
            writer.discard()
        leases.release_all()
    return written


def add_images(
    writer: ChunkWriter, batch: list[Decoded], moments: NDArray[np.float32], plan: Plan, config: PrepareConfig
) -> None:
    """Write one batch, or stop because of an image that can't be read."""
    troubles = [image.trouble for image in batch if image.trouble]
    if troubles:
        raise UserError(troubles[0])
    for image in batch:
        if plan.source.kind == "folder":
            writer.stamps.append(image.stamp)
        if image.damage:
            writer.skip(image.number, image.damage)
    if writer.skipped and not config.skip_unreadable:
        raise UserError(f"images can't be read: {', '.join(writer.skipped.values())}; {plan.cure_of_damage()}")
    numbers = [image.number for image in batch if image.views is not None]
    if numbers:
        writer.add(moments, [plan.source.labels[n] for n in numbers], [plan.source.names[n] for n in numbers])


def claimed_batches(plan: Plan, leases: Leases, images_per_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Claim one free chunk after the other, and yield its images in batches that are the same for every worker."""
    for chunk in claimed_chunks(leases, plan.unfinished, wait=False):
        images = plan.images_of(chunk)
        for start in range(0, len(images), images_per_batch):
            yield [(chunk, number) for number in images[start : start + images_per_batch]]


def encode_ahead(
    batches: Iterable[list[Decoded]], job: EncodingJob
) -> Iterator[tuple[list[Decoded], NDArray[np.float32]]]:
    """Yield each batch with its moments (rows, 2 C, h, w), one late: a GPU encodes the next while it is written."""
    waiting: tuple[list[Decoded], list[Tensor]] | None = None
    for batch in batches:
        encoded = encode([image.views for image in batch if image.views is not None], job)
        if waiting is not None:
            yield waiting[0], _to_numpy(waiting[1])
        waiting = batch, encoded
    if waiting is not None:
        yield waiting[0], _to_numpy(waiting[1])


@torch.inference_mode()
def encode(views: list[Tensor], job: EncodingJob) -> list[Tensor]:
    """Return the moments of all views, at most `batch_size` together; on a GPU without waiting for them."""
    rows = torch.cat(views).split(job.config.batch_size) if views else []
    with convolution_precision(job.config.precision):
        return [job.vae.encode(from_uint8(part.to(job.device, non_blocking=True))).float() for part in rows]


def _to_numpy(parts: list[Tensor]) -> NDArray[np.float32]:
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=np.float32)


def describe_worker(device: torch.device) -> dict[str, str]:
    """Return versions and device: the bytes are the same where these are. On a CPU the threads count, in last bits."""
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    packages = {package: version(package) for package in RECORDED_VERSIONS}
    return {"flowar": __version__, **packages, "device": name}


def print_summary(passport: Passport, out_dir: Path) -> None:
    """Print a summary of the finished dataset."""
    ratio = passport.latent_multiplier / passport.measured_multiplier
    print(
        f"{out_dir / PASSPORT_FILE}: {passport.num_images:,} images x {passport.views} views in "
        f"{len(passport.shard_hashes):,} shards; latent std x multiplier = {ratio:.3f} (1 is ideal); rounding to "
        f"{passport.moments_dtype} changed moments by at most {passport.rounding_error_max:.2g}"
    )
    if passport.psnr_db:
        print(f"images come back from VAE {passport.vae_name} with a PSNR of {passport.psnr_db} dB")
        if passport.psnr_db < LOW_PSNR_DB:
            print(
                f"WARNING: below {LOW_PSNR_DB} dB the VAE doesn't fit these images, and no sample will look better "
                "than what it gives back; prepare them with another vae.name, or one that `flowar train-vae` makes"
            )
    if abs(ratio - 1) > OFF_SCALE:
        print(
            f"WARNING: by its own number {passport.latent_multiplier:g} this VAE gives latents of these images a std "
            f"of {ratio:.2f} instead of 1; train with data.normalize=channel, unless it is with released weights"
        )
    if len(passport.encoded_with) > 1:
        print(f"encoded on {len(passport.encoded_with)} kinds of devices or versions, which may differ in last bits")
    if passport.skipped:
        some = ", ".join(itertools.islice(passport.skipped.values(), 5))
        print(f"left out {len(passport.skipped)} images that can't be read: {some}")
