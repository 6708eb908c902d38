"""FlowAR: scale-wise autoregressive image generation with flow matching. The public API, imported when first used."""

import importlib

_HOME = {
    "ModelConfig": "flowar.config",
    "UserError": "flowar.errors",
    "convert_released": "flowar.weights",
    "create_model": "flowar.weights",
    "load_model": "flowar.weights",
    "load_vae": "flowar.vae",
    "released_time_grid": "flowar.solvers",
    "sample_latents": "flowar.generate",
    "training_loss": "flowar.flow",
    "uniform_time_grid": "flowar.solvers",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'flowar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
