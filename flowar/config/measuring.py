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

    batch_size: int = free(64)  # images that go through the network at once
    chunk_images: int = free(500)  # the piece of work that one process claims
    lease_s: float = free(60)  # a process without a sign of life for this long is taken for dead
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.chunk_images < 1 or self.lease_s <= 0:
            raise UserError(
                f"batch_size={self.batch_size} and chunk_images={self.chunk_images} must be at least 1, "
                f"lease_s={self.lease_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(FeatureWorkConfig):
    """How generated images are measured against real ones, whichever they are."""

    # Images of any kind, or an .npz with mu and sigma (ADM's VIRTUAL_*.npz, with its 10,000 images), or what
    # make-reference wrote
    reference: str = MISSING
    protocol: Literal["adm", "torch-fidelity"] = "adm"  # adm: what papers report
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    # More networks: FD-DINOv2, and torch-fidelity's own for precision and recall; None: those whose weights are here
    more: tuple[Literal["dinov2", "vgg16"], ...] | None = None
    interval_groups: int = 50  # groups of samples that are left out in turn, for 95% intervals; 0: no intervals

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.interval_groups)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """FID and its kin of generated images, against real ones."""

    # As the other verbs' reference; nothing: the images that the model was trained on, where they still are
    reference: str = ""
    samples: str = MISSING  # what `flowar sample` wrote, any folder of images (searched deeply), .npz, *.tar, MDS
    sample: SampleConfig | None = free(None)  # draw the samples first, into the folder `samples`, for this extractor
    out_dir: str | None = None  # features, metrics.json, report.html; None: SAMPLES/evaluation, or beside a file
    against: str | None = None  # other samples drawn with the same seed: the difference, with a paired interval
    run_dir: str | None = None  # training run that gets the numbers (evaluations.jsonl, wandb); None: the samples' own
    step: int | None = None  # of that run; None: that of the samples' checkpoint
    # Measure real images through the samples' VAE too, which no sample can surpass; None: with extractor.name=own
    ceiling: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SweepConfig(FeatureWorkConfig):
    """Ways to sample, all combinations; by successive halving."""

    model: str = MISSING  # as of sample
    reference: str = MISSING  # as of evaluate
    out_dir: str = free(MISSING)  # samples, scores, table, picture and recipe
    # What is not swept: vae, classes, seed, solver, time grid, batch sizes, start of the guidance interval
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    guidance: tuple[float, ...] = (1.5, 2.0, 2.4, 3.0, 4.0)  # scales to compare
    interval_ends: tuple[float, ...] = (0.7, 0.9, 1.0)  # upper ends of the guidance interval
    num_steps: tuple[int, ...] = (25,)  # steps to compare
    last_step_shares: tuple[float, ...] = (1.0,)  # steps of the finest scale over num_steps (DiSA anneals: below 1)
    weights: tuple[str, ...] = ("ema",)  # of a run_dir
    ema_stds: tuple[float, ...] = ()  # and averages of these lengths, as `flowar ema` makes them
    num_images: tuple[int, ...] = (5_000, 10_000, 50_000)  # in each round
    keep: float = 0.25  # share of the settings that go on to the next round
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # the network whose features are compared
    interval_groups: int = 20  # as of evaluate

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
    """Real images -> statistics and features that samples are compared with."""

    images: str = MISSING  # folder of images (searched deeply), .npz with arr_0 (and mu, sigma), *.tar, MDS
    out_dir: str = MISSING  # the reference to write
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)  # the network whose features it keeps
    keep_images: int = 10_000  # whose features are kept for precision, recall, KID, neighbours and classes; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_images < 0:
            raise UserError(f"keep_images={self.keep_images} must be at least 0")


def check_groups(number: int) -> None:
    """Raise a UserError if this number of groups gives no interval."""
    if number < 0 or 0 < number < 10:
        raise UserError(f"interval_groups={number} must be 0, or at least 10 for a spread")
