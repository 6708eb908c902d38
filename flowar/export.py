"""`flowar export`: weights of a training run as a model folder of their own. Read next: weights.py."""

from pathlib import Path

from flowar.config import ExportConfig
from flowar.errors import UserError
from flowar.weights import CONFIG_FILE, WEIGHTS_FILE, find_model_folder, load_model, save_model_whole


def main(config: ExportConfig, dry_run: bool = False) -> None:
    """Write model.safetensors and config.json, whole or not at all."""
    source, target = find_model_folder(config.model), Path(config.out_dir)
    if target.exists():
        raise UserError(f"{target} already exists; give another out_dir, or remove it first")
    model = load_model(source, config.weights)
    print(f"{source}, weights {config.weights}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if dry_run:
        return
    save_model_whole(model.config, model.state_dict(), target, passport_of=source)
    print(f"wrote {target / WEIGHTS_FILE} and {target / CONFIG_FILE}")


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("export")
