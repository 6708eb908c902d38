"""State dicts: loaded strictly, with messages that name what does not fit."""

from torch import Tensor, nn

from flowar.base.errors import UserError


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state` into `model`; every key and shape has to fit.

    Raises:
        UserError: names the missing and unknown keys, or the first tensors of another shape.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"{source} does not hold this model: {report_keys(missing, unknown)}")
    shapes = [
        f"{name} is {tuple(state[name].shape)}, needs {tuple(expected[name].shape)}"
        for name in expected
        if state[name].shape != expected[name].shape
    ]
    if shapes:
        raise UserError(f"{source} holds another model ({len(shapes)} shapes differ): {'; '.join(shapes[:3])}")
    numbers = [
        f"{name} is {state[name].dtype}"
        for name in expected
        if expected[name].is_floating_point() and not state[name].is_floating_point()  # counters are integers
    ]
    if numbers:
        raise UserError(f"{source} holds no weights: {'; '.join(numbers[:3])}; floating-point numbers are needed")
    model.load_state_dict(state)


def report_keys(missing: list[str], unknown: list[str]) -> str:
    """Return which keys are missing and which are unknown."""
    parts = [f"{what} {name_some(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    return "; ".join(parts)


def name_some(names: list[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
