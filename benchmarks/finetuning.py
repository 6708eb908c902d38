"""The value of starting from weights: fine-tune the demo's model on other digits and sizes, against fresh weights.

Both train for a tenth of the demo's steps with the same settings, seeds, batches and draws. This compares their loss on
held-out digits, with the same noise and times, and how many samples from the same noise show the requested digit. Run
`flowar demo run_dir=runs/demo` first, then this: `--demo runs/demo --out runs/tuned`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_prep import encode
from flowar import train
from flowar.base.run_folder import PASSPORT_FILE
from flowar.config.data import DataConfig, PrepareConfig
from flowar.config.jobs import DEMOS
from flowar.config.load import load_config
from flowar.config.starting import InitConfig
from flowar.config.training import EMAConfig, PreviewConfig, TrainConfig
from flowar.evaluation.demo_images import IMAGE_SIZE
from flowar.evaluation.judge import classify, load_judge
from flowar.latents.batches import Batch
from flowar.latents.shards import LatentShards
from flowar.latents.vae import load_vae, to_uint8
from flowar.models.build import family_of
from flowar.models.family import Model, weigh
from flowar.models.folders import load_model
from flowar.training.step import StepSettings, draw_training_inputs

DEMO = DEMOS["flowar"]
GROUPS = 36  # of held-out images, for the error of the mean loss
DRAWS = 8  # of noise and time for each held-out image
SAMPLES = 400
AT_ONCE = 200
Z_95 = 1.96  # of a normal distribution


class Task(NamedTuple):
    """A task that the demo's model is fine-tuned on."""

    name: str
    digits: tuple[int, ...]
    image_size: int = IMAGE_SIZE


TASKS = {
    "five": Task("digits 0 to 4", tuple(range(5))),
    "eight": Task("digits 2 to 9", tuple(range(2, 10))),
    "large": Task("all digits at 64 px", tuple(range(10)), 2 * IMAGE_SIZE),
}


def prepare(demo: Path, out: Path, task: Task, split: str) -> Path:
    """Return a dataset of some of the demo's digits."""
    images, dataset = out / f"{split}_images", out / split
    if not (dataset / PASSPORT_FILE).exists():
        images.mkdir(parents=True, exist_ok=True)
        for digit in task.digits:
            if not (images / str(digit)).exists():
                (images / str(digit)).symlink_to((demo / "images" / split / str(digit)).absolute())
        encode.main(
            PrepareConfig(
                images=str(images), out_dir=str(dataset), vae=DEMO.train.vae, image_size=task.image_size, flip=False,
                num_workers=0, device="cpu",
            )
        )  # fmt: skip
    return dataset


def settings(demo: Path, out: Path, data: Path, seed: int, *, is_fresh: bool, lr: float) -> TrainConfig:
    """Return a run of a tenth of the demo's steps; a fresh run has the same model, with a fresh model's positions."""
    recipe, shards = DEMO.train, LatentShards(DataConfig(path=str(data))).passport
    steps = recipe.count_steps(LatentShards(DataConfig(path=str(demo / "data"))).passport.num_images) // 10
    run_dir = out / f"{'fresh' if is_fresh else 'init'}_{lr:g}_{seed}"
    words = (f"init={demo / 'train'}", f"data.path={data}", f"run_dir={run_dir}", f"seed={seed}", "data.num_workers=0")
    config = load_config(TrainConfig, None, words)
    epochs = steps * recipe.batch_size / shards.num_images
    if is_fresh:
        fresh = dataclasses.replace(config.model, position_span=None)  # type: ignore[call-arg]  # it is a FlowAR's
        config = dataclasses.replace(config, init=InitConfig(), model=fresh)
    return dataclasses.replace(
        config, vae=recipe.vae, epochs=epochs, batch_size=recipe.batch_size, precision=recipe.precision, device="cpu",
        optim=dataclasses.replace(recipe.optim, lr=lr, warmup_epochs=epochs / 10), ema=EMAConfig(decays=(0.9,)),
        preview=PreviewConfig(every_steps=0), save_every_steps=10**6, keep_checkpoints=1, peak_tflops=1.0,
    )  # fmt: skip


