"""Settings of jobs on a cluster, of chains of them, of the doctor and of the demo."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from flowar.base.errors import UserError
from flowar.config.data import PrepareConfig, VAEConfig
from flowar.config.drawing import DrawConfig, SampleConfig, SamplingConfig
from flowar.config.measuring import EvaluateConfig, MeasureConfig
from flowar.config.models import MODEL_VARIANTS
from flowar.config.training import EMAConfig, OptimConfig, PreviewConfig, RecipeConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class FollowedConfig(MeasureConfig):
    """How the samples of one checkpoint are drawn and measured."""

    sample: SamplingConfig = field(default_factory=lambda: SamplingConfig(features_only=True))


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """How `flowar submit evaluate --follow RUN_DIR` measures each checkpoint of a training run."""

    evaluate: FollowedConfig = field(default_factory=FollowedConfig)
    num_images: int = 10_000
    every_steps: int = 0  # measure checkpoints at multiples of this; 0: all that are found
    milestone_every_steps: int = 0  # measure those at multiples of this with more images; 0: none
    milestone_images: int = 50_000
    poll_s: float = 60  # seconds between two looks at the run

    def __post_init__(self) -> None:
        if min(self.num_images, self.milestone_images) < 10 or self.poll_s <= 0:
            raise UserError(
                f"num_images={self.num_images} and milestone_images={self.milestone_images} must be at least 10, "
                f"poll_s={self.poll_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a job asks the scheduler for, `flowar submit ... --cluster FILE`."""

    scheduler: Literal["slurm", "local"] = "slurm"  # local: processes on this machine, in the background
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes, as `flowar doctor` names them
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None  # None: one for each GPU, or one
    cpus_per_task: int = 1
    mem_gb: float | None = None  # memory of a node; 0: all of it
    time_min: int = 60
    exclusive: bool = False
    array: int = 1  # how many such jobs share the work of prepare, sample, evaluate, make-reference or sweep
    stop_before_end_s: int = 180  # save and stop this long before the time limit, then requeue
    max_restarts: int = 5  # restarts after a crash of a task or a node; preemption does not count
    sbatch: dict[str, str] = field(default_factory=dict)  # other options of sbatch, by their long names
    srun: tuple[str, ...] = ()  # more arguments of srun, for example --container-image=...
    setup: tuple[str, ...] = ()  # lines of the batch script before the tasks, for example module load cuda
    # Environment variables of the tasks. Write a secret as ${oc.env:NAME}: it is taken from your shell and never stored
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # Python that runs the tasks; None: the one that submits

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "time_min", "array"):
            if getattr(self, name) < 1:
                raise UserError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            raise UserError(f"cluster.tasks_per_node={self.tasks_per_node} must be at least 1")
        if self.gpus_per_node < 0 or self.max_restarts < 0 or self.stop_before_end_s < 0:
            raise UserError(
                f"cluster.gpus_per_node={self.gpus_per_node}, cluster.max_restarts={self.max_restarts} and "
                f"cluster.stop_before_end_s={self.stop_before_end_s} must not be below 0"
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"cluster.environment.{name} is not the name of a variable; use letters, digits and _")
        if self.stop_before_end_s >= 60 * self.time_min:
            raise UserError(
                f"cluster.stop_before_end_s={self.stop_before_end_s} is not less than cluster.time_min={self.time_min} "
                "minutes: the job would stop before its first step"
            )

    @property
    def tasks(self) -> int:
        """Tasks on one node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A chain of jobs: each starts when the previous one has finished. Steps without settings are not run."""

    run_dir: str = MISSING  # folder of the chain itself: its jobs and what they print
    prepare: PrepareConfig | None = None
    train: TrainConfig | None = None
    sample: SampleConfig | None = None
    evaluate: EvaluateConfig | None = None
    # What differs from --cluster FILE in each step, for example {sample: {array: 16, nodes: 1}}
    cluster: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is checked on every node of an allocation."""

    run_dir: str = "runs/doctor"  # where the report goes; its file system is measured
    data: str | None = None  # folder of a dataset: some of its shards are read and compared with their hashes
    num_shards: int = 4  # read by each process
    write_mib: int = 256  # written by each process
    message_mib: int = 64  # of the all-reduce between two nodes
    min_share: float = 0.5  # nodes below this share of the median speed are outliers
    min_shm_gib: float = 1.0  # free in /dev/shm, for readers
    min_open_files: int = 4096  # open files that a process may have (ulimit -n)
    max_clock_s: float = 5  # between the clocks of two nodes
    timeout_s: float = 120  # seconds until a rank that does not answer counts as lost
    device: str = "auto"  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Handwritten digits, or clothes, from scratch to a report, in minutes."""

    model: Literal["flowar", "arflow"] = "flowar"  # model family; it also sets the defaults of train and draw
    data: Literal["digits", "fashion"] = "digits"  # real images: scikit-learn's digits, or Fashion-MNIST's clothes
    # Folder of Fashion-MNIST's idx files; None: where Debian's package dataset-fashion-mnist or torchvision puts them
    images: str | None = None
    run_dir: str = "runs/demo"  # folder for everything that the demo writes
    # Steps of the VAE that data=fashion trains first, as the demo's VAE knows only digits; unused with train.vae.name
    vae_steps: int = 2000
    train: RecipeConfig = field(default_factory=lambda: _demo_training("flowar-demo"))  # how the model is trained
    num_samples: int = 1440  # as many as training images, so that both Frechet distances are equally biased
    # how samples are drawn
    draw: DrawConfig = field(
        default_factory=lambda: DrawConfig(num_steps=40, guidance=1.1, guidance_interval=(0.0, 0.7))
    )

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples} must be at least 1")
        if self.vae_steps < 1:
            raise UserError(f"vae_steps={self.vae_steps} must be at least 1")
        if self.train.model.family != self.model:
            raise UserError(
                f"model={self.model}, but train.model.family={self.train.model.family}; give "
                f"model={self.train.model.family}, or a train.model.variant of {self.model}"
            )

    @classmethod
    def start_from(cls, given: Mapping[str, Any]) -> "DemoConfig | None":
        """Return the settings that the given ones start from, by data and family; None: the defaults."""
        return DEMOS.get("fashion" if given.get("data") == "fashion" else str(given.get("model")))


