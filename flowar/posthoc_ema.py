"""`flowar ema`: an average of any length, put together from those that a run kept. Read next: ema.py."""

from pathlib import Path

import torch

from flowar.config import AverageConfig
from flowar.ema import combine_weights
from flowar.errors import UserError
from flowar.run_folder import AVERAGES, checkpoint_step, list_checkpoints, read_progress
from flowar.weights import WEIGHTS_FILE, load_model, save_model_whole


def main(config: AverageConfig, dry_run: bool = False) -> None:
    """Write a model folder with the weights averaged by the asked power function."""
    target = Path(config.out_dir)
    if target.exists():
        raise UserError(f"{target} already exists; give another out_dir, or remove it first")
    kept = list_checkpoints(config.run_dir, AVERAGES)
    if not kept:
        raise UserError(
            f"run_dir={config.run_dir} kept no averages; train with ema.stds=[0.05,0.1] and ema.keep_every_steps=..."
        )
    last = config.step or checkpoint_step(kept[-1])
    kept = [folder for folder in kept if checkpoint_step(folder) <= last]
    if not kept or checkpoint_step(kept[-1]) != last:
        raise UserError(f"step={last} is none that {config.run_dir} kept; see {Path(config.run_dir) / AVERAGES}")
    stored = [(folder, name) for folder in kept for name in read_progress(folder)["averages"]]
    updates = [read_progress(folder)["updates"] for folder, _ in stored]
    stds = [float(name.removeprefix("std_")) for _, name in stored]
    factors = combine_weights(updates, stds, updates[-1], config.std)
    print(
        f"std {config.std:g} after step {last:,}, from {len(stored)} averages of {len(kept)} steps and stds "
        f"{sorted(set(stds))}; factors from {factors.min():.3f} to {factors.max():.3f}, together {factors.sum():.4f}"
    )
    if dry_run:
        return
    total = None
    for factor, (folder, name) in zip(factors.tolist(), stored, strict=True):
        model = load_model(folder, name)
        state = {key: tensor.double() * factor for key, tensor in model.state_dict().items()}
        total = state if total is None else {key: total[key] + state[key] for key in total}
    save_model_whole(model.config, {key: tensor.to(torch.float32) for key, tensor in total.items()}, target)
    print(f"wrote {target / WEIGHTS_FILE}")


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("ema")
