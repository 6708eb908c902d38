"""The `flowar` command: passes `flowar VERB ...` to that verb's function. Holds no logic; imports torch only to run.

A new verb is one row of VERBS and one file. Read next: config/load.py, then the file of the verb you use.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowar.base.errors import UserError, exit_with
from flowar.config.benching import BenchConfig
from flowar.config.data import CheckConfig, PrepareConfig
from flowar.config.drawing import InfoConfig, SampleConfig
from flowar.config.explain import Explained, describe_settings, explain
from flowar.config.jobs import DemoConfig, DoctorConfig
from flowar.config.load import Schema, describe_config, did_you_mean, load_config, setting_names
from flowar.config.measuring import EvaluateConfig, ReferenceConfig, SweepConfig
from flowar.config.suggesting import SuggestConfig
from flowar.config.tokenizing import TrainVAEConfig
from flowar.config.training import AverageConfig, ConvertConfig, ExportConfig, PlanConfig, ReplayConfig, TrainConfig
from flowar.config.watching import WatchConfig

# Settings that are on or off and can also be written as an option
FLAGS = {
    "preview": "draw a few pictures to look at; same as preview=true",
    "once": "write the page once and exit; same as once=true",
}
MORE_HELP = "More: `flowar VERB --help`, and `flowar help SETTING`, for example `flowar help optim.lr`"


@dataclass(frozen=True)
class Verb:
    """One verb: where its code is, its settings, its help, and what a scheduler needs to know."""

    function: str  # "module:function", called with (config, dry_run)
    schema: type[Any]
    summary: str
    example: str
    positionals: tuple[str, ...] = ()  # settings that bare words fill, in this order
    # To run as a job: the settings that name the output folder (the first one given counts). Empty: never as a job.
    folder: tuple[str, ...] = ()
    has_jobs_beside: bool = False  # the jobs' folder goes beside the output folder, a dataset that others share
    shares_work: bool = False  # any number of processes can share the work; finished work is kept

    def load(self) -> Callable[..., None]:
        """Return the verb's function; this imports what it needs."""
        module, _, name = self.function.partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name)
        return function


