"""Weights of one model as the start of another one: of other classes, another resolution, other latents.

What becomes of each tensor follows from the two shapes and is known before any weight is read. Read next: family.py for
what a family says of its tensors, training/start.py for who asks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowar.base.errors import UserError
from flowar.config.models import ModelConfig
from flowar.models.build import create_model, family_of
from flowar.models.family import Model

OUTCOMES = ("loaded", "interpolated", "fresh", "dropped")


@dataclass(frozen=True)
class Outcome:
    """What becomes of one tensor: how many values are taken over, lie between known ones, are new, or are lost."""

    name: str
    part: str  # of the model, as `flowar info` calls it
    loaded: int = 0
    interpolated: int = 0
    fresh: int = 0
    dropped: int = 0  # values of the old tensor

    @property
    def is_old(self) -> bool:
        """Whether all of its values come from the old model."""
        return not self.fresh


def plan_transfer(old: ModelConfig, new: ModelConfig, rows: Sequence[int | None]) -> list[Outcome]:
    """Return what becomes of each tensor of a model that starts with the weights of another one.

    Args:
        old: shape of the model whose weights they are.
        new: shape of the model that starts with them.
        rows: for each class of the new model, the class of the old one whose row of the label table it takes, or None.

    Raises:
        UserError: if they are of different families or sizes; names the settings that differ.
    """
    check_related(old, new)
    family = family_of(new)
    with torch.device("meta"):
        before, after = (dict(create_model(config).named_parameters()) for config in (old, new))
    outcomes = []
    for name, parameter in after.items():
        part, size, was = family.part_of(name), parameter.numel(), before[name].numel()
        kind = family.follows_from(name)
        if kind == "classes":
            width, taken = parameter[0].numel(), [row for row in rows if row is not None]
            found = {"loaded": width * (len(taken) + 1), "fresh": width * (len(rows) - len(taken))}
            found["dropped"] = width * (old.num_classes - len(set(taken)))
        elif kind == "positions":
            width, pairs = parameter[0].numel(), match_grids(family.position_grids(old), family.position_grids(new))
            known = sum(side * side for side, source in pairs if side == source)
            unused = set(family.position_grids(old)) - {source for _, source in pairs}
            found = {"loaded": width * known, "interpolated": size - width * known}
            found["dropped"] = width * sum(side * side for side in unused)
        elif kind == "latents" and latents_differ(old, new):
            found = {"fresh": size, "dropped": was}
        else:
            found = {"loaded": size}
        outcomes.append(Outcome(name, part, **found))
    return outcomes


def check_related(old: ModelConfig, new: ModelConfig) -> None:
    """Raise a UserError where no part of a model could start with the weights of the other one."""
    if old.family != new.family:
        raise UserError(
            f"init.model is of the family {old.family}, but model.family={new.family}; give another init, or leave the "
            "settings of model out: then it has the shape of the init"
        )
    before, after = asdict(old), asdict(new)
    different = [name for name in after if name not in new.adaptable and before[name] != after[name]]
    if different:
        listed = ", ".join(f"model.{name}={after[name]} (init: {before[name]})" for name in different)
        settings = " ".join(f"model.{name}={before[name]}" for name in different)
        raise UserError(
            f"the model can't start with the weights of init.model, as it is of another size: {listed}; set {settings}"
            ", or leave the settings of model out: then it has the shape of the init"
        )


def latents_differ(old: ModelConfig, new: ModelConfig) -> bool:
    """Return whether the layers that latents enter and leave have other shapes."""
    family, shapes = family_of(new), []
    with torch.device("meta"):
        for config in (old, new):
            named = create_model(config).named_parameters()
            shapes.append([tuple(p.shape) for name, p in named if family.follows_from(name) == "latents"])
    return shapes[0] != shapes[1]


def match_grids(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each new grid's side that of the old grid it takes its positions from: the same, or the nearest."""
    return [(side, min(old, key=lambda known: (abs(known - side), -known))) for side in new]


@torch.no_grad()
def transfer(model: Model, state: dict[str, Tensor], old: ModelConfig, rows: Sequence[int | None]) -> None:
    """Overwrite the fresh weights of a model with those of another one, as `plan_transfer` says.

    Args:
        model: with fresh weights.
        state: the other model's weights.
        old: its shape.
        rows: as of `plan_transfer`.
    """
    family, renewed = family_of(model.config), latents_differ(old, model.config)
    for name, parameter in model.named_parameters():
        source, kind = state[name].to(parameter), family.follows_from(name)
        if kind == "classes":
            parameter[-1] = source[-1]  # "no class"
            for row, taken in enumerate(rows):
                if taken is not None:
                    parameter[row] = source[taken]
        elif kind == "positions":
            grids = family.position_grids(old), family.position_grids(model.config)
            parameter.copy_(resize_positions(source, *grids))
        elif not (kind == "latents" and renewed):
            parameter.copy_(source)


def resize_positions(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Return a table of learned positions (tokens of all new grids, D) from one of other grids.

    Args:
        table: (tokens of all old grids, D), grid after grid.
        old: sides of the old grids.
        new: sides of the new ones; one that isn't among the old is interpolated (bicubic) from the nearest.
    """
    by_side = dict(zip(old, table.split([side * side for side in old]), strict=True))
    found = []
    for side, source in match_grids(old, new):
        grid = by_side[source]
        if side != source:
            image = grid.mT.unflatten(1, (source, source))[None]  # (1, D, source, source)
            image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
            grid = image[0].flatten(1).mT
        found.append(grid)
    return torch.cat(found)


def match_classes(
    old: ModelConfig, new: ModelConfig, old_names: Sequence[str] | None, new_names: Sequence[str]
) -> list[int | None]:
    """Return for each class of the new model the class of the old one that it starts with, or None for a fresh row.

    By name where both models' names are known, else by number.
    """
    if old_names is not None:
        place = {name: number for number, name in enumerate(old_names)}
        return [place.get(name) for name in new_names]
    return [number if number < old.num_classes else None for number in range(new.num_classes)]


def read_classes(
    given: Sequence[str], old: ModelConfig, new: ModelConfig, old_names: Sequence[str] | None, source: str
) -> list[int | None]:
    """Return for each class of the new model the class of the old one that was given: a name, a number, or "new".

    Raises:
        UserError: if there are not as many as classes, or one is not a class of the old model.
    """
    if len(given) != new.num_classes:
        raise UserError(
            f"{source} names {len(given)} classes, but the dataset has {new.num_classes}; name for each of them a "
            'class of the init model, or "new"'
        )
    place = {name: number for number, name in enumerate(old_names or ())}
    rows: list[int | None] = []
    for word in given:
        number = place.get(word, int(word) if word.isdecimal() else -1)
        if word != "new" and not 0 <= number < old.num_classes:
            known = f"its names are {', '.join(old_names[:5])}, ..." if old_names else "its names are not known"
            raise UserError(
                f"{source}: {word!r} is not a class of the init model, which has numbers 0 to {old.num_classes - 1}; "
                f'{known}; give one of these, or "new"'
            )
        rows.append(None if word == "new" else number)
    return rows


def sum_outcomes(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return by part of the model how many tensors and parameters had each outcome: {part: {outcome: [tensors, n]}}."""
    parts: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        counts = parts.setdefault(outcome.part, {kind: [0, 0] for kind in OUTCOMES})
        for kind in OUTCOMES:
            number = getattr(outcome, kind)
            counts[kind] = [counts[kind][0] + bool(number), counts[kind][1] + number]
    return parts
