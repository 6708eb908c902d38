"""FID, Inception score, KID, precision and recall from features, with confidence intervals. No images, no files.

The formulas are torch-fidelity's; this file adds what it lacks: ADM's Inception score, FID of few images, k-NN curves,
confidence intervals. Read next: store.py for where features come from, protocols.py for the protocols.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

NEIGHBOURHOOD = 3  # k of precision and recall (Kynkaanniemi et al., 2019), in ADM and in torch-fidelity

NEIGHBOURS_AT_ONCE = 10_000  # rows of a distance matrix
ADM_SCORE_IMAGES = 5_000  # ADM's Inception score is the mean over consecutive parts of this size
KID_SUBSETS, KID_SUBSET_IMAGES = 100, 1_000  # torch-fidelity's
FEATURES_AT_ONCE = 20_000  # rows that are summed in float64 at once
NORMAL_95 = 1.959964


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


def statistics(features: Tensor) -> Statistics:
    """Return mean and covariance of features (N, D), summed in float64. The covariance has N - 1, like numpy's."""
    mu = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(FEATURES_AT_ONCE):
        mu += part.double().sum(dim=0)
    mu /= len(features)
    sigma = torch.zeros(len(mu), len(mu), dtype=torch.float64, device=features.device)
    for part in features.split(FEATURES_AT_ONCE):
        centred = part.double() - mu
        sigma += centred.T @ centred
    return Statistics(mu.cpu().numpy(), (sigma / (len(features) - 1)).cpu().numpy())


class Frechet:
    """Frechet distances to one reference; computes only once what depends on the reference alone.

    tr sqrt(A B) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), a symmetric matrix. This is equal to
    the sum over the eigenvalues of A B, which torch-fidelity computes, and ten times faster.
    """

    def __init__(self, reference: Statistics, device: torch.device | None = None) -> None:
        self.mu = torch.from_numpy(reference.mu).to(device)
        self.sigma = torch.from_numpy(reference.sigma).to(device)
        values, vectors = torch.linalg.eigh(self.sigma)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Statistics) -> float:
        """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) (Heusel et al., 2017).

        Raises:
            ValueError: if the features of the two statistics differ in width.
        """
        if len(other.mu) != len(self.mu):
            raise ValueError(f"can't compare statistics of {len(other.mu)} features with those of {len(self.mu)}")
        mu, sigma = (torch.from_numpy(array).to(self.mu.device) for array in other)
        cross = torch.linalg.eigvalsh(self.root @ sigma @ self.root).clamp(min=0).sqrt().sum()
        distance = (self.mu - mu).square().sum() + self.sigma.trace() + sigma.trace() - 2 * cross
        return float(distance)


def frechet_of_few(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features, (N, D) and (M, D); small sets need no D x D matrix.

    tr sqrt(S1 S2) is the sum of the singular values of X1 X2^T / sqrt((N - 1) (M - 1)), X centred.
    """
    if min(len(first), len(second)) > first.shape[1]:
        return Frechet(statistics(second), second.device).distance(statistics(first))
    first, second = first.double(), second.double()
    means = first.mean(dim=0), second.mean(dim=0)
    first, second = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((first, second), means, strict=True))
    cross = torch.linalg.svdvals(first @ second.T).sum()
    distance = (means[0] - means[1]).square().sum() + first.square().sum() + second.square().sum() - 2 * cross
    return float(distance)


def adm_inception_score(logits: Tensor) -> float:
    """Return ADM's Inception score of logits (N, classes): the mean over consecutive parts of 5,000 images.

    guided-diffusion/evaluations/evaluator.py. The order matters: each part should hold many classes.
    """
    scores: list[float] = []
    for part in logits.split(ADM_SCORE_IMAGES):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean().exp().item())
    return sum(scores) / len(scores)


def inception_score(logits: Tensor) -> float:
    """Return torch-fidelity's Inception score: the mean over ten parts in a fixed random order."""
    score: float = isc_features_to_metric(logits)["inception_score_mean"]
    return score


def kid(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return torch-fidelity's kernel distance and its std over subsets; with few images the subsets are smaller."""
    size = min(KID_SUBSET_IMAGES, len(samples), len(reference))
    found = kid_features_to_metric(
        samples.cpu(), reference.cpu(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(samples: Tensor, reference: Tensor, k: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Return the share of samples in the reference's neighbourhoods, and of the reference in the samples'.

    Kynkaanniemi et al., 2019. ADM's evaluator has the same formula, with distances in half precision.
    """
    shares: tuple[float, float] = calculate_precision_recall_part(samples, reference, k, NEIGHBOURS_AT_ONCE)
    return shares


def normal_interval(value: float, error: float) -> tuple[float, float]:
    """Return the 95% interval of a value with a standard error."""
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` images (Wilson, 1927), which is valid at 0 and 1 too."""
    z = NORMAL_95**2 / count
    middle, half = share + z / 2, NORMAL_95 * (share * (1 - share) / count + z / (4 * count)) ** 0.5
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def groups(labels: Tensor, num_groups: int) -> Tensor:
    """Return the group of each image, (N,); classes are spread over the groups as evenly as possible.

    Args:
        labels: (N,) classes; all equal if there are no classes.
        num_groups: at most; each group gets at least two images.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # by class, at random within each
    found = torch.empty(len(labels), dtype=torch.int64)
    found[order] = torch.arange(len(labels)) % min(num_groups, len(labels) // 2)
    return found


def statistics_without(features: Tensor, group: Tensor) -> Iterable[Statistics]:
    """Yield the statistics of all features except each group in turn, from sums, in two passes over the features."""
    mu = torch.from_numpy(statistics(features).mu).to(features.device)
    total = sum(centred.T @ centred for centred in (part.double() - mu for part in features.split(FEATURES_AT_ONCE)))
    for number in range(int(group.max()) + 1):
        own = features[group.to(features.device) == number].double() - mu
        count = len(features) - len(own)
        shift = -own.sum(dim=0) / count
        sigma = (total - own.T @ own - count * torch.outer(shift, shift)) / (count - 1)
        yield Statistics((mu + shift).cpu().numpy(), sigma.cpu().numpy())


def jackknife_error(values: Sequence[float]) -> float:
    """Return the standard error of a number, from its values with each group of images left out in turn.

    The grouped jackknife: sqrt((G - 1) / G sum (value - mean)^2). Unlike in a bootstrap, no image appears twice, which
    FID would mistake for less variety; and groups are balanced by class like the samples, so class frequencies add no
    error. If FID's bias dominates (few images, many features), the error is too large, by a factor of up to 1.5.
    """
    found = torch.tensor(values, dtype=torch.float64)
    return ((len(found) - 1) * found.var(correction=0)).sqrt().item()
