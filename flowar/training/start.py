"""Start a run from the weights of `init.model`: which of them are used how, and the record in the run's folder.

Once the run has a checkpoint, the init is no longer read. Read next: models/transfer.py for the rules,
config/starting.py for the settings.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flowar.base.errors import UserError
from flowar.base.hashes import hash_weights
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import (
    INIT_FILE,
    PASSPORT_FILE,
    checkpoint_step,
    find_latest,
    is_checkpoint,
    weights_folder,
)
from flowar.config.models import ModelConfig
from flowar.config.starting import InitConfig, read_init_shape
from flowar.config.training import TrainConfig
from flowar.latents.schema import Passport, read_passport
from flowar.models.family import Model
from flowar.models.folders import load_model
from flowar.models.transfer import (
    OUTCOMES,
    Outcome,
    match_classes,
    plan_transfer,
    read_classes,
    sum_outcomes,
    transfer,
)

INIT_KEYS = ("weights_sha256", "old")
INIT_RECORD_CURE = "restore it from a backup, or start again in another run_dir"
VAE_FIELDS = ("vae_sha256", "latent_multiplier", "latent_shift")


@dataclass(frozen=True)
class StartPlan:
    """What happens to the init's weights when the run starts."""

    folder: Path  # a model folder or a checkpoint
    shape: ModelConfig
    rows: list[int | None]  # for each class, the init's class whose row of the label table it takes
    outcomes: list[Outcome]
    notes: list[str]  # printed for the user


def plan_start(config: TrainConfig, passport: Passport) -> StartPlan | None:
    """Return how a run starts from its init; None if it has no init, or already has a checkpoint to resume from.

    Raises:
        UserError: if the init doesn't exist, or the run's model can't start with its weights.
    """
    init = config.init
    if init.model is None or find_latest(config.run_dir) is not None:
        return None
    shape, folder = read_init_shape(init.model), weights_folder(init.model)
    if init.weights != "ema" and not is_checkpoint(folder):
        raise UserError(
            f"init.weights={init.weights} chooses among the weights of a run or checkpoint, but init.model="
            f"{init.model} is a model folder; leave out init.weights"
        )
    before = read_passport(folder) if (folder / PASSPORT_FILE).is_file() else None
    rows, how = choose_rows(init, shape, config.model, before, passport)
    outcomes = plan_transfer(shape, config.model, rows)
    return StartPlan(
        folder, shape, rows, outcomes, [*describe_shapes(shape, config.model), how, vae_note(before, passport)]
    )


def choose_rows(
    init: InitConfig, old: ModelConfig, new: ModelConfig, before: Passport | None, passport: Passport
) -> tuple[list[int | None], str]:
    """Return for each class the init's class whose row of the label table it takes, and how they were matched.

    Raises:
        UserError: if the given classes aren't classes of the init, or can't be read.
    """
    old_names = before.class_names if before is not None else None
    if init.classes is not None:
        rows, how = read_classes(init.classes, old, new, old_names, "init.classes"), "as init.classes says"
    elif init.class_file is not None:
        source = f"init.class_file={init.class_file}"
        try:
            given = Path(init.class_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source} can't be read: {error}; give a text file with one class per line") from error
        words = [line.strip() for line in given if line.strip()]
        rows, how = read_classes(words, old, new, old_names, source), f"as {source} says"
    else:
        rows = match_classes(old, new, old_names, passport.class_names)
        how = "by name" if old_names is not None else "by number, as the init's class names are not known"
    taken = sum(row is not None for row in rows)
    return rows, f"label table: {taken} of {len(rows)} classes start with a row of the init, matched {how}"


