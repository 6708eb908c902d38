"""Settings of `flowar bench`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from flowar.base.errors import UserError
from flowar.config.drawing import DrawConfig
from flowar.config.models import CUSTOM_VARIANT, FlowARConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class BenchConfig(DrawConfig):
    """What is measured; how images are drawn counts for what=sample."""

    what: Literal["train", "sample", "attention"] = "train"  # gradients of a batch; its latents; one attention layer
    model: ModelConfig = field(default_factory=FlowARConfig)  # model.variant=flowar-l, or its settings
    depth: int | None = None  # only so many blocks in each of its Transformers; None: all
    baseline: bool = True  # measure the plain baseline beside it, where the model's family has one
    batch_size: int = 8  # images of a step or batch
    compile: bool = False  # the blocks, by torch.compile; the baseline runs as it is
    attention: Literal["sdpa", "flash"] = "sdpa"  # not of the baseline
    rounds: int = 5  # each runs both, one after the other
    counts: bool = True  # operations, bytes and FLOPs too, counted without the device: a minute for a large model
    profile: bool = False  # which operations take the time
    device: str = "auto"  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "rounds", "depth"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.attention == "flash" and self.precision != "bf16":
            raise UserError(f"attention=flash needs precision=bf16, got precision={self.precision}")

    @property
    def measured_model(self) -> ModelConfig:
        """The model's shape, with as many blocks as are measured.

        Raises:
            UserError: if its Transformers can't have so many.
        """
        if self.depth is None:
            return self.model
        changes: dict[str, Any] = {each.name: self.depth for each in fields(self.model) if each.name.endswith("_depth")}
        return replace(self.model, variant=CUSTOM_VARIANT, **changes)
