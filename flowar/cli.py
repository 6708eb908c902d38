"""The `flowar` command: hands `flowar VERB ...` to that verb's module. Holds no logic; imports torch only to run."""

import argparse
import importlib
import sys
from dataclasses import dataclass

from flowar import config as configs
from flowar.errors import UserError


@dataclass(frozen=True)
class Verb:
    """One verb: the module whose `main(config, dry_run)` runs it, its settings and its help."""

    module: str
    schema: type
    summary: str
    example: str
    positionals: tuple[str, ...] = ()  # settings that bare words fill, in this order


VERBS = {
    "prepare": Verb(
        "data_prep.encode", configs.PrepareConfig, "images -> MDS shards of VAE moments, by any number of workers",
        "flowar prepare images=/data/imagenet/train out_dir=/data/in256 vae.name=mar vae.weights=kl16.ckpt",
    ),
    "check": Verb(
        "data_prep.check", configs.CheckConfig, "is a dataset what its passport says? hashes, counts, a sample",
        "flowar check /data/in256 vae.name=mar vae.weights=kl16.ckpt", ("path",),
    ),
    "train": Verb(
        "flowar.train", configs.TrainConfig, "train a model on prepared shards; run it again to resume",
        "flowar train configs/train/flowar_l.yaml run_dir=runs/l data.path=/data/in256 vae.weights=kl16.ckpt",
    ),
    "plan": Verb(
        "flowar.plan", configs.PlanConfig, "memory, communication and time of a run, before renting anything",
        "flowar plan configs/train/flowar_h.yaml nodes=8 gpu=H100",
    ),
    "replay": Verb(
        "flowar.replay", configs.ReplayConfig, "repeat a step that training skipped, on one process",
        "flowar replay runs/l/anomalies/batch_00012345", ("bundle",),
    ),
    "sample": Verb(
        "flowar.sample", configs.SampleConfig, "draw images, class by class, as PNG files",
        "flowar sample model=runs/l out_dir=samples/l num_images=50000 vae.weights=kl16.ckpt",
    ),
    "evaluate": Verb(
        "flowar.evaluate", configs.EvaluateConfig, "FID, Inception score, precision and recall of images",
        "flowar evaluate samples=samples/l reference=VIRTUAL_imagenet256_labeled.npz",
    ),
    "make-reference": Verb(
        "flowar.references", configs.ReferenceConfig, "statistics and features of real images, for evaluate",
        "flowar evaluate make-reference images=imagenet/val out_dir=references/val",
    ),
    "sweep": Verb(
        "flowar.sweep", configs.SweepConfig, "guidance, interval, steps, averages: the best FID, and what it costs",
        "flowar sweep model=runs/l reference=references/in256 out_dir=sweeps/l sample.vae.weights=kl16.ckpt",
    ),
    "export": Verb(
        "flowar.export", configs.ExportConfig, "weights of a training run -> model.safetensors and config.json",
        "flowar export runs/l models/l", ("model", "out_dir"),
    ),
    "ema": Verb(
        "flowar.posthoc_ema", configs.AverageConfig, "an average of any length, from those that a run kept (EDM2)",
        "flowar ema runs/l models/l_008 std=0.08", ("run_dir", "out_dir"),
    ),
    "doctor": Verb(
        "flowar.doctor", configs.DoctorConfig, "are these nodes, their GPUs, network and file system fit? before a run",
        "flowar doctor run_dir=runs/doctor data=/data/in256  # in a job: flowar submit doctor ... --cluster FILE",
    ),
    "demo": Verb(
        "flowar.demo", configs.DemoConfig, "handwritten digits from images to a report, in minutes on a laptop",
        "flowar demo run_dir=runs/demo",
    ),
    "info": Verb(
        "flowar.info", configs.InfoConfig, "parameters by part, token counts and FLOPs of a model",
        "flowar info flowar-h num_steps=50 guidance_interval=[0,0.7]", ("model.variant",),
    ),
    "convert": Verb(
        "flowar.weights", configs.ConvertConfig, "the authors' FlowAR-*.pth -> model.safetensors and config.json",
        "flowar convert FlowAR-L.pth models/flowar-l", ("checkpoint", "out_dir"),
    ),
}  # fmt: skip


