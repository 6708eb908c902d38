"""How images are drawn, declared once, and which: the settings of `flowar sample` and `flowar info`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from omegaconf import MISSING

from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig, VAEConfig
from flowar.config.load import free
from flowar.config.models import FlowARConfig, ModelConfig

# On the demo's digits these cost less than the released settings and are closer to the exact solution and to real
# images: benchmarks/README.md, `python -m benchmarks.steps`. They leave guidance and its interval alone, which depend
# on the model: the released H has another interval than S and L.
PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "solver": "midpoint", "time_grid": "shifted", "shift": 0.5,
        "num_steps": num_steps, "last_scale_steps": last_scale_steps,
    }
    for name, num_steps, last_scale_steps in (("quality", 12, 7), ("balanced", 7, 4), ("fast", 5, 3))
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How one image is drawn from a model. Schemas that draw images inherit these settings."""

    prefix: ClassVar[str] = ""  # of the settings' names in messages

    # Sets solver, time_grid, shift and numbers of steps; settings given next to it win. Records contain these settings,
    # not the preset
    preset: Literal["quality", "balanced", "fast"] | None = free(None)
    num_steps: int = 25  # solver steps at each scale
    last_scale_steps: int | None = None  # at the finest scale, linear from num_steps at the coarsest (DiSA); None: same
    time_grid: Literal["released", "uniform", "shifted"] = "released"  # how the steps are spaced
    shift: float = 1.0  # time_grid=shifted: above 1, more steps near the noise
    # of the flow's ODE; the released code uses euler
    solver: Literal["euler", "heun", "midpoint", "adams-bashforth", "euler-maruyama"] = "euler"
    # 1: none; above, further from no class. The authors' README: S 4.3, L 2.4, H 2.4; their script: S 4.2, H 2.8
    guidance: float = 2.4
    guidance_schedule: Literal["linear", "constant"] = "linear"  # over scales; released: from 1 to guidance
    # (low, high) in time. The authors' README: up to 0.9 for S and L, up to 0.7 for H (with 50 steps)
    guidance_interval: tuple[float, float] = (0.0, 0.9)
    # On a GPU; lower precision changes the last bits of an image. The authors sample in fp16
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        least = 2 if self.time_grid == "released" else 1
        if self.num_steps < least:
            raise UserError(f"{self.prefix}num_steps={self.num_steps} must be at least {least}")
        if self.last_scale_steps is not None and self.last_scale_steps < least:
            raise UserError(f"{self.prefix}last_scale_steps={self.last_scale_steps} must be at least {least}")
        if self.shift <= 0:
            raise UserError(f"{self.prefix}shift={self.shift} must be above 0")
        if self.guidance < 1:
            raise UserError(f"{self.prefix}guidance={self.guidance} is below 1; use 1 (no guidance) or more")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"{self.prefix}guidance_interval=[{low}, {high}] must be [low, high] with 0 <= low <= high <= 1"
            )

    @staticmethod
    def preset_settings(name: object) -> dict[str, Any]:
        """Return the settings that a preset stands for, {} if there is no such preset."""
        return PRESETS.get(str(name), {})

    @property
    def annealing(self) -> dict[str, str]:
        """What a record says about steps per scale: floored now; version 0.1 rounded them and did not say so."""
        return {} if self.last_scale_steps in (None, self.num_steps) else {"annealing": "floor"}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(DrawConfig):
    """Which images are drawn, and in what pieces."""

    weights: str = "ema"  # weights of a run: ema (its first average), raw, or an average such as decay_0.9999
    # None: the VAE that the model was trained with, as a run's config.yaml or an exported model's dataset.json says
    vae: VAEConfig | None = None
    num_images: int = free(64)  # image i shows class i modulo num_classes; a set can grow, but not shrink
    # Only these classes in turn, by number or name, such as [3,sneaker]. Write a name made of digits as ['"7"']
    classes: tuple[int | str, ...] | None = None
    names: bool = False  # put the class name into file names
    random_labels: bool = False  # draw the class of each image at random, as ARFlow's authors do for FID
    label_file: str | None = None  # image i shows the class in line i of this file, which is repeated as needed
    unconditional: bool = False  # draw without a class
    compile: bool = False  # compile the blocks: a minute or two at the start; changes the last bits
    seed: int = 0  # image i depends on the seed and i alone
    features_only: bool = free(False)  # keep features for `flowar evaluate` instead of images
    extractor: ExtractorConfig = free(factory=ExtractorConfig)  # the network for features_only
    batch_size: int = free(64)  # images drawn at once by one process
    decode_batch_size: int | None = free(None)  # images that the VAE decodes at once; None: batch_size
    chunk_batches: int = free(2)  # batches that one worker claims at once
    lease_s: float = free(60)  # a worker that is silent for this long counts as dead
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images < 1:
            raise UserError(f"num_images={self.num_images} must be at least 1")
        for given in self.classes or ():
            if isinstance(given, bool) or not isinstance(given, int | str):
                raise UserError(f"classes holds {given!r}; give numbers or names, such as classes=[3,sneaker]")
        chosen = [name for name in ("classes", "label_file", "unconditional") if getattr(self, name)]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are both given; give one of them")
        if self.random_labels and (self.label_file is not None or self.unconditional):
            raise UserError("random_labels=true draws classes, but label_file or unconditional says them; give one")
        if self.unconditional and self.guidance > 1:
            raise UserError(f"guidance={self.guidance} needs classes; set guidance=1 with unconditional=true")
        if self.decode_batch_size is not None and self.decode_batch_size < 1:
            raise UserError(f"decode_batch_size={self.decode_batch_size} must be at least 1")
        if self.batch_size < 1 or self.chunk_batches < 1 or self.lease_s <= 0:
            raise UserError(
                f"batch_size={self.batch_size} and chunk_batches={self.chunk_batches} must be at least 1, "
                f"lease_s={self.lease_s} above 0"
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """Images from a model."""

    # exported model folder, hub id, or a training run (its newest checkpoint)
    model: str = free(MISSING)
    out_dir: str = free(MISSING)  # folder of the images; running again draws only what is missing
    preview: bool = free(False)  # only draw an overview into OUT_DIR/preview; also written --preview
    # also pack the images as ADM's .npz, WebDataset tars, or MDS
    also: tuple[Literal["npz", "tar", "mds"], ...] = free(())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features_only and self.also:
            raise UserError(f"also={list(self.also)} packs images, but features_only=true keeps none; give one of them")


@dataclass(frozen=True, kw_only=True)
class InfoConfig(DrawConfig):
    """What a model costs: parameters, tokens, and FLOPs of an image drawn with these settings."""

    # model.variant=flowar-l or arflow-xl/2, or its settings
    model: ModelConfig = field(default_factory=FlowARConfig)