def describe_shapes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Return in words the settings in which a model differs from its init."""
    before, after = asdict(old), asdict(new)
    different = [name for name in after if name != "variant" and before[name] != after[name]]
    listed = ", ".join(f"model.{name}={_shown(after[name])} (init: {_shown(before[name])})" for name in different)
    return [f"unlike the init: {listed}"] if different else []


def _shown(value: object) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value).replace(" ", "")


def vae_note(before: Passport | None, passport: Passport) -> str:
    """Return in words whether the init was trained on latents of the VAE that made the shards."""
    if before is None:
        return f"VAE: the init doesn't say which VAE's latents it was trained on; the shards hold {passport.vae_name}'s"
    if all(getattr(before, name) == getattr(passport, name) for name in VAE_FIELDS):
        return f"VAE: {passport.vae_name}, same as the init's"
    return (
        f"VAE: the init was trained on latents of {before.vae_name} (weights {before.vae_sha256[:12]}, multiplier "
        f"{before.latent_multiplier:g}), the shards hold latents of {passport.vae_name} ({passport.vae_sha256[:12]}, "
        f"{passport.latent_multiplier:g}), so the layers that read and write latents must be relearned in any case"
    )


def begin(plan: StartPlan, config: TrainConfig, model: Model) -> None:
    """Copy the init's weights into a fresh model, and record in the run's folder what was done; rank 0 only.

    Raises:
        UserError: if the init is damaged, or differs from what the run started with before it was killed.
    """
    state = load_model(plan.folder, config.init.weights).state_dict()
    digest, file = hash_weights(state), Path(config.run_dir) / INIT_FILE
    if file.is_file() and read_record(file, INIT_RECORD_CURE, INIT_KEYS)["weights_sha256"] != digest:
        raise UserError(
            f"run_dir={config.run_dir} started from other weights than init.model={config.init.model} holds now; "
            "restore those weights, or give another run_dir"
        )
    transfer(model, state, plan.shape, plan.rows)
    record: dict[str, Any] = {
        "model": str(plan.folder.absolute()),
        "step": checkpoint_step(plan.folder) if is_checkpoint(plan.folder) else None,
        "weights": config.init.weights,
        "weights_sha256": digest,
        "shape": asdict(plan.shape),
        "class_rows": plan.rows,
        "notes": plan.notes,
        "parts": sum_outcomes(plan.outcomes),
        "old": [outcome.name for outcome in plan.outcomes if outcome.is_old],
    }
    write_record(file, record)


def show_start(plan: StartPlan, init: InitConfig) -> None:
    """Print what happens to the init's weights, by part of the model: numbers of parameters and tensors."""
    weights = f", weights {init.weights}" if is_checkpoint(plan.folder) else ""
    table = Table("part", *OUTCOMES, title=f"starts from {plan.folder}{weights}: parameters (tensors)")
    for part, counts in sum_outcomes(plan.outcomes).items():
        cells = (counts[kind] for kind in OUTCOMES)
        table.add_row(part, *(f"{number:,} ({tensors})" if number else "-" for tensors, number in cells))
    Console().print(table)
    for note in plan.notes:
        print(note)


def read_old_names(config: TrainConfig) -> frozenset[str]:
    """Return the names of a run's parameters whose values all came from the init.

    Raises:
        UserError: if the run's record of its start is missing or damaged.
    """
    if config.init.model is None:
        return frozenset()
    file = Path(config.run_dir) / INIT_FILE
    try:
        return frozenset(read_record(file, INIT_RECORD_CURE, INIT_KEYS)["old"])
    except OSError as error:
        raise UserError(
            f"can't read {file}, which records what came from init.model: {error.strerror}; {INIT_RECORD_CURE}"
        ) from error


def is_same_start(run_dir: Path, init: InitConfig) -> bool:
    """Return whether an init holds the weights that a run started with, even if it is given by another path.

    Raises:
        UserError: if the init can't be read.
    """
    if init.model is None:
        return False
    state = load_model(weights_folder(init.model), init.weights).state_dict()
    record = read_record(run_dir / INIT_FILE, INIT_RECORD_CURE, INIT_KEYS)
    return bool(record["weights_sha256"] == hash_weights(state))
