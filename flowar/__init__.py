"""FlowAR: scale-wise autoregressive image generation with flow matching. The public API, imported when first used."""

import importlib

_HOME = {
    "FlowARPipeline": "flowar.pipeline",
    "ModelConfig": "flowar.config.models",
    "UserError": "flowar.base.errors",
    "convert_released": "flowar.models.build",
    "create_model": "flowar.models.build",
    "load_model": "flowar.models.folders",
    "load_vae": "flowar.latents.vae",
    "released_time_grid": "flowar.models.build",
    "sample_latents": "flowar.models.build",
    "training_loss": "flowar.models.build",
    "uniform_time_grid": "flowar.models.solvers",
}

__all__ = list(_HOME)
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'flowar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
