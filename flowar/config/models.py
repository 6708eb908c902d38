"""The shape of a model: what all families have in common, each family's own settings, and the table of known models."""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from flowar.base.errors import UserError
from flowar.config.load import did_you_mean, load_values

FlowBlockName = Literal["attn_mlp", "attn_cross_mlp"]
ReadDecayName = Literal["running", "own"]

MOST_ACROSS = 16  # side of the finest token map; the authors' for 256 px
# The flow Transformer has to carry the noise of a whole token, so it is suggested to be wider than that.
FLOW_OVER_TOKEN_WIDTH, HEAD_WIDTH = 4 / 3, 64
CUSTOM_VARIANT = "custom"  # a model that is not in MODEL_VARIANTS


class DataShape(NamedTuple):
    """What a dataset needs of a model."""

    latent_channels: int
    latent_size: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """What the rest of the program knows of any model's shape."""

    family: str = "flowar"  # model family, flowar or arflow; its code is in flowar/models/FAMILY
    variant: str = "flowar-l"  # named model that the other settings start from, such as flowar-s, or "custom"
    latent_channels: int = 16  # channels of the VAE's latents
    num_classes: int = 1000  # classes of the dataset, without "no class"

    @property
    @abc.abstractmethod
    def latent_size(self) -> int:
        """Side of the latents, in latent pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    title: ClassVar[str] = ""  # the method's name and arXiv number, for cards
    paper: ClassVar[str] = ""
    # Settings in which a model may differ from the one whose weights it starts with.
    adaptable: ClassVar[frozenset[str]] = frozenset({"variant", "latent_channels", "num_classes"})

    def fitted_to(self, data: DataShape | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a model that starts with weights of this shape, as far as they follow from the data.

        Args:
            data: what it will be trained on; None: not known, so that all stays as it is.
            given: settings that were given, which win.
        """
        if data is None:
            return {}
        return {"latent_channels": data.latent_channels, "num_classes": data.num_classes}

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

    title, paper = "FlowAR", "2412.15205"

    scales: tuple[int, ...] = (1, 2, 4, 8, 16)  # side lengths of the token maps, coarse to fine
    patch_size: int = 1  # 1 for VAEs of stride 16, 2 for stride 8
    ar_depth: int = 16  # blocks of the autoregressive Transformer
    ar_width: int = 1024  # width of its tokens
    ar_heads: int = 16  # attention heads; they divide ar_width
    flow_depth: int = 12  # blocks of the flow matching Transformer
    flow_width: int = 1024  # width of its tokens
    flow_heads: int = 16  # attention heads; the released models have 64 channels per head
    flow_block: FlowBlockName = "attn_cross_mlp"  # block type; the paper describes attn_mlp
    dropout: float = 0.1  # of the AR Transformer while training; the flow Transformer has none
    zero_init: bool = False  # start with a last linear layer of zeros
    # side, in tokens, of the square that all rotary positions lie in; None: the finest scale's, as released. A model
    # that starts with weights of smaller images keeps theirs: new positions lie between the known ones
    position_span: int | None = None

    adaptable: ClassVar[frozenset[str]] = ModelConfig.adaptable | {
        *("scales", "patch_size", "dropout", "zero_init", "position_span")
    }

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
        check_span(self.position_span)

    def fitted_to(self, data: DataShape | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """As of any model; more scales for larger latents, each twice as fine, or fewer for smaller ones."""
        scales, patch = given.get("scales"), given.get("patch_size", self.patch_size)
        if scales is None and data is not None and data.latent_size != self.latent_size:
            scales = fitting_scales(self.scales, data.latent_size, patch)
        last, span = list(scales or self.scales)[-1], self.position_span or self.scales[-1]
        grid = {"scales": tuple(scales or self.scales), "position_span": None if last == span else span}
        return super().fitted_to(data, given) | grid

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

    title, paper = "ARFlow", "2501.16085"

    family: str = "arflow"
    variant: str = "arflow-xl/2"
    latent_channels: int = 4
    latent_size: int = 32  # side of the latents; 16 for images of 128 px
    patch_size: int = 2
    depth: int = 28
    width: int = 1152
    heads: int = 18
    images_per_sample: int = 5  # of one class, the noisiest first, as released
    # How far a token of an image can read the memory of earlier images. "running": its own gate times those of all
    # tokens before it in raster order, as released, so that the lower part of an image reads little; "own": its own.
    read_decay: ReadDecayName = "running"
    guided_channels: int | None = 3  # latent channels that guidance acts on, 3 as released; None: all
    # side, in tokens, of the square that positions lie in; None: the image's own, as released. A model that starts with
    # weights of smaller images keeps theirs: new positions lie between the known ones
    position_span: int | None = None

    adaptable: ClassVar[frozenset[str]] = ModelConfig.adaptable | {
        *("latent_size", "patch_size", "images_per_sample", "read_decay", "guided_channels", "position_span")
    }

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
        check_span(self.position_span)

    def fitted_to(self, data: DataShape | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """As of any model, with the size of the latents."""
        size = given.get("latent_size", self.latent_size if data is None else data.latent_size)
        side, span = size // given.get("patch_size", self.patch_size), self.position_span or self.side
        grid = {"latent_size": size, "position_span": None if side == span else span}
        return super().fitted_to(data, given) | grid

    @property
    def side(self) -> int:
        """Tokens of an image, in one direction."""
        return self.latent_size // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one image: patches of patch_size x patch_size latent pixels."""
        return self.side**2

    @property
    def size_settings(self) -> str:
        """The settings that say what latents fit, for messages."""
        return "model.latent_channels and model.latent_size"


def check_span(span: int | None) -> None:
    """Raise a UserError if positions can't lie in a square of this side."""
    if span is not None and span < 1:
        raise UserError(f"model.position_span={span} must be at least 1, or null")


def fitting_scales(scales: tuple[int, ...], latent_size: int, patch_size: int) -> tuple[int, ...]:
    """Return scales for latents of another size: those that are coarser, then each twice as fine up to the size.

    Raises:
        UserError: if that doesn't lead to the size.
    """
    side, rest = divmod(latent_size, patch_size)
    found = [scale for scale in scales if scale <= side]
    while found and found[-1] < side:
        found.append(2 * found[-1])
    if rest or not found or found[-1] != side:
        example = [*(scale for scale in scales if scale < side), side]
        raise UserError(
            f"latents of side {latent_size} need other scales than {list(scales)} of patches of {patch_size}, and it "
            f"can't be told which; set model.scales, for example model.scales={str(example).replace(' ', '')}"
            + (", and model.patch_size" if rest else "")
        )
    return tuple(found)


def suggested_shape(variant: FlowARConfig, latent_size: int, latent_channels: int, *, coarse: bool) -> dict[str, Any]:
    """Return scales, patch_size and, if it must be wider, flow_width of a FlowAR to be trained on latents of a size.

    Args:
        variant: the model that it starts from.
        latent_size: side of the latents.
        latent_channels: their channels.
        coarse: choose fewer, larger patches, because the machine is slow.
    """
    most = MOST_ACROSS if not coarse else 4 if latent_size <= 32 else 8
    patch_size = next(
        size for size in range(1, latent_size + 1) if latent_size % size == 0 and latent_size // size < 2 * most
    )
    scales = [latent_size // patch_size]
    while scales[0] > 1:
        scales.insert(0, math.ceil(scales[0] / 2))
    shape: dict[str, Any] = {"scales": scales, "patch_size": patch_size}
    width = math.ceil(latent_channels * patch_size**2 * FLOW_OVER_TOKEN_WIDTH / HEAD_WIDTH) * HEAD_WIDTH
    if width > variant.flow_width:
        shape |= {"flow_width": width, "flow_heads": width // HEAD_WIDTH}
    return shape


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


# The paper's models, with their parameters in its table 1; evaluation/expected.py has their published FID and the like.
MODEL_VARIANTS: dict[str, ModelConfig] = {
    config.variant: config
    for config in (
        #                          AR: depth, width, heads   flow: depth, width, heads
        _flowar("flowar-s",       (12,  768, 12),           ( 2, 1024, 16), "attn_mlp"),        # 170 M
        _flowar("flowar-b",       (16,  768, 12),           ( 6, 1024, 16), "attn_mlp"),        # 300 M
        _flowar("flowar-l",       (16, 1024, 16),           (12, 1024, 16), "attn_cross_mlp"),  # 589 M
        _flowar("flowar-h",       (30, 1536, 16),           (12, 1536, 24), "attn_cross_mlp"),  # 1.9 B
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
        UserError: if there is no such row; it names the nearest one.
    """
    if name not in MODEL_VARIANTS:
        raise UserError(f"no model is called {name!r}{did_you_mean(name, MODEL_VARIANTS)}")
    return MODEL_VARIANTS[name]


def config_from_dict(settings: Any, source: str = "the model's config") -> ModelConfig:
    """Return the model's shape from `settings`, checked like a config file; without "family" it is a FlowAR's.

    Args:
        settings: what a config.json holds; its strings are taken literally.
        source: what is called wrong in errors.

    Raises:
        UserError: if it is not a JSON object, or a setting is unknown or wrong.
    """
    if not isinstance(settings, dict):
        raise UserError(
            f"{source} holds a {type(settings).__name__}, but settings of a model are needed, for example "
            '{"variant": "flowar-l"}; write it again with `flowar export` or `flowar convert`'
        )
    if settings.get("variant") in (None, CUSTOM_VARIANT):
        settings = {"family": ModelConfig.family} | settings
    try:
        return load_values(ModelConfig, settings)  # type: ignore[type-abstract]  # it makes a family's
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