# Verbs with a command line of their own: the module and function that take the words after the verb, and their help.
JOB_VERBS = {
    "submit": ("cluster.submit", "main", "a verb, or a pipeline of them, as a Slurm job"),
    "resume": ("cluster.submit", "resume", "a run's newest job again, with the code it ran; also with other nodes"),
    "status": ("cluster.status", "status", "jobs, states, nodes, step, loss, time left, restarts, in one table"),
    "logs": ("cluster.status", "logs", "what a task of a job prints"),
    "cancel": ("cluster.status", "cancel", "end a run's jobs for good"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run `flowar VERB [CONFIG.yaml] [key=value ...] [--dry-run]`; the command line's words if none are given."""
    words = sys.argv[1:] if arguments is None else arguments
    summaries = {name: verb.summary for name, verb in VERBS.items()} | {k: v[-1] for k, v in JOB_VERBS.items()}
    listing = "\n".join(f"  {name:16}{summary}" for name, summary in summaries.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: flowar VERB [CONFIG.yaml] [key=value ...] [--dry-run]\n\n{listing}\n\nMore: flowar VERB --help")
        return
    if words[:2] == ["evaluate", "make-reference"]:
        words = words[1:]
    name = words[0]
    if name not in summaries:
        sys.exit(f"flowar: {name!r} is no verb{configs.did_you_mean(name, summaries)}\n{listing}")
    try:
        if name in JOB_VERBS:
            module, function, _ = JOB_VERBS[name]
            getattr(importlib.import_module(module), function)(words[1:])
        else:
            _run(name, VERBS[name], words[1:])
    except UserError as error:
        sys.exit(f"flowar {name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"flowar {name}: stopped")


def _run(name: str, verb: Verb, words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"flowar {name}",
        description=verb.summary,
        usage=f"flowar {name} {' '.join(f'[{p.upper()}]' for p in verb.positionals)} [CONFIG.yaml] [key=value ...]",
        epilog=f"example:\n  {verb.example}\n\nsettings and their defaults:\n\n{_settings(verb.schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml, key=value", help="one YAML file, then single settings"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and exit")
    if name == "sample":
        parser.add_argument("--preview", action="store_true", help="only pictures of what would be drawn; preview=true")
    options = parser.parse_intermixed_args(words)
    settings = [*options.words, "preview=true"] if getattr(options, "preview", False) else options.words
    config = parse_words(verb, settings)
    if options.dry_run:
        print(configs.describe_config(config))
    importlib.import_module(verb.module).main(config, dry_run=options.dry_run)


def parse_words(verb: Verb, words: list[str]) -> object:
    """Return a verb's settings from the words of a command line: one YAML file, bare words, key=value.

    Raises:
        UserError: if one of them is wrong.
    """
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    bare = [word for word in words if "=" not in word and word not in files]
    settings = [word for word in words if "=" in word]
    if len(files) > 1:
        raise UserError(f"one config file at a time, got {', '.join(files)}")
    if len(bare) > len(verb.positionals):
        raise UserError(f"{bare[-1]!r} is neither a .yaml file nor a setting; settings are written key=value")
    filled = [f"{key}={word}" for key, word in zip(verb.positionals, bare, strict=False)]
    return configs.load_config(verb.schema, files[0] if files else None, (*filled, *settings))


def _settings(schema: type) -> str:
    lines = configs.describe_config(schema).splitlines()
    return "\n".join(f"  {line}".replace("???", "(required)") for line in lines)


def run_verb(name: str) -> None:
    """Run one verb with the words of the command line: what `python -m flowar.VERB ...` does."""
    main([name, *sys.argv[1:]])