VERBS = {
    "prepare": Verb(
        "data_prep.encode:main", PrepareConfig, "encode images as VAE moments in MDS shards, with many workers",
        "flowar prepare images=/data/imagenet/train out_dir=/data/in256 vae.name=mar vae.weights=kl16.ckpt",
        folder=("out_dir",), has_jobs_beside=True, shares_work=True,
    ),
    "train-vae": Verb(
        "data_prep.train_vae:main", TrainVAEConfig, "train a VAE for your own images; run it again to resume",
        "flowar train-vae images=photos out_dir=vaes/photos image_size=64  # then vae.name=vaes/photos",
        folder=("out_dir",),
    ),
    "check": Verb(
        "data_prep.check:main", CheckConfig, "check that a dataset, run, model or samples are undamaged",
        "flowar check /data/in256 vae.name=mar vae.weights=kl16.ckpt", ("path",),
        folder=("path",), has_jobs_beside=True,
    ),
    "train": Verb(
        "flowar.train:main", TrainConfig, "train a model on prepared shards; run it again to resume",
        "flowar train configs/train/flowar_l.yaml run_dir=runs/l data.path=/data/in256 vae.weights=kl16.ckpt",
        folder=("run_dir",),
    ),
    "watch": Verb(
        "flowar.watch:main", WatchConfig, "write a page that follows a training run: curves, samples, restarts",
        "flowar watch runs/l  # and open runs/l/watch.html", ("run_dir",),
    ),
    "suggest": Verb(
        "flowar.suggest:main", SuggestConfig, "suggest settings to train on a dataset and this machine",
        "flowar suggest data.path=data/photos file=photos.yaml  # then: flowar train photos.yaml",
    ),
    "plan": Verb(
        "flowar.plan:main", PlanConfig, "predict memory, communication and time of a run on any GPUs",
        "flowar plan configs/train/flowar_h.yaml nodes=8 search=true",
    ),
    "replay": Verb(
        "flowar.replay:main", ReplayConfig, "repeat a step that training skipped, on one process",
        "flowar replay runs/l/anomalies/batch_00012345", ("bundle",),
    ),
    "sample": Verb(
        "flowar.sample:main", SampleConfig, "draw images, classes in turn, as PNG files",
        "flowar sample model=runs/l out_dir=samples/l num_images=50000 vae.weights=kl16.ckpt",
        folder=("out_dir",), shares_work=True,
    ),
    "evaluate": Verb(
        "flowar.evaluate:main", EvaluateConfig, "measure FID, Inception score, precision and recall of images",
        "flowar evaluate samples=samples/l reference=VIRTUAL_imagenet256_labeled.npz",
        folder=("out_dir", "samples"), shares_work=True,
    ),
    "make-reference": Verb(
        "flowar.evaluate:make_reference", ReferenceConfig, "compute the statistics of real images, for evaluate",
        "flowar evaluate make-reference images=imagenet/val out_dir=references/val",
        folder=("out_dir",), has_jobs_beside=True, shares_work=True,
    ),
    "sweep": Verb(
        "flowar.sweep:main", SweepConfig, "find the guidance, interval, steps and average with the best FID",
        "flowar sweep model=runs/l reference=references/in256 out_dir=sweeps/l sample.vae.weights=kl16.ckpt",
        folder=("out_dir",), shares_work=True,
    ),
    "export": Verb(
        "flowar.export:export", ExportConfig, "export a run's weights as model.safetensors and config.json",
        "flowar export runs/l models/l", ("model", "out_dir"),
    ),
    "ema": Verb(
        "flowar.export:average", AverageConfig, "compute an average of any length from a run's averages (EDM2)",
        "flowar ema runs/l models/l_008 std=0.08", ("run_dir", "out_dir"),
    ),
    "convert": Verb(
        "flowar.export:convert_checkpoint", ConvertConfig, "convert the authors' FlowAR or ARFlow to a model folder",
        "flowar convert FlowAR-L.pth models/flowar-l", ("checkpoint", "out_dir"),
    ),
    "info": Verb(
        "flowar.info:main", InfoConfig, "show parameters by part, token counts and FLOPs of a model",
        "flowar info flowar-h num_steps=50 guidance_interval=[0,0.7]", ("model.variant",),
    ),
    "bench": Verb(
        "flowar.bench:main", BenchConfig, "measure how fast a model trains and draws, against a baseline",
        "flowar bench what=sample model.variant=flowar-l depth=2 batch_size=4",
    ),
    "doctor": Verb(
        "flowar.doctor:main", DoctorConfig, "check that nodes, GPUs, network and files are fit for a run",
        "flowar doctor run_dir=runs/doctor data=/data/in256  # in a job: flowar submit doctor ... --cluster FILE",
        folder=("run_dir",),
    ),
    "demo": Verb(
        "flowar.demo:main", DemoConfig, "train on handwritten digits, up to a report, in minutes on a laptop",
        "flowar demo run_dir=runs/demo",
    ),
}  # fmt: skip


