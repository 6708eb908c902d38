"""The network of a VAE in training, its losses, and what makes its latents white. Read next: train_vae.py.

The recipe is that of latent diffusion models (Rombach et al., arXiv:2112.10752, section 3.1 and appendix G):
reconstruction by L1 and LPIPS, a weak KL divergence, and a patch discriminator that begins late.
"""

from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowar.base.errors import UserError
from flowar.config.tokenizing import TrainVAEConfig
from flowar.latents.vae import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

MOST_WIDENING = 4  # the widest level of the network is that many times as wide as the first
LARGE_WIDTH, LARGE_GROUPS, SMALL_GROUPS = (
    64,
    32,
    8,
)  # channels of a group norm's group: as large VAEs have it, and small
DISCRIMINATOR_WIDTHS = (32, 64, 128)


def build_autoencoder(config: TrainVAEConfig) -> "AutoencoderKL":
    """Return diffusers' AutoencoderKL of the shape that the settings ask for, with fresh weights."""
    from diffusers import AutoencoderKL

    shape = config.shape
    levels = shape.stride.bit_length()
    widths = tuple(shape.width * min(level + 1, MOST_WIDENING) for level in range(levels))
    autoencoder: AutoencoderKL = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        latent_channels=shape.channels,
        norm_num_groups=LARGE_GROUPS if shape.width % LARGE_WIDTH == 0 else SMALL_GROUPS,
        sample_size=config.image_size,
        mid_block_add_attention=config.attention,
        scaling_factor=1.0,
    )
    return autoencoder


class Reconstruction(nn.Module):
    """An autoencoder with the sampling between its halves: what distributed training wraps."""

    def __init__(self, autoencoder: "AutoencoderKL") -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images (B, 3, H, W) as they come back, and mean and log-variance (B, C, h, w) of their latents."""
        mean, log_variance = self.autoencoder.encode(images).latent_dist.parameters.chunk(2, dim=1)
        log_variance = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.autoencoder.decode(latents).sample, mean, log_variance


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of each image's posterior from the standard normal distribution, (B,), nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)


class Discriminator(nn.Module):
    """Judges patches of images: strided convolutions and one logit per patch (Isola et al., arXiv:1611.07004)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in DISCRIMINATOR_WIDTHS:
            layers += [
                nn.Conv2d(channels, width, 4, stride=2, padding=1),
                nn.GroupNorm(SMALL_GROUPS, width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), large for patches that look real, of images (B, 3, H, W)."""
        logits: Tensor = self.layers(images)
        return logits


def hinge_loss(real: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the discriminator's loss, of its logits for real and for rebuilt images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + rebuilt).mean())


def load_lpips(device: torch.device) -> nn.Module:
    """Return LPIPS on VGG-16 features, torch-fidelity's: images in [0, 255] -> a distance, by which gradients flow.

    Raises:
        UserError: if its weights are not here and can't be fetched.
    """
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS

    try:
        lpips: nn.Module = SampleSimilarityLPIPS("lpips-vgg16")
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"lpips_weight above 0 needs weights that can't be loaded here ({error}); fetch {URL_VGG16_LPIPS} and "
            "https://download.pytorch.org/models/vgg16-397923af.pth into the folder hub/checkpoints below TORCH_HOME, "
            "or set lpips_weight=0"
        ) from error
    return lpips.to(device)


@torch.no_grad()
def whiten(autoencoder: Any, mean: Tensor, std: Tensor) -> None:
    """Give each channel of the latents mean 0 and std 1 by the 1 x 1 convolutions beside them; images stay as they are.

    Args:
        autoencoder: diffusers' AutoencoderKL, whose quant_conv gives moments and whose post_quant_conv takes latents.
        mean: of the latents so far, (C,).
        std: of the latents so far, (C,).
    """
    channels, inward, outward = len(mean), autoencoder.quant_conv, autoencoder.post_quant_conv
    inward.weight[:channels] /= std.view(-1, 1, 1, 1)
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.bias[channels:] -= 2 * std.log()  # of the log-variance
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(dim=1)
    outward.weight *= std.view(1, -1, 1, 1)
