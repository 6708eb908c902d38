"""Generation scale by scale, with KV cache and guidance, and `flowar sample`. No metrics.

Read next: evaluate.py.
"""

import dataclasses
import functools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

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
from flowar.flow import check_shape
from flowar.leases import Leases
from flowar.model import FlowAR
from flowar.packing import pack
from flowar.pictures import save_grid, save_png
from flowar.scales import next_input, num_tokens, token_range, unpatchify
from flowar.seeding import derive_seed
from flowar.solvers import (
    annealed_steps,
    evaluation_times,
    released_time_grid,
    shifted_time_grid,
    solve,
    uniform_time_grid,
)
from flowar.vae import VAE, load_vae, to_uint8
from flowar.weights import find_model_folder, hash_weights, load_model

NOISE_STREAM, STEP_STREAM = 3, 4  # keeps the seeds of the images apart from those of the training
RECORD_FILE = "samples.json"
IMAGES_FOLDER = "images"
GRID_IMAGES = 100  # shown in grid.png
# Settings that don't change image i.
FREE_ON_RERUN = ("num_images", "also", "batch_size", "decode_batch_size", "chunk_batches", "lease_s", "device")
CLAIMS = "claims"
WRITERS = 4  # threads
WAIT_S = 1  # between two looks at what other workers do

TIME_SLACK = 1e-6  # grid points may coincide with the ends of the guidance interval


def scale_guidance(guidance: float, index: int, num_scales: int) -> float:
    """Return the guidance of one scale: 1 at the first, rising linearly to `guidance` at the last, as released."""
    if num_scales == 1:
        return guidance
    return 1 + (guidance - 1) * index / (num_scales - 1)


def find_guided_times(time_grid: Tensor, guidance_interval: tuple[float, float]) -> set[float]:
    """Return the times at which a step starts inside the guidance interval, its ends included."""
    return {time for time in time_grid.tolist()[:-1] if is_guided_at(time, guidance_interval)}


def is_guided_at(time: float, guidance_interval: tuple[float, float]) -> bool:
    """Return whether a time lies in the guidance interval, its ends included."""
    low, high = guidance_interval
    return low - TIME_SLACK <= time <= high + TIME_SLACK


