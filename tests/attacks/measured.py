"""What is measured in the attacks on features, numbers and sweeps: settings for the objects of `root`."""

import dataclasses

from flowar.config.data import ExtractorConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.measuring import EvaluateConfig, SweepConfig
from flowar.evaluation.extractors import OWN

NUM = 20


def judge(root):
    return ExtractorConfig(name=OWN, weights=str(root / "judge.safetensors"))


def drawing(root, out_dir, **changes):
    settings = {"num_images": NUM, "batch_size": 10, "chunk_batches": 1, "num_steps": 2, "vae": VAEConfig(name="demo")}
    return SampleConfig(model=str(root / "model"), out_dir=str(out_dir), extractor=judge(root), **(settings | changes))


def measuring(root, **changes):
    settings = {"samples": root / "images", "reference": root / "ref_real", "out_dir": root / "out"} | changes
    more = {name: settings.pop(name) for name in list(settings) if name not in ("samples", "reference", "out_dir")}
    paths = {name: str(value) for name, value in settings.items()}
    return EvaluateConfig(extractor=judge(root), protocol="torch-fidelity", interval_groups=0, **paths, **more)


def sweeping(root, out_dir, **changes):
    base = dataclasses.replace(drawing(root, "x"), features_only=False)
    settings = {
        "model": str(root / "model"),
        "reference": str(root / "ref_real"),
        "out_dir": str(out_dir),
        "sample": base,
        "guidance": (1.0, 2.0),
        "interval_ends": (1.0,),
        "num_steps": (2,),
        "num_images": (NUM,),
        "interval_groups": 0,
        "extractor": judge(root),
    }
    return SweepConfig(**(settings | changes))
