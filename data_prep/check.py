"""`flowar check`: is a folder what was written? Reads every byte; of a dataset, encodes a sample again. Read-only.

Here are datasets; flowar/check.py has the other kinds.

Read next: flowar/latents/schema.py for what is checked; encode.py for how it was made.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from data_prep.crops import decode_image, make_views
from data_prep.sources import DamagedListingError, Source, open_source
from data_prep.statistics import MomentSums
from flowar.base.devices import pick_device
from flowar.base.errors import UserError
from flowar.base.files import MIB
from flowar.base.hashes import hash_file
from flowar.base.pictures import save_grid
from flowar.base.run_folder import PASSPORT_FILE
from flowar.check import check_folder, kind_of
from flowar.config.data import CheckConfig, DataConfig, PrepareConfig
from flowar.latents.batches import check_same_vae
from flowar.latents.cache import fetch
from flowar.latents.schema import INDEX_FILE, LISTING_FILE, SHARD_HASH, Passport
from flowar.latents.shards import LatentShards, Shard
from flowar.latents.vae import VAE, from_uint8, load_vae, to_uint8
from flowar.models.cards import CARD_FILE

ROWS_AT_ONCE = 256
MAX_THREADS = 16
NAMED_ROWS = 5  # damaged rows that are named of one shard
PAIRS_PER_LINE = 4  # of the contact sheet
TOLERANCE = 1e-6  # of recomputed statistics, relative: sums are taken in another order
COMPARED_IMAGES = 32


@dataclass
class Findings:
    """What one shard holds, and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    statistics: MomentSums = field(default_factory=MomentSums)


def main(config: CheckConfig, dry_run: bool = False) -> None:
    """Check a folder, print what was found, and fail if anything is wrong.

    Raises:
        UserError: if anything is.
    """
    folder = Path(config.path)
    is_dataset = (folder / INDEX_FILE).exists() or ((folder / PASSPORT_FILE).exists() and kind_of(folder) is None)
    if folder.is_dir() and not is_dataset:
        if not dry_run:
            report_problems(config.path, list(check_folder(folder)), "copy it again from where it is whole")
        return
    check_dataset(config, dry_run)


def check_dataset(config: CheckConfig, dry_run: bool) -> None:
    """Do what `main` does, for a dataset."""
    shards = LatentShards(DataConfig(path=config.path, cache=config.cache), check_sizes=False)
    passport = shards.passport
    num_bytes = sum(shard.num_bytes for shard in shards.shards)
    print(
        f"{config.path}: {passport.num_images:,} images x {passport.views} views ({passport.crop}, "
        f"{passport.image_size} px) by VAE {passport.vae_name}, in {len(shards.shards):,} shards of together "
        f"{num_bytes / MIB:,.1f} MiB"
    )
    if dry_run:
        return
    problems = check_files(shards)
    if config.num_images and not problems:
        problems += check_against_source(config, shards)
    report_problems(config.path, problems, "copy the dataset again, or prepare it again")


def report_problems(path: str, problems: list[str], cure: str) -> None:
    """Print each problem, or that the folder is whole.

    Raises:
        UserError: if there are some.
    """
    for problem in problems:
        print(f"WRONG: {problem}")
    if problems:
        raise UserError(f"{path} has {len(problems)} problems, the first: {problems[0]}; {cure}")
    print(f"{path} is what was written")