def _demo_training(variant: str, **changes: Any) -> RecipeConfig:
    """Return the demo's training: digits, 32 px, small enough for two CPU cores and a few minutes."""
    settings: dict[str, Any] = {
        "optim": OptimConfig(lr=3e-3, min_lr=1e-4, warmup_epochs=5),
        "epochs": 56,
        "batch_size": 64,
        "preview": PreviewConfig(every_steps=400, num_images=40, num_steps=16, guidance=1.1),
    }
    return RecipeConfig(
        model=MODEL_VARIANTS[variant],
        vae=VAEConfig(name="demo"),
        ema=EMAConfig(decays=(0.995,)),
        precision="fp32",
        log_every_steps=20,
        save_every_steps=200,
        **(settings | changes),
    )


_ARFLOW_DRAWN: dict[str, Any] = {"solver": "euler-maruyama", "guidance": 1.2, "guidance_interval": (0.0, 1.0)}
DEMOS = {  # by the family of models, or the data
    "flowar": DemoConfig(),
    "arflow": DemoConfig(
        model="arflow",
        run_dir="runs/demo_arflow",
        train=_demo_training(
            "arflow-demo",
            optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_epochs=2),
            epochs=26,  # of three images a sample
            batch_size=32,
            preview=PreviewConfig(every_steps=400, num_images=40, num_steps=16, **_ARFLOW_DRAWN),
        ),
        draw=DrawConfig(num_steps=40, **_ARFLOW_DRAWN),
    ),
    "fashion": DemoConfig(
        data="fashion",
        run_dir="runs/demo_fashion",
        num_samples=2000,
        train=_demo_training(
            "flowar-xxs",
            optim=OptimConfig(lr=2e-3, min_lr=5e-5, warmup_epochs=0.2),
            epochs=4,  # of 60,000 images
            preview=PreviewConfig(every_steps=600, num_images=40, num_steps=16, guidance=1.5),
        ),
        draw=DrawConfig(num_steps=20, guidance=1.5, guidance_interval=(0.0, 0.7)),
    ),
}