def guided_velocity(
    model: FlowAR, semantics: Tensor, span: range, *, weight: float, guidance_interval: tuple[float, float]
) -> Callable[[Tensor, float], Tensor]:
    """Return the velocity (state, time) -> (B, N, C p p) of one scale, guided by `weight` inside the interval.

    Where guidance does not act, the flow Transformer's unconditional half is not computed.

    Args:
        semantics: of this scale, (B, N, D), or (2 B, N, D) with the unconditional half last.
    """

    def velocity(state: Tensor, time: float) -> Tensor:
        guided = weight > 1 and is_guided_at(time, guidance_interval)
        batch = torch.cat([state, state]) if guided else state
        at = torch.full((len(batch), 1), time, dtype=torch.float32, device=state.device)
        result = model.flow(batch, at, semantics[: len(batch)], span)
        if not guided:
            return result
        conditional, unconditional = result.chunk(2)
        return unconditional + weight * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_token_maps(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor | Sequence[Tensor],
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_schedule: str = "linear",
    solver: str = "euler",
    noise: Tensor | None = None,
    draw_noise: Callable[[tuple[int, int]], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return the generated map of every scale, (B, C, side p, side p) coarse to fine; arguments as `sample_latents`."""
    config = model.config
    if guidance < 1:
        raise ValueError(f"guidance={guidance} is below 1, which is no guidance; use 1 or more")
    device = labels.device
    shape = (len(labels), num_tokens(config.scales), config.token_width)
    if noise is None:
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
    check_shape("noise", noise, shape)
    grids = [time_grid] * len(config.scales) if isinstance(time_grid, Tensor) else list(time_grid)
    if len(grids) != len(config.scales):
        raise ValueError(f"{len(grids)} time grids were given for {len(config.scales)} scales")

    is_guided = guidance > 1 and any(
        is_guided_at(time, guidance_interval) for grid in grids for time in evaluation_times(solver, grid)
    )
    if is_guided:  # The unconditional half runs through the AR Transformer at every scale: later scales see its keys.
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    token_maps: list[Tensor] = []
    inputs = noise.new_zeros(len(labels), 0, config.token_width)
    cache = None
    for index, side in enumerate(config.scales):
        span = range(index, index + 1)
        if token_maps:
            inputs = next_input(token_maps[-1], side, config.scales, config.patch_size)
            inputs = torch.cat([inputs, inputs]) if is_guided else inputs
        semantics, cache = model.ar(inputs, labels, span, cache)
        weight = 1.0
        if is_guided:
            is_constant = guidance_schedule == "constant"
            weight = guidance if is_constant else scale_guidance(guidance, index, len(config.scales))
        velocity = guided_velocity(model, semantics, span, weight=weight, guidance_interval=guidance_interval)
        draw = None if draw_noise is None else functools.partial(draw_noise, (side * side, config.token_width))
        tokens = solve(solver, velocity, noise[:, token_range(config.scales, span)], grids[index], draw)
        token_maps.append(unpatchify(tokens, side, config.patch_size))
    return token_maps


def sample_latents(
    model: FlowAR,
    labels: Tensor,
    *,
    time_grid: Tensor | Sequence[Tensor],
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_schedule: str = "linear",
    solver: str = "euler",
    noise: Tensor | None = None,
    draw_noise: Callable[[tuple[int, int]], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return generated latents (B, C, h, w), about unit std: the VAE's `decode` divides by the multiplier.

    Args:
        model: a FlowAR in evaluation mode.
        labels: (B,) int64 classes, on the model's device; num_classes draws from all classes.
        time_grid: (steps + 1,) from 1 to 0, for example `released_time_grid(25)`; or one such grid for each scale.
        guidance: classifier-free guidance; 1 is off, and costs nothing.
        guidance_interval: (low, high) in time; outside nothing is guided, and costs nothing extra.
        guidance_schedule: "linear", from 1 at the coarsest scale to `guidance` at the finest, as released; "constant".
        solver: euler, heun, midpoint, adams-bashforth or euler-maruyama, of solvers.py.
        noise: (B, L, C p p), standard normal, packed coarse to fine; drawn with `generator` if None.
        draw_noise: (N, C p p) -> (B, N, C p p) standard normal, once a step; for euler-maruyama.
        generator: of the noise; torch's global one if None.

    Raises:
        ValueError: if guidance is below 1, the noise has another shape, or the grids are not one for each scale.
    """
    return sample_token_maps(
        model,
        labels,
        time_grid=time_grid,
        guidance=guidance,
        guidance_interval=guidance_interval,
        guidance_schedule=guidance_schedule,
        solver=solver,
        noise=noise,
        draw_noise=draw_noise,
        generator=generator,
    )[-1]


def draw_noise(config: ModelConfig, images: Iterable[int], seed: int) -> Tensor:
    """Return the noise of the images with these numbers, (B, L, C p p): each a function of (seed, number)."""
    shape = (num_tokens(config.scales), config.token_width)
    generators = (torch.Generator().manual_seed(derive_seed(seed, NOISE_STREAM, image)) for image in images)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class StepNoise:
    """Standard normal noise for the steps of stochastic solvers: of each image a function of (seed, number)."""

    def __init__(self, images: Iterable[int], seed: int, device: torch.device) -> None:
        seeds = (derive_seed(seed, STEP_STREAM, image) for image in images)
        self.generators = [torch.Generator().manual_seed(number) for number in seeds]
        self.device = device

    def __call__(self, shape: tuple[int, int]) -> Tensor:
        """Return the next noise, (B, N, C p p)."""
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators]).to(self.device)


