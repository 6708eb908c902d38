"""Trains the demo's VAE on the training digits; its weights ship as flowar/assets/demo_vae. Read next: latents/vae.py.

python -m data_prep.train_demo_vae OUT_DIR      (about 8 minutes on two CPU cores)
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from flowar.evaluation.demo_images import load_splits, to_model_range
from flowar.evaluation.judge import jitter

STEPS = 1800
BATCH = 64
LR = 2e-3
KL_WEIGHT = 3e-6  # keeps the latents smooth; the images stay sharp


def build() -> AutoencoderKL:
    """Return the untrained VAE: 32 x 32 x 3 pixels <-> 8 x 8 x 1 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def main(out_dir: str) -> None:
    """Train the VAE, measure it on the held-out digits, set its latent multiplier and write it."""
    torch.manual_seed(0)
    splits = load_splits()
    images, held_out = to_model_range(splits["train"][0]), to_model_range(splits["held_out"][0])
    vae = build()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for step in range(STEPS):
        batch = jitter(images[torch.randint(len(images), (BATCH,))])
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        loss = F.mse_loss(error, torch.zeros_like(error)) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.5f}, held-out PSNR {psnr(vae, held_out):.2f} dB", flush=True)
    with torch.inference_mode():
        posterior = vae.encode(images).latent_dist
        std = posterior.sample().std(dim=(0, 2, 3))
    print(f"latent std by channel {np.round(std.tolist(), 3)}, posterior std {posterior.std.mean():.3f}")
    vae.register_to_config(scaling_factor=round(1 / std.square().mean().sqrt().item(), 4))
    vae.save_pretrained(out_dir)


@torch.inference_mode()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of the reconstructed images (N, 3, H, W) in [-1, 1], in dB."""
    rebuilt = vae.decode(vae.encode(images).latent_dist.mode()).sample
    return (10 * torch.log10(4 / F.mse_loss(rebuilt, images))).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.train_demo_vae", description="Trains the demo's VAE on the training digits."
    )
    parser.add_argument("out_dir", help="where to write it, in diffusers' form; a new folder")
    options = parser.parse_args()
    if Path(options.out_dir).exists():
        parser.error(f"{options.out_dir} exists already; give a new folder")
    main(options.out_dir)