def check_files(shards: LatentShards) -> list[str]:
    """Return what is wrong with the shards: each one's size and hash, the rows, the class histogram, the statistics."""
    passport, statistics = shards.passport, MomentSums()
    problems: list[str] = []
    labels: Counter[int] = Counter()
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        checked = pool.map(lambda shard: check_shard(shards, shard), shards.shards)
        for findings in track(checked, "reading every shard", total=len(shards.shards)):
            problems += findings.problems
            labels += findings.labels
            statistics += findings.statistics
    if problems:
        return problems
    counts = [labels[label] / passport.views for label in range(len(passport.class_names))]
    for label, (found, needed) in enumerate(zip(counts, passport.class_counts, strict=True)):
        if found != needed:
            problems.append(f"class {label} ({passport.class_names[label]}) has {found:g} images, not {needed}")
    for name, measured in statistics.figures().items():
        recorded = getattr(passport, name)
        if not name.startswith("rounding") and not np.allclose(measured, recorded, rtol=TOLERANCE, atol=TOLERANCE):
            problems.append(f"{name} is {measured}, {PASSPORT_FILE} says {recorded}")
    problems += stray_files(shards)
    ratio = passport.latent_multiplier / passport.measured_multiplier
    print(
        f"hashes of {len(shards.shards):,} shards agree; {passport.num_rows:,} rows, "
        f"{len(passport.class_names):,} classes of {min(counts):g} to {max(counts):g} images; latent std x multiplier "
        f"= {ratio:.3f} (1 is ideal); rounding to {passport.moments_dtype}: at most {passport.rounding_error_max:.2g}, "
        f"rms {passport.rounding_error_rms:.2g}; {len(passport.skipped)} unreadable images were left out"
    )
    return problems


def check_shard(shards: LatentShards, shard: Shard) -> Findings:
    """Return what one shard contains; reads the whole shard."""
    findings = Findings()
    try:
        file = shards.local_file(shard)
        shards.check_size(shard)
        found = hash_file(file)
    except (UserError, OSError) as error:
        findings.problems.append(str(error))
        return findings
    damaged: list[int] = []
    for rows, first in read_blocks(shards, shard, file):
        damaged += [first + n for n, row in enumerate(rows) if not shards.is_row(row, shard, first + n)]
        findings.labels.update(rows["label"].tolist())
        findings.statistics += MomentSums.of(rows["moments"])
    where = ", ".join(map(str, damaged[:NAMED_ROWS])) or "none: what comes before the rows is"
    more = f" and {len(damaged) - NAMED_ROWS} more" if len(damaged) > NAMED_ROWS else ""
    if found != shard.file_hash:
        findings.problems.append(
            f"shard {shard.name} has {SHARD_HASH} {found}, its index {shard.file_hash}; damaged rows: {where}{more}"
        )
    elif damaged:
        findings.problems.append(
            f"shard {shard.name} has rows that were changed, or are of another place: {where}{more}"
        )
    return findings


def read_blocks(shards: LatentShards, shard: Shard, file: Path) -> Iterator[tuple[NDArray[np.void], int]]:
    """Yield the rows of a shard in blocks, each with the number of its first row."""
    begin = shard.num_bytes - shard.num_rows * shards.dtype.itemsize
    for first in range(0, shard.num_rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, shard.num_rows - first)
        offset = begin + first * shards.dtype.itemsize
        yield np.fromfile(file, shards.dtype, count=count, offset=offset), shard.first_row + first


def stray_files(shards: LatentShards) -> list[str]:
    """Return a problem for each file of a local dataset that no index knows: two datasets may have been mixed."""
    if shards.is_remote:
        return []
    known = {PASSPORT_FILE, INDEX_FILE, LISTING_FILE, CARD_FILE, *(shard.name for shard in shards.shards)}
    there = (file.relative_to(shards.folder) for file in shards.folder.rglob("*") if file.is_file())
    return [f"{name} belongs to no dataset; remove it" for name in sorted(map(str, there)) if name not in known]


