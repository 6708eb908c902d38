"""Settings of `flowar train-vae`: a tokenizer for one's own images."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from flowar.base.errors import UserError
from flowar.config.load import free
from flowar.config.training import WandbConfig

# What is chosen where a setting is None, by the largest image_size that it is for.
#                 up to px: stride, channels, width
VAE_SIZES = {64: (4, 4, 16), 128: (8, 8, 64)}
LARGE_VAE = (16, 16, 128)  # as the VAE of MAR and FlowAR


@dataclass(frozen=True, kw_only=True)
class TrainVAEConfig:
    """Images -> a VAE for them: diffusers' AutoencoderKL, trained from scratch."""

    images: str = MISSING  # folder with a sub-folder per class, folder or pattern of *.tar or *.parquet
    out_dir: str = free(MISSING)  # folder of the VAE, for vae.name=; its training run is in OUT_DIR/training
    image_size: int = 256  # side of the training crops, pixels
    crop: Literal["center", "random"] = "center"  # random: crops of images resized to 9/8 of image_size
    flip: bool = True  # mirror every other image
    image_column: str = free("image")  # parquet only: the column of images
    label_column: str = free("label")  # parquet only: the column of class numbers
    stride: int | None = None  # image pixels per latent pixel, each way, a power of 2; None: 4 up to 64 px, 8, or 16
    channels: int | None = None  # of the latents; None: 4 up to 64 px, 8 up to 128 px, else 16
    width: int | None = None  # of the network at full size, a multiple of 8; None: 16 up to 64 px, 64, or 128
    layers_per_block: int = 1  # residual layers at each size
    attention: bool = False  # attention in the middle of encoder and decoder, as in large VAEs
    steps: int = free(2000)  # optimizer steps; a larger number continues a finished VAE on the longer schedule
    batch_size: int = 32  # images per step, over all processes
    lr: float = free(3e-3)  # peak learning rate of AdamW, after a warm-up of 5% of the steps; cosine decay to 0
    kl_weight: float = 3e-3  # weight of the KL divergence, nats per pixel value: smoother latents, blurrier images
    lpips_weight: float = 0.0  # weight of LPIPS (VGG-16, fetched by torch-fidelity); 0.5 or 1 for photographs
    gan_weight: float = 0.0  # weight of a patch discriminator; 0.1 for photographs
    gan_start: float = 0.5  # share of the steps before the discriminator starts
    max_grad_norm: float = free(1.0)  # gradients with a larger norm are scaled down to it
    seed: int = 0  # for fresh weights, crops, flips and noise
    precision: Literal["fp32", "tf32", "bf16"] = free("tf32")  # bf16: network alone; weights and loss stay float32
    num_workers: int = free(2)  # processes that decode images; 0 decodes in the main one
    log_every_steps: int = free(50)  # steps between two lines of OUT_DIR/training/metrics.jsonl
    save_every_steps: int = free(200)  # steps between two checkpoints
    keep_checkpoints: int = free(2)  # how many of the newest checkpoints are kept
    timeout_s: float = free(600)  # the job ends if a process stalls for this many seconds
    wandb: WandbConfig = free(factory=WandbConfig)  # Weights & Biases
    tensorboard: bool = free(False)  # event files in OUT_DIR/training/tensorboard
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        for name in ("image_size", "layers_per_block", "steps", "batch_size", "log_every_steps", "save_every_steps",
                     "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "max_grad_norm", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("kl_weight", "lpips_weight", "gan_weight", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.gan_start <= 1:
            raise UserError(f"gan_start={self.gan_start} must lie in [0, 1]")
        if self.shape.stride < 1 or self.shape.stride & (self.shape.stride - 1):
            raise UserError(f"stride={self.stride} must be a power of 2, for example 4, 8 or 16")
        if self.image_size % self.shape.stride:
            near = max(1, round(self.image_size / self.shape.stride)) * self.shape.stride
            raise UserError(
                f"image_size={self.image_size} is not a multiple of stride={self.shape.stride}; set image_size={near}, "
                "or a smaller stride"
            )
        if self.shape.channels < 1:
            raise UserError(f"channels={self.channels} must be at least 1")
        if self.shape.width < 8 or self.shape.width % 8:
            raise UserError(f"width={self.width} must be a multiple of 8: channels are normalised in groups")

    @property
    def shape(self) -> "VAEShape":
        """The shape of the network: the settings, or what fits the size of the images."""
        sizes = next((sizes for most, sizes in VAE_SIZES.items() if self.image_size <= most), LARGE_VAE)
        given = (self.stride, self.channels, self.width)
        return VAEShape(*(own if value is None else value for value, own in zip(given, sizes, strict=True)))


@dataclass(frozen=True)
class VAEShape:
    """How large an autoencoder is."""

    stride: int  # image pixels per latent pixel, each way
    channels: int  # of the latents
    width: int  # of the network at full size
