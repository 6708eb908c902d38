"""Settings of `flowar bench`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from flowar.base.errors import UserError
from flowar.config.drawing import DrawConfig
from flowar.config.models import CUSTOM_VARIANT, FlowARConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class BenchConfig(DrawConfig):
    """What is measured; settings of drawing matter only for what=sample."""

    what: Literal["train", "sample", "attention"] = "train"  # gradients of a batch; its latents; one attention layer
    model: ModelConfig = field(default_factory=FlowARConfig)  # model.variant=flowar-l, or its settings
    depth: int | None = None  # blocks in each Transformer; None: all
    baseline: bool = True  # also measure the plain baseline, if the model's family has one
    batch_size: int = 8  # images per step or batch
    compile: bool = False  # compile the blocks; the baseline stays eager
    attention: Literal["sdpa", "flash"] = "sdpa"  # for ours; the baseline uses sdpa
    rounds: int = 5  # rounds, each of which runs both in turn
    counts: bool = True  # also count operations, bytes and FLOPs, without the device; a minute for a large model
    profile: bool = False  # list the operations that take the most time
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
            UserError: if its Transformers can't have that many.
        """
        if self.depth is None:
            return self.model
        changes: dict[str, Any] = {each.name: self.depth for each in fields(self.model) if each.name.endswith("_depth")}
        return replace(self.model, variant=CUSTOM_VARIANT, **changes)
