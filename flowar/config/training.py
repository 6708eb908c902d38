"""Settings of a training run, and of what is done with one: plan, replay, export, average, convert."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from omegaconf import MISSING, DictConfig, OmegaConf

from flowar.base.errors import UserError
from flowar.base.run_folder import CONFIG_FILE
from flowar.config.data import DataConfig, VAEConfig
from flowar.config.drawing import DrawConfig
from flowar.config.load import free, load_described
from flowar.config.models import FlowARConfig, ModelConfig
from flowar.config.starting import InitConfig, shape_to_start_with

BASE_BATCH_SIZE = 256  # for which optim.base_lr is the learning rate, as in the released code
MAX_EMA_STD = 0.28  # 0.2887 = 1 / sqrt(12) is the plain mean of all steps


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are the authors' recipe."""

    base_lr: float = free(5e-5)  # learning rate for a batch of 256; it grows with batch_size, as in the authors' code
    lr: float | None = free(None)  # peak learning rate, after the warm-up; None: base_lr x batch_size / 256
    min_lr: float = free(1e-5)  # learning rate at the end of the cosine decay
    warmup_epochs: float = 100  # epochs of linear warm-up from 0
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates of the first and second moments
    weight_decay: float = 0.02  # applied to matrices and tables, not to biases and norm weights
    decay_flow: bool = True  # also decay the flow Transformer's weights; the released code does, by accident
    frozen: tuple[str, ...] = ()  # patterns of parameter names that are not trained, such as ["ar.*"]
    init_lr_factor: float = free(1.0)  # learning rate of parameters loaded by `init`, relative to fresh ones
    max_grad_norm: float | None = free(3.0)  # gradients with a larger norm are scaled down to it; None: off
    max_grad_value: float | None = free(None)  # then each value is clipped to this range; None: off

    def __post_init__(self) -> None:
        for name in ("base_lr", "lr", "min_lr", "init_lr_factor", "max_grad_norm", "max_grad_value"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"optim.{name}={value} must be above 0")

    def peak_lr(self, batch_size: int) -> float:
        """Return the learning rate after the warm-up, for a batch of all processes together."""
        return self.base_lr * batch_size / BASE_BATCH_SIZE if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(DrawConfig):
    """Sample grids while training, drawn with the averaged weights; off with every_steps=0."""

    prefix: ClassVar[str] = "preview."

    every_steps: int = 5000  # steps between two grids; 0: no grids
    num_images: int = 64  # images in a grid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images < 1:
            raise UserError(f"preview.num_images={self.num_images} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    mode: Literal["disabled", "online", "offline"] = "disabled"  # offline keeps files that `wandb sync` uploads later
    project: str = "flowar"  # where runs are listed
    entity: str | None = None  # user or team; None: yours
    name: str | None = None  # name of the run; None: the name of run_dir


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is trained by many processes; none of it changes what is computed."""

    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"  # auto: single, or ddp for several processes
    replicas: int = 1  # fsdp: groups of processes that share one copy of the weights each (HSDP)
    fsdp_reshard: bool = True  # fsdp: free a block's weights after its forward pass, gather them again for backward
    fsdp_bf16: bool = False  # fsdp, precision=bf16: gather the blocks' weights as bfloat16; reduce gradients in float32
    fsdp_sync_once: bool = False  # fsdp: keep whole gradients on each GPU, reduce them once per step
    fsdp_prefetch: int = 0  # fsdp: blocks whose weights are gathered ahead of time; 0: FSDP2's own prefetching
    zero_stage: int = 2  # deepspeed: 1, 2 or 3
    zero_offload: bool = False  # deepspeed: keep the optimizer state in CPU memory
    zero_files: bool = False  # deepspeed: also save its own files, for zero_to_fp32.py; training waits for them
    checkpoint_every_blocks: int = 0  # recompute every n-th block in the backward pass to save memory; 0: off
    compile: bool = False  # torch.compile, block by block
    timeout_s: float = 600  # the job ends if a rank stalls for this many seconds
    check_memory: bool = True  # refuse a run that does not fit into the GPU's memory, by the estimate of `flowar plan`

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"parallel.zero_stage={self.zero_stage} must be 1, 2 or 3")
        if self.fsdp_prefetch < 0:
            raise UserError(f"parallel.fsdp_prefetch={self.fsdp_prefetch} must be at least 0")
        if self.replicas < 1 or self.checkpoint_every_blocks < 0 or self.timeout_s <= 0:
            raise UserError(
                f"parallel.replicas={self.replicas} must be at least 1, parallel.checkpoint_every_blocks="
                f"{self.checkpoint_every_blocks} at least 0, parallel.timeout_s={self.timeout_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do about steps whose loss or gradient is not finite, or whose loss jumps: they are skipped and kept."""

    spike_factor: float = 0  # skip a step whose loss is this many times the usual one; 0: only if not finite
    skips_before_rollback: int = 3  # skips in a row before the run rolls back and skips those batches
    max_rollbacks: int = 1  # rollbacks before the run stops
    max_kept: int = 3  # skipped steps kept for `flowar replay`; each one contains the weights

    def __post_init__(self) -> None:
        if self.skips_before_rollback < 1 or self.max_rollbacks < 0 or self.spike_factor < 0:
            raise UserError(
                f"guard.skips_before_rollback={self.skips_before_rollback} must be at least 1, guard.max_rollbacks="
                f"{self.max_rollbacks} and guard.spike_factor={self.spike_factor} at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Moving averages of the weights; samples are drawn with the first one."""

    decays: tuple[float, ...] = (0.9999,)  # constant decays
    stds: tuple[float, ...] = ()  # relative stds of EDM2's power-function averages; [0.05,0.1] for `flowar ema`
    keep_every_steps: int = 0  # how often EDM2's averages are kept for `flowar ema`; 0: never

    def __post_init__(self) -> None:
        if not self.decays and not self.stds:
            raise UserError(
                "ema.decays and ema.stds are both empty; give at least one, for example ema.decays=[0.9999]"
            )
        if not all(0 <= decay < 1 for decay in self.decays):
            raise UserError(f"ema.decays={list(self.decays)} must lie in [0, 1)")
        if self.keep_every_steps and not self.stds:
            raise UserError(
                f"ema.keep_every_steps={self.keep_every_steps} keeps EDM2's averages: set ema.stds=[0.05,0.1]"
            )
        if not all(0 < std < MAX_EMA_STD for std in self.stds):
            raise UserError(f"ema.stds={list(self.stds)} must lie in (0, {MAX_EMA_STD})")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How a model is trained; the defaults are the authors' recipe for ImageNet at 256 px."""

    model: ModelConfig = field(default_factory=FlowARConfig)  # model.variant=flowar-l, or single settings
    # weights to start from; init=MODEL is short for init.model=MODEL. It sets the shape unless model.variant is given
    init: InitConfig = field(default_factory=InitConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)  # the VAE that made the shards
    optim: OptimConfig = field(default_factory=OptimConfig)  # AdamW and its schedule
    epochs: float = free(400)  # passes over the dataset; more continue a finished run, on the longer schedule
    batch_size: int = 2048  # samples per step, over all processes
    # samples that one process computes at once; their gradients are accumulated. None: its whole share of the batch
    micro_batch_size: int | None = free(None)
    label_dropout: float = 0.1  # share of labels replaced by "no class", for classifier-free guidance
    ema: EMAConfig = field(default_factory=EMAConfig)  # moving averages of the weights
    # authors: tf32; bf16 keeps weights, norms and loss in float32
    precision: Literal["fp32", "tf32", "bf16"] = free("tf32")
    attention: Literal["sdpa", "flash"] = free("sdpa")  # flash: the flash-attn package, on CUDA, with precision=bf16
    seed: int = 0  # for fresh weights, noise, times, dropped labels and order
    log_every_steps: int = free(50)  # steps between two lines of metrics.jsonl
    save_every_steps: int = free(1000)  # steps between two checkpoints
    keep_checkpoints: int = free(2)  # how many of the newest checkpoints are kept
    keep_every_steps: int = free(0)  # also keep checkpoints at multiples of this forever; 0: none
    parallel: ParallelConfig = free(factory=ParallelConfig)  # how processes share the work
    guard: GuardConfig = free(factory=GuardConfig)  # what happens when the loss is not finite or jumps
    preview: PreviewConfig = free(factory=PreviewConfig)  # sample grids during training
    wandb: WandbConfig = free(factory=WandbConfig)  # Weights & Biases
    tensorboard: bool = free(False)  # event files in RUN_DIR/tensorboard
    profile_steps: tuple[int, int] | None = free(None)  # first and last step that rank 0 traces into RUN_DIR/profile
    # peak TFLOP/s of one device, for the MFU; None: known for GPUs, measured on a CPU
    peak_tflops: float | None = free(None)
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every_steps", "save_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be above 0")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"label_dropout={self.label_dropout} must lie in [0, 1)")
        if self.attention == "flash" and self.precision != "bf16":
            raise UserError(f"attention=flash needs precision=bf16, got precision={self.precision}")
        if self.parallel.fsdp_bf16 and self.precision != "bf16":
            raise UserError(f"parallel.fsdp_bf16=true needs precision=bf16, got precision={self.precision}")

    @classmethod
    def start_parts(cls, given: DictConfig) -> dict[str, ModelConfig]:
        """Return what sections start from: `model` from the shape of the model that `init` names, fitted to the data.

        A run that has begun starts from its own, as the init may be gone. A given variant or family of the model wins.

        Raises:
            UserError: if there is no such model, or how it fits the data can't be told.
        """
        init, run_dir, data_path = (OmegaConf.select(given, key) for key in ("init.model", "run_dir", "data.path"))
        model = OmegaConf.to_container(given.model, resolve=True) if isinstance(given.get("model"), DictConfig) else {}
        assert isinstance(model, dict)
        if init is None or model.keys() & {"variant", "family"}:
            return {}
        recorded = Path(str(run_dir)) / CONFIG_FILE
        if run_dir is not None and recorded.is_file():
            before = load_described(TrainConfig, recorded)
            if before.init.model == init:
                return {"model": before.model}
        return {"model": shape_to_start_with(str(init), {str(k): v for k, v in model.items()}, data_path)}

    def count_steps(self, num_images: int) -> int:
        """Return the number of steps of a run on `num_images` images."""
        return math.ceil(self.epochs * (num_images / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RecipeConfig):
    """One training run."""

    run_dir: str = free(MISSING)  # everything the run writes; running again with the same one resumes
    data: DataConfig = field(default_factory=DataConfig)  # what is trained on


@dataclass(frozen=True, kw_only=True)
class PlannedDataConfig:
    """A dataset that may not be there yet."""

    path: str | None = None  # a prepared dataset, which tells num_images; None: num_images says
    cache: str | None = None  # folder for the shards of a remote path
    num_workers: int = 2  # processes that read ahead


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RecipeConfig):
    """A training run's settings, and machines to imagine it on."""

    run_dir: str | None = None  # so that the YAML of a run can be given as it stands
    data: PlannedDataConfig = field(default_factory=PlannedDataConfig)  # what would be trained on
    nodes: int = 1  # of the cluster
    gpus_per_node: int = 8  # of each node
    gpu: str = "H100"  # a name in the table of flowar/planning/machines.py; what follows wins over it
    memory_gib: float | None = None  # of one GPU
    memory_gb_per_s: float | None = None  # of its memory
    rail_gb_per_s: float = 45  # of one GPU's network card; 400 Gbit/s are 50 at most
    num_images: int | None = None  # of the dataset; None: as data.path says if it is there, else ImageNet's
    search: bool = False  # try engines, micro batches, recomputation, compilation; a minute or two
    node_mtbf_days: float = 250  # a node's mean time between failures; Llama 3's 16,384 H100: 419 in 54 days
    preemptions_per_day: float = 0  # of the whole job
    restart_s: float = 300  # from a failure to the next step
    save_gb_per_s: float = 5  # of the file system, all processes together

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "gpus_per_node", "num_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("memory_gib", "memory_gb_per_s", "peak_tflops", "rail_gb_per_s", "node_mtbf_days",
                     "save_gb_per_s"):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.preemptions_per_day < 0 or self.restart_s < 0:
            raise UserError(
                f"preemptions_per_day={self.preemptions_per_day} and restart_s={self.restart_s} must be at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """One skipped step again, on one process."""

    bundle: str = MISSING  # a folder of RUN_DIR/anomalies
    micro_batch_size: int | None = None  # samples at once; None: as in training
    device: str = "auto"  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Weights of a training run -> model.safetensors and config.json."""

    model: str = MISSING  # run_dir (its newest checkpoint) or one checkpoint
    out_dir: str = MISSING  # the model folder to write
    weights: str = "ema"  # ema (the first average), raw, or an average such as decay_0.9999


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """A power-function average of any length, put together from those that a run kept (EDM2)."""

    run_dir: str = MISSING  # of a run with ema.stds and ema.keep_every_steps
    out_dir: str = MISSING  # the model folder to write
    std: float = MISSING  # relative std of the averaging profile, for example 0.08
    step: int | None = None  # at which it ends; None: the last one that was kept

    def __post_init__(self) -> None:
        if not 0 < self.std < MAX_EMA_STD:
            raise UserError(f"std={self.std} must lie in (0, {MAX_EMA_STD})")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The authors' checkpoint -> model.safetensors and config.json."""

    checkpoint: str = MISSING  # FlowAR-S.pth, FlowAR-L.pth, FlowAR-H.pth, an ARFlow, or what their trainers save
    out_dir: str = MISSING  # the model folder to write
    ar_heads: int | None = None  # of FlowAR's AR Transformer; None: read from the checkpoint