def make_time_grid(name: str, num_steps: int, shift: float = 1.0) -> Tensor:
    """Return the time grid that a config names: "released", "uniform" or "shifted"."""
    if name == "shifted":
        return shifted_time_grid(num_steps, shift)
    return released_time_grid(num_steps) if name == "released" else uniform_time_grid(num_steps)


def make_time_grids(config: SampleConfig, num_scales: int) -> list[Tensor]:
    """Return the time grid of each scale."""
    last = config.num_steps if config.last_scale_steps is None else config.last_scale_steps
    steps = annealed_steps(config.num_steps, last, num_scales)
    return [make_time_grid(config.time_grid, number, config.shift) for number in steps]


def main(config: SampleConfig, dry_run: bool = False) -> None:
    """Draw the images that are not there yet, together with all others who were given the same command.

    Image i is a function of the settings and i alone.
    """
    device = pick_device(config.device)
    folder = find_model_folder(config.model)
    model = load_model(folder, config.weights).to(device)
    vae = load_vae(config.vae.name, config.vae.weights).to(device)
    check_decodable(folder, model.config, vae)
    classes = choose_classes(config, model.config)
    out_dir = Path(config.out_dir)
    record = describe_samples(config, folder, model, vae)
    check_same_samples(out_dir, record)
    job = Job(config, model, vae, device, classes, out_dir)
    missing = job.missing()
    print(f"{config.num_images:,} images, {len(set(classes)):,} classes from {folder}, {len(missing):,} still to draw")
    if dry_run:
        return
    try:
        job.images.mkdir(parents=True, exist_ok=True)
        write_text(out_dir / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        with Leases(out_dir / CLAIMS, config.lease_s) as leases:
            work(job, leases)
    except OSError as error:
        raise UserError(f"can't write to {out_dir}: {error}; mend that and start the same command again") from error
    print(f"{config.num_images:,} images are in {job.images}, the first of them in {out_dir / 'grid.png'}")


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
    out_dir: Path

    @property
    def images(self) -> Path:
        return self.out_dir / IMAGES_FOLDER

    def label(self, number: int) -> int:
        """Return the class of an image."""
        return self.classes[number % len(self.classes)]

    def file(self, number: int) -> Path:
        """Return the file of an image."""
        return self.images / f"{number:06d}_class{self.label(number):04d}.png"

    def missing(self) -> list[int]:
        """Return the numbers of the images that are not there."""
        there = {entry.name for entry in os.scandir(self.images)} if self.images.is_dir() else set()
        return [number for number in range(self.config.num_images) if self.file(number).name not in there]


def work(job: Job, leases: Leases) -> None:
    """Claim chunks and draw them until no image is missing, whoever draws them; the last one makes the grid.

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

    def settle(keep: int) -> None:
        while len(drawn) > keep:
            chunk, writes = drawn.pop(0)
            for write in writes:
                write.result()
            leases.release(chunk_name(chunk))

    chunk_images = config.chunk_batches * config.batch_size
    with Progress(TextColumn("sampling, all workers"), *columns) as progress, ThreadPoolExecutor(WRITERS) as pool:
        task = progress.add_task("sampling", total=config.num_images, speed=0.0)
        while missing := job.missing():
            leases.folder.mkdir(exist_ok=True)  # it goes when all is done, which file systems may show late
            progress.update(task, completed=config.num_images - len(missing), speed=progress.tasks[task].speed or 0.0)
            chunks = list(dict.fromkeys(number // chunk_images for number in missing))
            try:
                claimed = claim_one(chunks, leases)
            except FileNotFoundError:
                continue
            if claimed is None:
                if not drawn:
                    time.sleep(WAIT_S)
                settle(keep=0)
                continue
            start = claimed * chunk_images
            end = min(start + chunk_images, config.num_images)
            writes = []
            for first in range(start, end, config.batch_size):
                writes += draw_batch(job, range(first, min(first + config.batch_size, end)), pool)
            drawn.append((claimed, writes))
            settle(keep=1)
        settle(keep=0)
        progress.update(task, completed=config.num_images)
    try:
        is_last = leases.claim("finish")
    except FileNotFoundError:
        return  # another one has finished all
    if is_last:
        finish(job)
        shutil.rmtree(leases.folder, ignore_errors=True)


def finish(job: Job) -> None:
    """Make the grid and what else was asked for of all images; remove what killed workers left."""
    for leftover in job.images.glob(".*"):
        leftover.unlink()
    files = [job.file(number) for number in range(job.config.num_images)]
    save_grid(load_pngs(files[:GRID_IMAGES]), job.out_dir / "grid.png", columns=10)
    for kind in job.config.also:
        print(f"wrote {pack(kind, files, [job.label(number) for number in range(len(files))], job.out_dir)}")


def claim_one(chunks: list[int], leases: Leases) -> int | None:
    """Return a chunk that this worker has just claimed, or None if others hold all of them."""
    others = any(leases.folder.iterdir())
    first = random.randrange(len(chunks)) if others else 0  # a thousand workers don't all try the same chunk
    return next((chunk for chunk in chunks[first:] + chunks[:first] if leases.claim(chunk_name(chunk))), None)


def chunk_name(chunk: int) -> str:
    """Return the name under which a chunk is claimed."""
    return f"{chunk:06d}"


def draw_batch(job: Job, numbers: range, pool: ThreadPoolExecutor) -> list[Future]:
    """Draw the images of one batch and begin to write them.

    All are drawn if any is missing: the batch's shape decides the last bits.
    """
    config = job.config
    if all(job.file(number).exists() for number in numbers):
        return []
    latents = sample_latents(
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
    size = config.decode_batch_size or len(numbers)
    writes = []
    for first in range(0, len(numbers), size):
        with torch.inference_mode():
            decoded = job.vae.decode(latents[first : first + size])
        writes.append(pool.submit(save_images, job, decoded, numbers[first : first + size]))
    return writes


@torch.inference_mode()
def save_images(job: Job, decoded: Tensor, numbers: range) -> None:
    """Write those of some images, (B, 3, H, W) in [-1, 1], that are not there. For a thread: a GPU isn't waited for.

    Raises:
        UserError: if they are not finite.
    """
    if not decoded.isfinite().all():
        raise UserError(
            f"images {numbers[0]} to {numbers[-1]} are not finite; the weights of {job.config.model} are broken"
        )
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


def describe_samples(config: SampleConfig, folder: Path, model: FlowAR, vae: VAE) -> dict[str, object]:
    """Return all that the images depend on, for samples.json."""
    weights_sha256 = hash_weights(model.state_dict())
    settings = dataclasses.asdict(config)
    for key in ("out_dir", "model", "vae"):
        settings.pop(key)
    identity = {"weights_sha256": weights_sha256, "vae_sha256": vae.weights_sha256, "vae_name": vae.name}
    return {"model": str(folder), "flowar": __version__, "torch": torch.__version__, **identity, **settings}


def check_same_samples(out_dir: Path, record: dict[str, object]) -> None:
    """Raise a UserError if `out_dir` holds images of other settings, naming what differs."""
    file = out_dir / RECORD_FILE
    if not file.exists():
        return
    before = json.loads(file.read_text())
    now = json.loads(json.dumps(record))
    ignored = {*FREE_ON_RERUN, "model", "flowar", "torch"}
    changed = [
        f"{key} was {before.get(key)}, now {now[key]}"
        for key in now
        if key not in ignored and before.get(key) != now[key]
    ]
    if changed:
        raise UserError(f"out_dir={out_dir} holds images of other settings: {'; '.join(changed)}; give another out_dir")


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("sample")