@torch.inference_mode()
def held_out_losses(model: Model, config: TrainConfig, data: Path) -> NDArray[np.float64]:
    """Return the loss of each group of held-out images, over several draws of noise and time, (GROUPS,)."""
    shards = LatentShards(DataConfig(path=str(data)))
    step = dataclasses.replace(StepSettings.of(config, 1, shards.passport.latent_multiplier), label_dropout=0.0, seed=0)
    family, rows = family_of(config.model), np.arange(shards.passport.num_images)
    found = np.zeros(GROUPS)
    for group, chosen in enumerate(np.array_split(rows, GROUPS)):
        read = shards.read(np.repeat(chosen, DRAWS).tolist())
        moments, labels = torch.from_numpy(np.ascontiguousarray(read["moments"])), torch.tensor(read["label"])
        inputs = draw_training_inputs(Batch(moments, labels, labels), group + 1, step)
        losses = family.losses(model, config.model, inputs.latents, inputs.labels, inputs.draws)
        found[group] = weigh(losses, family.loss_terms(config.model).values()).item()
    return found


@torch.inference_mode()
def shows_asked(model: Model, config: TrainConfig, task: Task, demo: Path) -> NDArray[np.float64]:
    """Return whether each sample shows the requested digit, by the demo's judge, (SAMPLES,)."""
    (judge, _), vae = load_judge(demo / "judge.safetensors"), load_vae(config.vae.name, None)
    family, generator = family_of(config.model), torch.Generator().manual_seed(0)
    found = []
    for begin in range(0, SAMPLES, AT_ONCE):
        labels = torch.arange(begin, begin + AT_ONCE) % len(task.digits)
        noise = torch.randn(AT_ONCE, *family.noise_shape(config.model), generator=generator)
        latents = family.generate(model, labels, noise, DEMO.draw, lambda shape: torch.randn(AT_ONCE, *shape))[-1]
        images = F.interpolate(to_uint8(vae.decode(latents)).float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        answers = classify(judge, images.round().to(torch.uint8))
        found.append((answers == torch.tensor(task.digits)[labels]).double().numpy())
    return np.concatenate(found)


def describe_difference(differences: NDArray[np.float64]) -> str:
    """Return the mean of paired differences with its 95% interval."""
    mean, error = differences.mean(), Z_95 * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{mean:+.4f} ({mean - error:+.4f} to {mean + error:+.4f})"


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=DEMO.train.optim.lr, help="of both; the demo's is the default")
    options = parser.parse_args()
    for name in options.tasks:
        task, out = TASKS[name], options.out / name
        data, held_out = (prepare(options.demo, out, task, split) for split in ("train", "held_out"))
        losses, answers = [], []
        for seed in range(1, options.seeds + 1):
            pair = []
            for is_fresh in (False, True):
                config = settings(options.demo, out, data, seed, is_fresh=is_fresh, lr=options.lr)
                train.main(config)
                model = load_model(config.run_dir, "raw")
                pair.append((held_out_losses(model, config, held_out), shows_asked(model, config, task, options.demo)))
            (old_loss, old_right), (new_loss, new_right) = pair
            losses.append(old_loss - new_loss)
            answers.append(old_right - new_right)
            print(
                f"RESULT {task.name}, seed {seed}: held-out loss {old_loss.mean():.4f} with init, {new_loss.mean():.4f}"
                f" fresh, difference {describe_difference(losses[-1])}; shown as asked {old_right.mean():.1%} and "
                f"{new_right.mean():.1%}, difference {describe_difference(answers[-1])}",
                flush=True,
            )
        print(
            f"RESULT {task.name}, {options.seeds} seeds: loss {describe_difference(np.mean(losses, axis=0))}, shown as "
            f"asked {describe_difference(np.mean(answers, axis=0))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
