"""Images/s of the whole `flowar sample` against model and VAE alone; and of 2 processes against 1.

Run `python -m benchmarks.sampling`. It uses an untrained FlowAR of the demo's shape, and one thread per process. Kinds
of runs alternate; it prints medians.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path

import torch

from flowar.base.seeding import StepNoise, draw_image_noise
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.latents.vae import load_vae, to_uint8
from flowar.models.build import create_model, family_of
from flowar.models.folders import load_model, save_model
from flowar.sample import main

BATCH = 64


def bare(config: SampleConfig) -> float:
    """Return the images/s of a plain loop: noise, model, VAE, rounding; nothing is written."""
    torch.set_num_threads(1)
    model, vae = load_model(config.model), load_vae("demo")
    family = family_of(model.config)
    began = time.perf_counter()
    for first in range(0, config.num_images, config.batch_size):
        numbers = range(first, min(first + config.batch_size, config.num_images))
        labels = torch.tensor([number % model.config.num_classes for number in numbers])
        noise = draw_image_noise(family.noise_shape(model.config), numbers, config.seed)
        *_, latents = family.generate(model, labels, noise, config, StepNoise(numbers, config.seed, labels.device))
        with torch.inference_mode():
            to_uint8(vae.decode(latents))
    return config.num_images / (time.perf_counter() - began)


def work(config: SampleConfig, ready: Semaphore, go: Event) -> None:
    """Run one worker: report that imports are done, wait, draw."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    load_vae("demo")  # imports diffusers, which takes seconds
    ready.release()
    go.wait()
    main(config)


def whole(config: SampleConfig, processes: int) -> float:
    """Return the images/s of several workers, from loading the weights to the last file."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    workers = [context.Process(target=work, args=(config, ready, go)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    began = time.perf_counter()
    go.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    assert len(list((Path(config.out_dir) / "images").glob("*.png"))) == config.num_images
    return config.num_images / elapsed


def run() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = create_model("flowar-demo")
        save_model(model.config, model.state_dict(), Path(scratch) / "model")
        speeds: dict[str, list[float]] = {"bare": [], "one": [], "two": []}
        for number in range(options.rounds):
            settings = {"model": f"{scratch}/model", "vae": VAEConfig(name="demo"), "num_steps": options.steps}
            settings |= {"num_images": options.images, "batch_size": BATCH}
            speeds["bare"].append(bare(SampleConfig(out_dir="none", **settings)))
            for name, processes in (("one", 1), ("two", 2)):
                speeds[name].append(whole(SampleConfig(out_dir=f"{scratch}/{name}{number}", **settings), processes))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(", ".join(f"{name} {value:.1f} images/s" for name, value in medians.items()))
    print(f"whole command over bare loop: {medians['one'] / medians['bare']:.3f}")
    print(f"two processes over one: {medians['two'] / medians['one']:.3f}")


if __name__ == "__main__":
    run()