# Verbs with their own command line: the function that takes the words after the verb, and the help.
JOB_VERBS = {
    "submit": ("cluster.commands:submit_command", "run a verb, or a pipeline of verbs, as a Slurm job"),
    "resume": (
        "cluster.commands:resume_command",
        "start a run's latest job again with the same code, on any nodes",
    ),
    "status": ("cluster.status:status", "show jobs, states, nodes, step, loss, time left, restarts"),
    "logs": ("cluster.status:logs", "print what a task of a job printed"),
    "completion": ("flowar.completion:completion", "print completion for bash, zsh or fish"),
    "cancel": ("cluster.status:cancel", "cancel a run's jobs for good"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run `flowar VERB [CONFIG.yaml] [key=value ...] [--dry-run]`; the command line's words if none are given."""
    words = sys.argv[1:] if arguments is None else arguments
    summaries = {name: verb.summary for name, verb in VERBS.items()} | {k: v[-1] for k, v in JOB_VERBS.items()}
    listing = "\n".join(f"  {name:16}{summary}" for name, summary in summaries.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: flowar VERB [CONFIG.yaml] [key=value ...] [--dry-run]\n\n{listing}\n\n{MORE_HELP}")
        return
    if words[0] == "help":
        print(explain_setting(words[1]) if len(words) == 2 else MORE_HELP)
        return
    if words[:2] == ["evaluate", "make-reference"]:
        words = words[1:]
    name = words[0]
    if name not in summaries:
        sys.exit(f"flowar: {name!r} is not a verb{did_you_mean(name, summaries)}\n{listing}")
    try:
        if name in JOB_VERBS:
            module, _, function = JOB_VERBS[name][0].partition(":")
            getattr(importlib.import_module(module), function)(words[1:])
        else:
            _run(name, VERBS[name], words[1:])
    except UserError as error:
        exit_with(f"flowar {name}: {error}")
    except KeyboardInterrupt:
        exit_with(f"flowar {name}: stopped")
    except Exception:  # a bug
        traceback.print_exc()
        exit_with(1)


def run_verb(name: str, config: object) -> None:
    """Run a verb with ready settings; the demo calls the other verbs this way."""
    VERBS[name].load()(config)


def _run(name: str, verb: Verb, words: list[str]) -> None:
    needs_help = not {"-h", "--help"}.isdisjoint(words)  # reading the comments takes a moment
    settings = describe_settings(explain(verb.schema)) if needs_help else ""
    parser = argparse.ArgumentParser(
        prog=f"flowar {name}",
        description=verb.summary,
        usage=f"flowar {name} {' '.join(f'[{p.upper()}]' for p in verb.positionals)} [CONFIG.yaml] [key=value ...]",
        epilog=f"example:\n  {verb.example}\n\nsettings and their defaults:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml, key=value", help="one YAML file, then single settings"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, and exit")
    flags = [name for name in FLAGS if name in _names_of_flags(verb.schema)]
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=FLAGS[name])
    options = parse_options(parser, words, verb.schema)
    given = [*options.words, *(f"{name}=true" for name in flags if getattr(options, name))]
    config = parse_words(verb.schema, given, verb.positionals)
    verb.load()(config, dry_run=options.dry_run)
    if options.dry_run:  # after all checks, so that an error is printed alone
        print(describe_config(config))


def explain_setting(name: str) -> str:
    """Return the help of a setting in every verb that has it; `name` is a whole key, its last part, or a section."""
    found: dict[Explained, list[str]] = {}
    for verb_name, verb in VERBS.items():
        for setting in explain(verb.schema):
            is_named = setting.key == name or setting.key.rpartition(".")[2] == name
            if setting.kind and (is_named or setting.key.startswith(f"{name}.")):
                found.setdefault(setting, []).append(verb_name)
    if not found:
        keys = {setting.key for verb in VERBS.values() for setting in explain(verb.schema)}
        return f"{name} is not a setting{did_you_mean(name, sorted(keys))}"
    return "\n".join(f"{describe_settings([setting])}\n      in {', '.join(verbs)}" for setting, verbs in found.items())


def parse_options(
    parser: argparse.ArgumentParser, words: Sequence[str], schema: type[Any] | None = None
) -> argparse.Namespace:
    """Return the options and words of a command line.

    Args:
        parser: knows the options.
        words: of the command line.
        schema: dataclass of the settings that can be given beside the options, if any.

    Raises:
        UserError: if there is no such option; if a setting has that name, the message shows how to write it.
    """
    options, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        known = "; options are: " + ", ".join(name for action in parser._actions for name in action.option_strings[-1:])
        if schema is None:
            raise UserError(f"{unknown[0]} is not an option{known}")
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        near = did_you_mean(name, setting_names(schema)).partition("did you mean ")[2].rstrip("?")
        raise UserError(
            f"{unknown[0]} is not an option{known}. Settings are written without dashes, for example "
            f"{near or setting_names(schema)[0]}=..."
        )
    return options


def _names_of_flags(schema: type[Any]) -> set[str]:
    """Return the settings that are on or off."""
    return {name for name, field in schema.__dataclass_fields__.items() if field.type in (bool, "bool")}


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str], list[str]]:
    """Return the YAML file, the bare words and the settings among the words of a command line.

    Raises:
        UserError: if there is more than one YAML file.
    """
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    if len(files) > 1:
        raise UserError(f"got {len(files)} config files, {', '.join(files)}; give one, and the rest as key=value")
    bare = [word for word in words if "=" not in word and word not in files]
    return (Path(files[0]) if files else None), bare, [word for word in words if "=" in word]


def parse_words(schema: type[Schema], words: Sequence[str], positionals: Sequence[str] = ()) -> Schema:
    """Return the settings that the words of a command line give: one YAML file, bare words, key=value.

    Args:
        schema: dataclass of the settings.
        words: of the command line.
        positionals: settings that bare words fill, in this order.

    Raises:
        UserError: if one of the words is wrong.
    """
    file, bare, settings = split_words(words)
    if len(bare) > len(positionals):
        raise UserError(f"{bare[-1]!r} is neither a .yaml file nor a setting; settings are written key=value")
    filled = [f"{key}={word}" for key, word in zip(positionals, bare, strict=False)]
    return load_config(schema, file, (*filled, *settings))
