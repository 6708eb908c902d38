"""Every setting of every command as a typed, frozen dataclass, and how they are loaded and saved.

No torch here, and no default value lives anywhere else. Read next: cli.py, then the module of the verb you use.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from flowar.errors import UserError

Schema = TypeVar("Schema")


MAX_EMA_STD = 0.28  # 0.2887 = 1 / sqrt(12) is the plain mean of all steps
CUSTOM_VARIANT = "custom"  # a model that is no row of MODEL_VARIANTS


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one FlowAR. The defaults are FlowAR-L as released; MODEL_VARIANTS holds the others."""

    variant: str = "flowar-l"  # the row of MODEL_VARIANTS that the other settings start from, or "custom"
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)  # side lengths of the token maps, coarse to fine
    latent_channels: int = 16
    patch_size: int = 1  # 1 for VAEs of stride 16, 2 for stride 8
    num_classes: int = 1000
    ar_depth: int = 16
    ar_width: int = 1024
    ar_heads: int = 16
    flow_depth: int = 12
    flow_width: int = 1024
    flow_heads: int = 16  # released: heads of 64 channels
    flow_block: Literal["attn_mlp", "attn_cross_mlp"] = "attn_cross_mlp"  # the paper: attn_mlp
    dropout: float = 0.1  # in the AR Transformer while training; none in the flow Transformer
    zero_init: bool = False  # zero the last linear, as the authors meant to

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON and YAML give a list
        if not self.scales or any(b <= a for a, b in zip(self.scales, self.scales[1:], strict=False)):
            raise UserError(f"model.scales={list(self.scales)} must grow from coarse to fine, for example [1,2,4,8,16]")
        for name in ("latent_channels", "patch_size", "num_classes", "ar_width", "flow_depth", "flow_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.ar_depth < 2 or self.ar_depth % 2:
            raise UserError(f"model.ar_depth={self.ar_depth} must be even: half the blocks come before the middle norm")
        for width, heads in (("ar_width", "ar_heads"), ("flow_width", "flow_heads")):
            if getattr(self, heads) < 1 or getattr(self, width) % (4 * getattr(self, heads)):
                raise UserError(
                    f"model.{width}={getattr(self, width)} must be a multiple of 4 x model.{heads}="
                    f"{getattr(self, heads)}: a head's channels turn in pairs, half with the row, half with the column"
                )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must lie in [0, 1)")

    @property
    def token_width(self) -> int:
        """Channels of one token: C p p."""
        return self.latent_channels * self.patch_size**2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def latent_size(self) -> int:
        """Side of the latents, in latent pixels."""
        return self.scales[-1] * self.patch_size


def _variant(
    name: str, ar: tuple[int, int, int], flow: tuple[int, int, int], block: str, **others: object
) -> ModelConfig:
    return ModelConfig(
        variant=name, ar_depth=ar[0], ar_width=ar[1], ar_heads=ar[2],
        flow_depth=flow[0], flow_width=flow[1], flow_heads=flow[2], flow_block=block, **others,
    )  # fmt: skip


# The released models; a comment is what the paper reports for ImageNet at 256 px (parameters, FID, IS).
MODEL_VARIANTS = {
    config.variant: config
    for config in (
        #                          AR: depth, width, heads   flow: depth, width, heads
        _variant("flowar-s",       (12,  768, 12),           ( 2, 1024, 16), "attn_mlp"),        # 170 M, 3.61, 234.1
        _variant("flowar-b",       (16,  768, 12),           ( 6, 1024, 16), "attn_mlp"),        # 300 M, 2.90, 272.5
        _variant("flowar-l",       (16, 1024, 16),           (12, 1024, 16), "attn_cross_mlp"),  # 589 M, 1.90, 281.4
        _variant("flowar-h",       (30, 1536, 16),           (12, 1536, 24), "attn_cross_mlp"),  # 1.9 B, 1.65, 296.5
        _variant("flowar-h-paper", (30, 1536, 16),           (18, 1536, 24), "attn_mlp"),        # as in its table 8
        _variant("flowar-demo",    ( 4,  128,  4),           ( 2,  128,  4), "attn_mlp",         # digits on a laptop
                 scales=(1, 2, 4), latent_channels=1, patch_size=2, num_classes=10, dropout=0.0, zero_init=True),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Which tokenizer, and where its weights are."""

    # mar, sd-vae-ft-ema, sd-vae-ft-mse, dc-ae-f32c32, demo, or diffusers' AutoencoderKL or -DC: a folder or a hub id
    name: str = "mar"
    weights: str | None = None  # mar: the file kl16.ckpt


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Which network gives the features that images are measured by, and where its weights are."""

    name: str = "inception-v3-compat"  # any of torch-fidelity's, or demo-classifier
    weights: str | None = None  # None: in torch hub's folder (below TORCH_HOME), or fetched
    other_weights: bool = False  # accept others than the published ones; the numbers then compare with nothing else


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Images -> moments in MDS shards."""

    images: str = MISSING  # folder with a sub-folder per class, folder or pattern of *.tar or *.parquet
    out_dir: str = MISSING  # the dataset to write
    vae: VAEConfig = field(default_factory=VAEConfig)
    image_size: int = 256  # side of the views, pixels
    crop: Literal["center", "random", "ten_crop"] = "center"  # FlowAR: random; MAR: center
    flip: bool = True  # center: store the mirror image too; random: mirror every other view; ten_crop: always
    views: int = 10  # stored of each image with crop=random; an epoch uses one of them
    resize: int | None = None  # short side before the crop; None: random 9/8 and ten_crop 1.1 of image_size
    seed: int = 0  # of random crops
    image_column: str = "image"  # parquet only
    label_column: str = "label"
    skip_unreadable: bool = False  # leave damaged images out, with a list, instead of stopping
    moments_dtype: Literal["float16", "float32"] = "float16"  # the rounding error is measured and recorded
    batch_size: int = 32  # views encoded at once
    chunk_images: int = 1024  # the piece of work that one worker claims
    shard_size_mib: int = 256
    precision: Literal["fp32", "tf32"] = "fp32"  # of the VAE on a GPU
    num_workers: int = 2  # processes that decode images; 0 decodes in the main one
    lease_s: float = 60  # a worker that gives no sign of life for so long is taken for dead
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("image_size", "views", "batch_size", "chunk_images", "shard_size_mib"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lease_s <= 0 or self.num_workers < 0 or self.seed < 0:
            raise UserError(
                f"lease_s={self.lease_s} must be above 0, num_workers={self.num_workers} and seed={self.seed} not below"
            )
        if self.crop == "center" and self.resize is not None:
            raise UserError(
                f"resize={self.resize} is for crop=random and crop=ten_crop; crop=center resizes to image_size"
            )
        if self.resize is not None and self.resize < self.image_size:
            raise UserError(f"resize={self.resize} is below image_size={self.image_size}; a crop can't be larger")
        if self.crop == "ten_crop" and not self.flip:
            raise UserError(
                "crop=ten_crop holds mirror images by definition; leave flip=true, or use crop=center flip=false"
            )


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Whether a dataset is what its passport says."""

    path: str = MISSING  # folder that `flowar prepare` wrote, or a remote one
    cache: str | None = None  # as data.cache
    images: str | None = None  # the source, to encode a sample of it again; None: where the passport says it was
    image_column: str = "image"  # of a parquet source
    label_column: str = "label"
    vae: VAEConfig | None = None  # None: the one that the passport names
    num_images: int = 64  # images encoded again and shown; 0 only checks the files
    picture: str | None = None  # contact sheet; None: PATH.check.png
    seed: int = 0  # which images
    max_error: float = 0.05  # accepted between stored and new means, in std of the latents
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards, and how they are read."""

    path: str = (
        MISSING  # folder that `flowar prepare` wrote, or its copy at s3://, gs://, oci://, ... (mosaicml-streaming)
    )
    cache: str | None = None  # folder for the shards of a remote path; None: flowar-USER below TMPDIR
    num_workers: int = 2  # processes that read ahead; 0 reads in the main one


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are the authors' recipe."""

    lr: float = 4e-4  # authors: 5e-5 x batch_size / 256
    min_lr: float = 1e-5  # where the cosine ends
    warmup_epochs: float = 100  # linear from 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02  # on matrices and tables; none on biases and norm weights
    decay_flow: bool = True  # on the flow Transformer too; the authors meant not to, but do: a name didn't match
    max_grad_norm: float = 3.0

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Sample grids while training, drawn with the averaged weights; off with every_steps=0."""

    every_steps: int = 5000
    num_images: int = 64
    num_steps: int = 25  # of the released time grid
    guidance: float = 2.4
    guidance_interval: tuple[float, float] = (0.0, 0.9)

    def __post_init__(self) -> None:
        check_sampling(self, prefix="preview.")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    mode: Literal["disabled", "online", "offline"] = "disabled"
    project: str = "flowar"
    entity: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is trained by many processes; none of it changes what is computed."""

    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"  # auto: single, or ddp for several processes
    replicas: int = 1  # fsdp: groups of processes that share one copy of the weights each (HSDP)
    zero_stage: int = 2  # deepspeed: 1, 2 or 3
    zero_offload: bool = False  # deepspeed: the optimizer lives in the memory of the CPU
    zero_files: bool = True  # deepspeed: save its own files too, for zero_to_fp32.py; training waits for these
    checkpoint_every_blocks: int = 0  # recompute every n-th block in the backward pass instead of keeping it; 0: none
    compile: bool = False  # torch.compile, block by block
    timeout_s: float = 60  # a rank that keeps the others waiting for so long ends the job

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"parallel.zero_stage={self.zero_stage} must be 1, 2 or 3")
        if self.replicas < 1 or self.checkpoint_every_blocks < 0 or self.timeout_s <= 0:
            raise UserError(
                f"parallel.replicas={self.replicas} must be at least 1, parallel.checkpoint_every_blocks="
                f"{self.checkpoint_every_blocks} at least 0, parallel.timeout_s={self.timeout_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do about steps whose loss or gradient is not finite, or whose loss jumps: they are skipped and kept."""

    spike_factor: float = 0  # skip a loss of more than so many times the usual one; 0: only what isn't finite
    skips_before_rollback: int = 3  # so many in a row: back to the newest checkpoint, and past these batches
    max_rollbacks: int = 1  # then the run stops
    max_kept: int = 3  # skipped steps that are kept for `flowar replay`; each holds the weights

    def __post_init__(self) -> None:
        if self.skips_before_rollback < 1 or self.max_rollbacks < 0 or self.spike_factor < 0:
            raise UserError(
                f"guard.skips_before_rollback={self.skips_before_rollback} must be at least 1, guard.max_rollbacks="
                f"{self.max_rollbacks} and guard.spike_factor={self.spike_factor} at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages of the weights; samples are drawn with the first one."""

    decays: tuple[float, ...] = (0.9999,)  # constant decays
    stds: tuple[float, ...] = ()  # EDM2's power functions, by relative std; [0.05,0.1] for `flowar ema`
    keep_every_steps: int = 0  # keep EDM2's averages of these steps, for `flowar ema`; 0: none

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
class TrainConfig:
    """One training run; the defaults are the authors' recipe for ImageNet at 256 px."""

    run_dir: str = MISSING  # everything the run writes; running again with the same one resumes
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)  # must be the one that made the shards
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: float = 400
    batch_size: int = 2048  # global
    micro_batch_size: int | None = None  # samples of one process at once, whose gradients add up; None: all of them
    label_dropout: float = 0.1  # share of labels replaced by "no class", for guidance
    ema: EMAConfig = field(default_factory=EMAConfig)
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"  # authors: tf32; bf16 keeps weights, norms and loss in float32
    attention: Literal["sdpa", "flash"] = "sdpa"  # flash: the flash-attn package, on CUDA, with precision=bf16
    seed: int = 0
    log_every_steps: int = 50
    save_every_steps: int = 1000
    keep_checkpoints: int = 2  # the newest ones
    keep_every_steps: int = 0  # and, for good, those at multiples of this; 0: none
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # event files in RUN_DIR/tensorboard
    profile_steps: tuple[int, int] | None = None  # first and last step of a trace of rank 0, RUN_DIR/profile
    peak_tflops: float | None = None  # of one process's device, for the MFU; None: known GPUs, or measured on a CPU
    device: str = "auto"

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


# Settings that may differ when a run resumes: those that change neither the weights nor the order of the data (that
# data.path still holds the same shards is checked by their passport), and those that help a run that became unstable.
FREE_ON_RESUME = (
    "run_dir", "data.path", "data.cache", "data.num_workers", "log_every_steps", "save_every_steps", "keep_checkpoints",
    "preview", "wandb", "tensorboard", "profile_steps", "peak_tflops", "device", "vae.weights", "micro_batch_size",
    "precision", "attention",
    "optim.lr", "optim.min_lr", "optim.max_grad_norm", "parallel", "guard", "keep_every_steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A training run's settings, and machines to imagine it on."""

    run_dir: str = "not used"
    data: DataConfig = field(default_factory=lambda: DataConfig(path="not used"))
    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "H100"  # a name of flowar/speed.py's table
    memory_gib: float = 80  # of one GPU
    num_images: int = 1_281_167  # of the dataset; ImageNet's
    assumed_mfu: float = 0.4  # share of the peak rate that training reaches
    assumed_gb_per_s: float = 40  # that one GPU sends to other nodes (400 Gbit/s give 50 at most)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "gpus_per_node", "num_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.memory_gib, self.assumed_mfu, self.assumed_gb_per_s) <= 0:
            raise UserError("memory_gib, assumed_mfu and assumed_gb_per_s must be above 0")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """One skipped step again, on one process."""

    bundle: str = MISSING  # a folder of RUN_DIR/anomalies
    micro_batch_size: int | None = None  # samples at once; None: as in training
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Weights of a training run -> model.safetensors and config.json."""

    model: str = MISSING  # run_dir (its newest checkpoint) or one checkpoint
    out_dir: str = MISSING
    weights: str = "ema"  # ema (the first average), raw, or an average such as decay_0.9999


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """A power-function average of any length, put together from those that a run kept (EDM2)."""

    run_dir: str = MISSING  # of a run with ema.stds and ema.keep_every_steps
    out_dir: str = MISSING
    std: float = MISSING  # relative std of the averaging profile, for example 0.08
    step: int | None = None  # at which it ends; None: the last one that was kept

    def __post_init__(self) -> None:
        if not 0 < self.std < MAX_EMA_STD:
            raise UserError(f"std={self.std} must lie in (0, {MAX_EMA_STD})")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Images from a model."""

    model: str = MISSING  # exported model folder, hub id, or the run_dir of a training run (its newest checkpoint)
    out_dir: str = MISSING  # the images; running again with the same settings draws only what is missing
    weights: str = "ema"  # which weights of a run_dir: ema (its first average), raw, or an average such as decay_0.9999
    vae: VAEConfig = field(default_factory=VAEConfig)
    preview: bool = False  # only pictures of what would be drawn, in OUT_DIR/preview; also written --preview
    num_images: int = 64  # classes in turn: image i shows class i modulo num_classes
    classes: tuple[int, ...] | None = None  # only these, in turn
    label_file: str | None = None  # or image i shows the class in line i of this file, which starts anew at its end
    unconditional: bool = False  # or of no class
    also: tuple[Literal["npz", "tar", "mds"], ...] = ()  # more forms beside the PNG files: ADM's, WebDataset's, MDS
    features_only: bool = False  # keep no image, but what `flowar evaluate` needs of it
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # of features_only
    batch_size: int = 64
    decode_batch_size: int | None = None  # images that the VAE decodes at once; None: batch_size
    chunk_batches: int = 2  # that one worker claims at once
    lease_s: float = 60  # a worker that gives no sign of life for so long is taken for dead
    num_steps: int = 25
    last_scale_steps: int | None = None  # of the finest scale, linear from num_steps at the coarsest (DiSA); None: same
    time_grid: Literal["released", "uniform", "shifted"] = "released"
    shift: float = 1.0  # of time_grid=shifted: above 1 more steps near the noise
    solver: Literal["euler", "heun", "midpoint", "adams-bashforth", "euler-maruyama"] = "euler"  # released: euler
    guidance: float = 2.4  # paper: S 4.3, L 2.4, H 2.4
    guidance_schedule: Literal["linear", "constant"] = "linear"  # over scales; released: from 1 to guidance
    guidance_interval: tuple[float, float] = (0.0, 0.9)  # paper: S and L 0.9, H 0.7 (with 50 steps)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # on a GPU; changes the last bits of an image, bf16 more
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_sampling(self)
        chosen = [name for name in ("classes", "label_file", "unconditional") if getattr(self, name)]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are both given; give one of them")
        if self.features_only and self.also:
            raise UserError(f"also={list(self.also)} packs images, but features_only=true keeps none; give one of them")
        if self.unconditional and self.guidance > 1:
            raise UserError(f"guidance={self.guidance} needs classes; set guidance=1 with unconditional=true")
        if self.decode_batch_size is not None and self.decode_batch_size < 1:
            raise UserError(f"decode_batch_size={self.decode_batch_size} must be at least 1")
        if self.batch_size < 1 or self.chunk_batches < 1 or self.lease_s <= 0:
            raise UserError(
                f"batch_size={self.batch_size} and chunk_batches={self.chunk_batches} must be at least 1, "
                f"lease_s={self.lease_s} above 0"
            )
        least = 2 if self.time_grid == "released" else 1
        if self.last_scale_steps is not None and self.last_scale_steps < least:
            raise UserError(f"last_scale_steps={self.last_scale_steps} must be at least {least}")
        if self.shift <= 0:
            raise UserError(f"shift={self.shift} must be above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """FID and its kin of generated images, against real ones."""

    sample: SampleConfig | None = None  # draw the samples first, into the folder `samples`, for this extractor
    samples: str = MISSING  # what `flowar sample` wrote, any folder of images (searched deeply), .npz, *.tar, MDS
    # The same, or an .npz with mu and sigma (ADM's VIRTUAL_*.npz, with its 10,000 images), or what make-reference wrote
    reference: str = MISSING
    out_dir: str | None = None  # features, metrics.json, report.html; None: SAMPLES/evaluation, or beside a file
    protocol: Literal["adm", "torch-fidelity"] = "adm"  # adm: what papers report
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    # More networks: FD-DINOv2, and torch-fidelity's own for precision and recall; None: those whose weights are here
    more: tuple[Literal["dinov2", "vgg16"], ...] | None = None
    against: str | None = None  # other samples drawn with the same seed: the difference, with a paired interval
    interval_groups: int = 50  # groups of samples that are left out in turn, for 95% intervals; 0: no intervals
    run_dir: str | None = None  # training run that gets the numbers (evaluations.jsonl, wandb); None: the samples' own
    step: int | None = None  # of that run; None: that of the samples' checkpoint
    batch_size: int = 64
    chunk_images: int = 500  # the piece of work that one process claims
    lease_s: float = 60  # a process that gives no sign of life for so long is taken for dead
    device: str = "auto"

    def __post_init__(self) -> None:
        check_extraction(self)
        check_groups(self.interval_groups)


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """How `flowar submit evaluate --follow RUN_DIR` measures each checkpoint of a training run."""

    evaluate: EvaluateConfig = field(
        default_factory=lambda: EvaluateConfig(
            samples="set for each checkpoint",
            reference="required",
            sample=SampleConfig(model="set for each checkpoint", out_dir="set for each", features_only=True),
        )
    )
    num_images: int = 10_000
    every_steps: int = 0  # checkpoints at multiples of this; 0: all that are seen
    milestone_every_steps: int = 0  # those at multiples of this are measured with more images; 0: none
    milestone_images: int = 50_000
    poll_s: float = 60  # between two looks at the run

    def __post_init__(self) -> None:
        if self.evaluate.sample is None:
            raise UserError("evaluate.sample=null: following draws samples; give its settings")
        if self.evaluate.reference == "required":
            raise UserError("evaluate.reference is required; give it in the YAML or as evaluate.reference=...")
        if min(self.num_images, self.milestone_images) < 10 or self.poll_s <= 0:
            raise UserError(
                f"num_images={self.num_images} and milestone_images={self.milestone_images} must be at least 10, "
                f"poll_s={self.poll_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Ways to sample, all combinations; by successive halving."""

    model: str = MISSING  # as of sample
    reference: str = MISSING  # as of evaluate
    out_dir: str = MISSING
    # What is not swept: vae, classes, seed, solver, time grid, batch sizes, start of the guidance interval
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(model="set by the sweep", out_dir="set by it"))
    guidance: tuple[float, ...] = (1.5, 2.0, 2.4, 3.0, 4.0)
    interval_ends: tuple[float, ...] = (0.7, 0.9, 1.0)  # upper ends of the guidance interval
    num_steps: tuple[int, ...] = (25,)
    last_step_shares: tuple[float, ...] = (1.0,)  # steps of the finest scale over num_steps (DiSA anneals: below 1)
    weights: tuple[str, ...] = ("ema",)  # of a run_dir
    ema_stds: tuple[float, ...] = ()  # and averages of these lengths, as `flowar ema` makes them
    num_images: tuple[int, ...] = (5_000, 10_000, 50_000)  # in each round
    keep: float = 0.25  # share of the settings that go on to the next round
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    interval_groups: int = 20  # as of evaluate
    batch_size: int = 64  # of the reference's images
    chunk_images: int = 500
    lease_s: float = 60
    device: str = "auto"

    def __post_init__(self) -> None:
        check_extraction(self)
        check_groups(self.interval_groups)
        if not 0 < self.keep < 1:
            raise UserError(f"keep={self.keep} must lie in (0, 1)")
        if self.sample.last_scale_steps is not None:
            raise UserError("sample.last_scale_steps is swept; give last_step_shares instead")
        for name in ("guidance", "interval_ends", "num_steps", "last_step_shares", "num_images"):
            if not getattr(self, name):
                raise UserError(f"{name}=[] is empty; give at least one value")
        if not self.weights and not self.ema_stds:
            raise UserError("weights=[] and ema_stds=[] are both empty; give at least one of them")
        if list(self.num_images) != sorted(set(self.num_images)) or self.num_images[0] < 2:
            raise UserError(f"num_images={list(self.num_images)} must grow from round to round")
        if not all(0 < share <= 1 for share in self.last_step_shares):
            raise UserError(f"last_step_shares={list(self.last_step_shares)} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Real images -> statistics and features that samples are compared with."""

    images: str = MISSING  # folder of images (searched deeply), .npz with arr_0 (and mu, sigma), *.tar, MDS
    out_dir: str = MISSING
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    keep_images: int = 10_000  # whose features are kept for precision, recall, KID, neighbours and classes; 0: all
    batch_size: int = 64
    chunk_images: int = 500
    lease_s: float = 60
    device: str = "auto"

    def __post_init__(self) -> None:
        check_extraction(self)
        if self.keep_images < 0:
            raise UserError(f"keep_images={self.keep_images} must be at least 0")


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
    mem_gb: float | None = None  # of a node; 0: all of it
    time_min: int = 60
    exclusive: bool = False
    array: int = 1  # jobs of this shape that share the work: prepare, sample, evaluate, make-reference, sweep
    stop_before_end_s: int = 180  # save and stop so long before the time is over; the job goes on in a new one
    max_restarts: int = 5  # after a task or a node died; stops on purpose, as for preemption, don't count
    sbatch: dict[str, str] = field(default_factory=dict)  # any other options of sbatch, by their long names
    srun: tuple[str, ...] = ()  # more arguments of srun, for example --container-image=...
    setup: tuple[str, ...] = ()  # lines of the batch script before the tasks start, for example module load cuda
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # that runs the tasks; None: the one that submits

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
    """A chain of jobs: each starts when the one before has finished. A step that is left out is not run."""

    run_dir: str = MISSING  # of the chain itself: which jobs there are, what they print
    prepare: PrepareConfig | None = None
    train: TrainConfig | None = None
    sample: SampleConfig | None = None
    evaluate: EvaluateConfig | None = None
    # By step, what differs from --cluster FILE; for example {sample: {array: 16, nodes: 1}}
    cluster: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is looked at on every node of an allocation."""

    run_dir: str = "runs/doctor"  # on the file system that is measured; where the report goes
    data: str | None = None  # folder of a dataset: some of its shards are read and compared with their hashes
    num_shards: int = 4  # read by each process
    write_mib: int = 256  # written by each process
    message_mib: int = 64  # of the all-reduce between two nodes
    min_share: float = 0.5  # of the median speed; what is slower is an outlier
    min_shm_gib: float = 1.0  # free in /dev/shm, for readers
    min_open_files: int = 4096
    timeout_s: float = 60
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """The authors' checkpoint -> model.safetensors and config.json."""

    checkpoint: str = MISSING  # FlowAR-S.pth, FlowAR-L.pth, FlowAR-H.pth, or a checkpoint of the authors' trainer
    out_dir: str = MISSING
    ar_heads: int | None = None  # of the AR Transformer; None: read from the checkpoint


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What a model costs: parameters, tokens, FLOPs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    num_steps: int = 25
    time_grid: Literal["released", "uniform"] = "released"
    guidance: float = 2.4
    guidance_interval: tuple[float, float] = (0.0, 0.9)

    def __post_init__(self) -> None:
        check_sampling(self)


def _demo_training() -> TrainConfig:
    """Return the demo's training: digits, 32 px, small enough for two CPU cores and a few minutes."""
    return TrainConfig(
        run_dir="set by the demo",
        data=DataConfig(path="set by the demo", num_workers=0),
        model=MODEL_VARIANTS["flowar-demo"],
        vae=VAEConfig(name="demo"),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_epochs=5),
        epochs=56,
        batch_size=64,
        ema=EMAConfig(decays=(0.995,)),
        precision="fp32",
        log_every_steps=20,
        save_every_steps=200,
        preview=PreviewConfig(every_steps=400, num_images=40, num_steps=16, guidance=1.1),
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Handwritten digits from scratch to a report, in minutes."""

    run_dir: str = "runs/demo"
    train: TrainConfig = field(default_factory=_demo_training)
    num_samples: int = 1440  # as many as training images, so that both Frechet distances have the same bias
    num_steps: int = 40
    guidance: float = 1.1
    guidance_interval: tuple[float, float] = (0.0, 0.7)

    def __post_init__(self) -> None:
        check_sampling(self)


def check_extraction(config: object) -> None:
    """Raise a UserError if settings for computing features make no sense."""
    if config.batch_size < 1 or config.chunk_images < 1 or config.lease_s <= 0:
        raise UserError(
            f"batch_size={config.batch_size} and chunk_images={config.chunk_images} must be at least 1, "
            f"lease_s={config.lease_s} above 0"
        )


def check_groups(number: int) -> None:
    """Raise a UserError if so many groups give no interval."""
    if number < 0 or 0 < number < 10:
        raise UserError(f"interval_groups={number} must be 0, or at least 10 for a spread")


def check_sampling(config: object, prefix: str = "") -> None:
    """Raise a UserError if the sampling settings of `config` make no sense: steps, guidance, interval, images."""
    for name in ("num_images", "num_samples"):
        if getattr(config, name, 1) < 1:
            raise UserError(f"{prefix}{name}={getattr(config, name)} must be at least 1")
    least = 2 if getattr(config, "time_grid", "released") == "released" else 1
    if config.num_steps < least:
        raise UserError(f"{prefix}num_steps={config.num_steps} must be at least {least}")
    if config.guidance < 1:
        raise UserError(f"{prefix}guidance={config.guidance} is below 1, which is no guidance; use 1 or more")
    low, high = config.guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"{prefix}guidance_interval=[{low}, {high}] must be [low, high] with 0 <= low <= high <= 1")


def variant_config(name: str) -> ModelConfig:
    """Return a row of MODEL_VARIANTS.

    Raises:
        UserError: if there is no such row; names the nearest one.
    """
    if name not in MODEL_VARIANTS:
        raise UserError(f"no model is called {name!r}{did_you_mean(name, MODEL_VARIANTS)}")
    return MODEL_VARIANTS[name]


def load_config(schema: type[Schema], path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Schema:
    """Return `schema` filled from its defaults, then the YAML at `path`, then `key=value` overrides.

    `model.variant=flowar-s` (in the YAML or as an override) first sets the whole model to that row of MODEL_VARIANTS.

    Raises:
        UserError: if the file can't be read, a key is unknown (names the nearest), a value has the wrong type, or a
            required one is missing.
    """
    given = OmegaConf.merge(_load_yaml(path) if path else {}, _parse_overrides(overrides))
    defaults = OmegaConf.structured(schema)
    try:
        for section in ("model", "train.model"):
            variant = OmegaConf.select(given, f"{section}.variant")
            has_model = OmegaConf.select(defaults, section) is not None or schema is PipelineConfig
            if variant not in (None, CUSTOM_VARIANT) and has_model:
                layer = dataclasses.asdict(variant_config(str(variant)))
                for part in reversed(section.split(".")):
                    layer = {part: layer}
                defaults = OmegaConf.merge(defaults, layer)
        return OmegaConf.to_object(OmegaConf.merge(defaults, given))
    except ConfigKeyError as error:
        raise UserError(f"{error.full_key} is not a setting{did_you_mean(error.full_key, _keys(defaults))}") from error
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is required; give it in the YAML or as {key}=...") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        expected = f" (setting {error.full_key})" if error.full_key else ""
        raise UserError(f"{str(error.msg or error).splitlines()[0]}{expected}") from error


def describe_config(config: object) -> str:
    """Return the resolved config as YAML text, which `load_config` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_changes(before: object, after: object, without: tuple[str, ...] = ()) -> str:
    """Return as YAML text what of `after` differs from `before`, both of one schema; some top-level keys left out."""
    changed = OmegaConf.create({})
    for key, (_, value) in changed_settings(before, after).items():
        if key.split(".")[0] not in without:
            OmegaConf.update(changed, key, value)
    return OmegaConf.to_yaml(changed) if changed else ""


def changed_settings(before: object, after: object) -> dict[str, tuple[object, object]]:
    """Return {key: (before, after)} of the settings that differ between two configs of one schema."""
    old, new = (OmegaConf.structured(config) for config in (before, after))
    values = {key: (OmegaConf.select(old, key), OmegaConf.select(new, key)) for key in _keys(old)}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1] and not _is_section(pair[0])}


def _is_section(value: object) -> bool:
    return isinstance(value, DictConfig)


def _load_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} is not a YAML config: {' '.join(str(error).split())}") from error
    if isinstance(loaded, ListConfig):
        raise UserError(f"{path} holds a list, but a config is `key: value` lines")
    return loaded


def _parse_overrides(overrides: tuple[str, ...]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is neither a file nor a setting; settings are written key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except YAMLError as error:
        raise UserError(f"can't read the overrides {list(overrides)}: {' '.join(str(error).split())}") from error


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _keys(config[key], f"{prefix}{key}.")
    return keys


def did_you_mean(name: str, known: object) -> str:
    """Return "; did you mean ...?" for the nearest known name, compared whole and by the last part."""
    known = list(known)
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [by_last_part[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
