"""Settings of `flowar evaluate`, `make-reference` and `sweep`."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig
from flowar.config.drawing import SampleConfig, SamplingConfig
from flowar.config.load import free


@dataclass(frozen=True, kw_only=True)
class FeatureWorkConfig:
    """How processes share the work of computing features."""

    batch_size: int = free(64)  # images per forward pass
    chunk_images: int = free(500)  # images that one process claims at once
    lease_s: float = free(60)  # a process that is silent for this long counts as dead
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.chunk_images < 1 or self.lease_s <= 0:
            raise UserError(
                f"batch_size={self.batch_size} and chunk_images={self.chunk_images} must be at least 1, "
                f"lease_s={self.lease_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(FeatureWorkConfig):
    """How generated images are compared with real ones."""

    # Real images of any kind, an .npz with mu and sigma (ADM's VIRTUAL_*.npz), or what make-reference wrote
    reference: str = MISSING
    protocol: Literal["adm", "torch-fidelity"] = "adm"  # adm: as papers report
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    # More networks: dinov2 for FD-DINOv2, vgg16 for precision and recall; None: those whose weights are on this machine
    more: tuple[Literal["dinov2", "vgg16"], ...] | None = None
    interval_groups: int = 50  # groups that the jackknife leaves out in turn for 95% intervals; 0: no intervals

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.interval_groups)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """FID and related metrics of generated images."""

    # Real images, or what make-reference wrote; empty: the images that the model was trained on, if still there
    reference: str = ""
    samples: str = MISSING  # what `flowar sample` wrote, any folder of images (searched deeply), .npz, *.tar, MDS
    sample: SampleConfig | None = free(None)  # draw the samples first, into the folder `samples`
    out_dir: str | None = None  # features, metrics.json, report.html; None: SAMPLES/evaluation, or beside a file
    against: str | None = None  # other samples with the same seed: report the difference with a paired interval
    run_dir: str | None = None  # training run that records the numbers; None: the run of the samples
    step: int | None = None  # step of that run; None: the step of the samples' checkpoint
    # Also measure real images through the VAE, the ceiling for any sample; None: only with extractor.name=own
    ceiling: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SweepConfig(FeatureWorkConfig):
    """Compare all combinations of sampling settings by successive halving."""

    model: str = MISSING  # model folder, hub id or training run
    reference: str = MISSING  # real images, as for `flowar evaluate`
    out_dir: str = free(MISSING)  # samples, scores, table, picture and recipe
    # Everything that is not swept: VAE, classes, seed, solver, time grid, batch sizes, start of the guidance interval
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    guidance: tuple[float, ...] = (1.5, 2.0, 2.4, 3.0, 4.0)  # guidance weights to compare
    interval_ends: tuple[float, ...] = (0.7, 0.9, 1.0)  # upper ends of the guidance interval to compare
    num_steps: tuple[int, ...] = (25,)  # numbers of steps to compare
    last_step_shares: tuple[float, ...] = (1.0,)  # steps at the finest scale divided by num_steps (below 1: DiSA)
    weights: tuple[str, ...] = ("ema",)  # weights of a run to compare
    ema_stds: tuple[float, ...] = ()  # EDM2 averages of these lengths to compare, made as by `flowar ema`
    num_images: tuple[int, ...] = (5_000, 10_000, 50_000)  # images of each setting in each round
    keep: float = 0.25  # share of the settings that reach the next round
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # the network whose features are compared
    interval_groups: int = 20  # groups that the jackknife leaves out in turn; 0: no intervals

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.interval_groups)
        if not 0 < self.keep < 1:
            raise UserError(f"keep={self.keep} must lie in (0, 1)")
        if self.sample.preset is not None:
            raise UserError(
                f"sample.preset={self.sample.preset} stands for numbers of steps, which are swept; give sample.solver "
                "and sample.time_grid instead"
            )
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
class ReferenceConfig(FeatureWorkConfig):
    """Real images -> the statistics and features that samples are compared with."""

    images: str = MISSING  # folder of images (searched deeply), .npz with arr_0 (and mu, sigma), *.tar, MDS
    out_dir: str = MISSING  # the reference to write
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # the network whose features it keeps
    keep_images: int = 10_000  # images whose features are kept for precision, recall, KID and neighbours; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_images < 0:
            raise UserError(f"keep_images={self.keep_images} must be at least 0")


def check_groups(number: int) -> None:
    """Raise a UserError if this number of groups gives no interval."""
    if number < 0 or 0 < number < 10:
        raise UserError(f"interval_groups={number} must be 0, or at least 10 for a spread")