def check_against_source(config: CheckConfig, shards: LatentShards) -> list[str]:
    """Return what is wrong with a random sample of images, encoded again; write the contact sheet."""
    passport = shards.passport
    source = open_same_source(config, shards)
    if isinstance(source, str):
        return [source]
    vae = load_vae(*((config.vae.name, config.vae.weights) if config.vae else (passport.vae_name,)))
    check_same_vae(passport, vae, config.path)
    device = pick_device(config.device)
    vae.to(device)
    kept = [number for number in range(len(source)) if str(number) not in passport.skipped]
    random = np.random.default_rng(config.seed)
    images = np.sort(random.choice(passport.num_images, min(config.num_images, passport.num_images), replace=False))
    views = random.integers(passport.views, size=len(images))
    crops = crop_settings(passport)
    errors: list[float] = []
    pairs: list[torch.Tensor] = []
    problems: list[str] = []
    for image, view in track(list(zip(images.tolist(), views.tolist(), strict=True)), "encoding a sample again"):
        row = shards.read([image * passport.views + view])
        name = source.names[kept[image]]
        if source.labels[kept[image]] != row["label"][0]:
            problems.append(f"image {image} ({name}) has class {row['label'][0]}, not {source.labels[kept[image]]}")
        try:
            made = make_views(decode_image(source.read(kept[image])), crops, kept[image])[view]
        except MemoryError as error:
            raise UserError(f"there is not enough memory to decode image {image} ({name})") from error
        except Exception as error:  # Pillow raises many kinds
            problems.append(f"image {image} ({name}) can't be read any more: {error}")
            continue
        pixels = torch.from_numpy(made.copy()).permute(2, 0, 1)[None]
        stored = torch.from_numpy(row["moments"].astype(np.float32))
        difference = encoding_error(vae, pixels.to(device), stored.to(device), passport)
        errors.append(difference)
        if not difference <= config.max_error:
            problems.append(
                f"image {image} ({name}), view {view}, encoded again differs by {difference:.2g} std of the latents"
            )
        if len(pairs) < 2 * COMPARED_IMAGES:
            pairs += [pixels[0], decode_mean(vae, stored.to(device))]
    if errors:
        picture = Path(config.picture or f"{shards.folder}.check.png")
        save_grid(torch.stack(pairs), picture, columns=2 * PAIRS_PER_LINE)
        print(
            f"{len(errors)} images encoded again: stored moments differ by at most {max(errors):.2g} std of latents "
            f"(accepted: {config.max_error:g}); {picture} shows source and decoded side by side"
        )
    return problems


def open_same_source(config: CheckConfig, shards: LatentShards) -> Source | str:
    """Return the source that the dataset was made from, or what is wrong with it."""
    file = shards.folder / LISTING_FILE
    if shards.is_remote:
        file.unlink(missing_ok=True)
        fetch(f"{config.path.rstrip('/')}/{LISTING_FILE}", file)
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    try:
        source = open_source(config.images, **columns) if config.images else Source.load(file)
    except DamagedListingError as error:
        return str(error)
    if source.sha256() != shards.passport.listing_sha256:
        what = f"images={config.images}" if config.images else LISTING_FILE
        return f"{what} lists other images or classes than those that the dataset was made from ({PASSPORT_FILE})"
    with contextlib.suppress(OSError):
        source.read(0)
        return source
    raise UserError(
        f"the files of {config.path} are in order, but its images aren't at {source.root}; say where they are with "
        "images=..., or leave that part out with num_images=0"
    )


def crop_settings(passport: Passport) -> PrepareConfig:
    """Return the settings of `flowar prepare` that decide about crops."""
    return PrepareConfig(
        images=passport.images,
        out_dir="",
        crop=passport.crop,
        flip=passport.flip,
        views=passport.views,
        seed=passport.seed,
        image_size=passport.image_size,
        resize=None if passport.crop == "center" else passport.resize,
    )


@torch.inference_mode()
def encoding_error(vae: VAE, pixels: torch.Tensor, stored: torch.Tensor, passport: Passport) -> float:
    """Return the largest difference of means and stds, stored and of `pixels` encoded now, in std of the latents."""
    mean, log_variance = vae.encode(from_uint8(pixels)).chunk(2, dim=1)
    stored_mean, stored_log_variance = stored.chunk(2, dim=1)
    of_mean = (mean - stored_mean).abs().max()
    of_std = ((0.5 * log_variance).exp() - (0.5 * stored_log_variance).exp()).abs().max()
    return torch.maximum(of_mean, of_std).item() * passport.measured_multiplier  # nan, if one of them is


@torch.inference_mode()
def decode_mean(vae: VAE, moments: torch.Tensor) -> torch.Tensor:
    """Return the image (3, H, W) uint8 that the means of moments (1, 2 C, h, w) decode to."""
    return to_uint8(vae.decode(moments.chunk(2, dim=1)[0] * vae.latent_multiplier))[0].cpu()
