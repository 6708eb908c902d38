"""Sums over rows of moments, from which the figures of the passport follow. Read next: encode.py, check.py."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowar.latents.vae import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE


@dataclass
class MomentSums:
    """Sums over all latent pixels, per channel; sums of two parts add up to those of the whole."""

    pixels: int = 0  # per channel
    means: list[float] = field(default_factory=list)
    square_means: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)
    error_max: float = 0.0  # stored minus exact moments, if the exact ones were available
    error_squares: float = 0.0

    @staticmethod
    def of(stored: NDArray[Any], exact: NDArray[Any] | None = None) -> "MomentSums":
        """Return the sums over moments (N, 2 C, h, w), and the rounding error against the exact ones."""
        mean, log_variance = np.split(stored.astype(np.float64), 2, axis=1)
        variance = np.exp(log_variance.clip(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
        error = np.zeros(1) if exact is None else stored.astype(np.float64) - exact
        means, squares, variances = (
            values.sum(axis=(0, 2, 3)).tolist() for values in (mean, np.square(mean), variance)
        )
        return MomentSums(
            mean[:, 0].size,
            means,
            squares,
            variances,
            error_max=float(np.abs(error).max()),
            error_squares=float(np.square(error).sum()),
        )

    def __add__(self, other: "MomentSums") -> "MomentSums":
        if not self.pixels:
            return other
        if not other.pixels:
            return self
        sums = {}
        for key, mine in asdict(self).items():
            theirs = getattr(other, key)
            sums[key] = (np.array(mine) + theirs).tolist() if isinstance(mine, list) else mine + theirs
        return MomentSums(**sums | {"error_max": max(self.error_max, other.error_max)})

    def figures(self) -> dict[str, Any]:
        """Return the measured fields of the passport.

        The latents are samples of the moments: their variance is that of the means plus the mean variance.
        """
        mean = np.array(self.means) / self.pixels
        square = (np.array(self.square_means) + self.variances) / self.pixels
        values = 2 * len(mean) * self.pixels
        return {
            "latent_mean": mean.tolist(),
            "latent_std": np.sqrt(square - np.square(mean)).tolist(),
            "measured_multiplier": float(1 / np.sqrt(square.mean() - np.square(mean.mean()))),
            "rounding_error_max": _three_digits(self.error_max),
            "rounding_error_rms": _three_digits(np.sqrt(self.error_squares / values)),
        }


def _three_digits(value: float) -> float:
    """Return the value without digits that mean nothing."""
    return float(f"{value:.3g}")
