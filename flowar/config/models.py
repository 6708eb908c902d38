"""The shape of a model: what all families have in common, each family's own settings, and the table of known models."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowar.base.errors import UserError
from flowar.config.load import did_you_mean

FlowBlockName = Literal["attn_mlp", "attn_cross_mlp"]
ReadDecayName = Literal["running", "own"]

CUSTOM_VARIANT = "custom"  # a model that is no row of MODEL_VARIANTS


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """What the rest of the program knows of any model's shape."""

    family: str = "flowar"  # the kind of model: a row of MODEL_CONFIGS; its code is flowar/models/FAMILY
    variant: str = "flowar-l"  # the row of MODEL_VARIANTS that the other settings start from, or "custom"
    latent_channels: int = 16  # of the VAE
    num_classes: int = 1000  # of the dataset; one more stands for no class

    @property
    @abc.abstractmethod
    def latent_size(self) -> int:
        """Side of the latents, in latent pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def images_per_sample(self) -> int:
        """Images of one class that make one sample of training, each at its own time."""
        return 1

    @property
    def size_settings(self) -> str:
        """The settings that `latent_size` follows from, for messages."""
        return "model.latent_channels"

    @classmethod
    def start_from(cls, given: Mapping[str, Any]) -> "ModelConfig | None":
        """Return the model that given settings start from: the named row, or the named family's default; None: no wish.

        Raises:
            UserError: if there is no such variant or family; names the nearest one.
        """
        variant, family = given.get("variant"), given.get("family")
        if variant not in (None, CUSTOM_VARIANT):
            return variant_config(str(variant))
        if family is None:
            return None
        if str(family) not in MODEL_CONFIGS:
            raise UserError(f"model.family={family} is unknown{did_you_mean(str(family), MODEL_CONFIGS)}")
        return MODEL_CONFIGS[str(family)]()


@dataclass(frozen=True, kw_only=True)
class FlowARConfig(ModelConfig):
    """Shape of one FlowAR. The defaults are FlowAR-L as released; MODEL_VARIANTS holds the others."""

    scales: tuple[int, ...] = (1, 2, 4, 8, 16)  # side lengths of the token maps, coarse to fine
    patch_size: int = 1  # 1 for VAEs of stride 16, 2 for stride 8
    ar_depth: int = 16  # blocks of the autoregressive Transformer
    ar_width: int = 1024  # of its tokens
    ar_heads: int = 16  # of its attention; they divide ar_width
    flow_depth: int = 12  # blocks of the flow Transformer
    flow_width: int = 1024  # of its tokens
    flow_heads: int = 16  # released: heads of 64 channels
    flow_block: FlowBlockName = "attn_cross_mlp"  # the paper: attn_mlp
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
    def latent_size(self) -> int:
        """Side of the latents, in latent pixels."""
        return self.scales[-1] * self.patch_size

    @property
    def size_settings(self) -> str:
        """The settings that `latent_size` follows from, for messages."""
        return "model.latent_channels, model.scales and model.patch_size"


@dataclass(frozen=True, kw_only=True)
class ARFlowConfig(ModelConfig):
    """Shape of one ARFlow. The defaults are ARFlow-XL/2 for images of 256 px; MODEL_VARIANTS holds the others."""

    family: str = "arflow"
    variant: str = "arflow-xl/2"
    latent_channels: int = 4
    latent_size: int = 32  # 16 for images of 128 px
    patch_size: int = 2
    depth: int = 28
    width: int = 1152
    heads: int = 18
    images_per_sample: int = 5  # of one class, the noisiest first, as released
    # How far a token of an image can read the memory of earlier images. "running": its own gate times those of all
    # tokens before it in raster order, as released, so that the lower part of an image reads little; "own": its own.
    read_decay: ReadDecayName = "running"
    guided_channels: int | None = 3  # released: guidance acts on the first 3 latent channels; None: on all

    def __post_init__(self) -> None:
        for name in ("latent_channels", "latent_size", "patch_size", "num_classes", "depth", "width", "heads",
                     "images_per_sample"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.latent_size % self.patch_size:
            raise UserError(
                f"model.latent_size={self.latent_size} must be a multiple of model.patch_size={self.patch_size}"
            )
        if self.width % 4:
            raise UserError(
                f"model.width={self.width} must be a multiple of 4: a position is a sine and a cosine of the "
                "column and of the row"
            )
        if self.width % self.heads:
            raise UserError(f"model.width={self.width} must be a multiple of model.heads={self.heads}")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.latent_channels:
            raise UserError(
                f"model.guided_channels={self.guided_channels} must lie in 1 to model.latent_channels="
                f"{self.latent_channels}, or be null for all channels"
            )

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one image: patches of patch_size x patch_size latent pixels."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def size_settings(self) -> str:
        """The settings that say what latents fit, for messages."""
        return "model.latent_channels and model.latent_size"


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"flowar": FlowARConfig, "arflow": ARFlowConfig}  # by family


def _flowar(
    name: str, ar: tuple[int, int, int], flow: tuple[int, int, int], block: FlowBlockName, **others: Any
) -> FlowARConfig:
    return FlowARConfig(
        variant=name, ar_depth=ar[0], ar_width=ar[1], ar_heads=ar[2],
        flow_depth=flow[0], flow_width=flow[1], flow_heads=flow[2], flow_block=block, **others,
    )  # fmt: skip


def _arflow(size: str, patch_size: int, depth: int, width: int, heads: int) -> ARFlowConfig:
    return ARFlowConfig(
        variant=f"arflow-{size}/{patch_size}", patch_size=patch_size, depth=depth, width=width, heads=heads
    )


# The released models; a comment is what the paper reports for ImageNet at 256 px (parameters, FID, IS).
MODEL_VARIANTS: dict[str, ModelConfig] = {
    config.variant: config
    for config in (
        #                          AR: depth, width, heads   flow: depth, width, heads
        _flowar("flowar-s",       (12,  768, 12),           ( 2, 1024, 16), "attn_mlp"),        # 170 M, 3.61, 234.1
        _flowar("flowar-b",       (16,  768, 12),           ( 6, 1024, 16), "attn_mlp"),        # 300 M, 2.90, 272.5
        _flowar("flowar-l",       (16, 1024, 16),           (12, 1024, 16), "attn_cross_mlp"),  # 589 M, 1.90, 281.4
        _flowar("flowar-h",       (30, 1536, 16),           (12, 1536, 24), "attn_cross_mlp"),  # 1.9 B, 1.65, 296.5
        _flowar("flowar-h-paper", (30, 1536, 16),           (18, 1536, 24), "attn_mlp"),        # as in its table 8
        # For small latents and data, by default those of 32 px with `flowar train-vae`; see `flowar suggest`.
        _flowar("flowar-xs",      ( 6,  256,  4),           ( 4,  256,  4), "attn_mlp",         # 12.9 M
                 scales=(1, 2, 4), latent_channels=4, patch_size=2, num_classes=10, dropout=0.0, zero_init=True),
        _flowar("flowar-xxs",     ( 4,  128,  4),           ( 3,  192,  4), "attn_mlp",         # 3.4 M
                 scales=(1, 2, 4), latent_channels=4, patch_size=2, num_classes=10, dropout=0.0, zero_init=True),
        _flowar("flowar-demo",    ( 4,  128,  4),           ( 2,  128,  4), "attn_mlp",         # digits on a laptop
                 scales=(1, 2, 4), latent_channels=1, patch_size=2, num_classes=10, dropout=0.0, zero_init=True),
        ARFlowConfig(variant="arflow-demo", depth=6, width=128, heads=2, images_per_sample=3,   # digits on a laptop
                     latent_size=8, latent_channels=1, guided_channels=None, num_classes=10),
        #               patch, depth, width, heads; for 256 px, whose latents are 32 x 32
        *(_arflow("s",  patch, 12,  384,  6) for patch in (2, 4, 8)),  # 34.6 M, 34.7 M, 34.9 M
        *(_arflow("b",  patch, 12,  768, 12) for patch in (2, 4, 8)),  # 137.5 M, 137.6 M, 138.0 M
        *(_arflow("l",  patch, 24, 1024, 16) for patch in (2, 4, 8)),  # 483.3 M, 483.4 M, 484.0 M
        *(_arflow("xl", patch, 28, 1152, heads) for patch, heads in ((2, 18), (4, 16), (8, 16))),  # 712.4 M to 713.2 M
    )
}  # fmt: skip


def variant_config(name: str) -> ModelConfig:
    """Return a row of MODEL_VARIANTS.

    Raises:
        UserError: if there is no such row; names the nearest one.
    """
    if name not in MODEL_VARIANTS:
        raise UserError(f"no model is called {name!r}{did_you_mean(name, MODEL_VARIANTS)}")
    return MODEL_VARIANTS[name]
