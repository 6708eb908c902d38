"""FID, Inception score, KID, precision and recall from features, and how sure they are. No images, no files.

The formulas are torch-fidelity's; what stands here is what it lacks: ADM's Inception score, FID of few images, k-NN
curves, confidence intervals. Read next: features.py for where features come from, evaluate.py for the protocols.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

NEIGHBOURHOOD = 3  # k of precision and recall (Kynkaanniemi et al., 2019), in ADM and in torch-fidelity
NEIGHBOURS_AT_ONCE = 10_000  # rows of a distance matrix
ADM_SCORE_IMAGES = 5_000  # ADM's Inception score is the mean over consecutive parts of so many
KID_SUBSETS, KID_SUBSET_IMAGES = 100, 1_000  # torch-fidelity's
ROWS_AT_ONCE = 20_000  # of features, when they are summed in float64
NORMAL_95 = 1.959964


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def statistics(features: Tensor) -> Statistics:
    """Return mean and covariance of features (N, D), summed in float64. The covariance has N - 1, as numpy's."""
    mu = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(ROWS_AT_ONCE):
        mu += part.double().sum(dim=0)
    mu /= len(features)
    sigma = torch.zeros(len(mu), len(mu), dtype=torch.float64, device=features.device)
    for part in features.split(ROWS_AT_ONCE):
        centred = part.double() - mu
        sigma += centred.T @ centred
    return Statistics(mu.cpu().numpy(), (sigma / (len(features) - 1)).cpu().numpy())


class Frechet:
    """Frechet distances to one reference: what depends on the reference alone is computed once.

    tr sqrt(A B) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), a symmetric matrix: ten times quicker
    than the eigenvalues of A B that torch-fidelity takes, and equal.
    """

    def __init__(self, reference: Statistics, device: torch.device | None = None) -> None:
        self.mu = torch.from_numpy(reference.mu).to(device)
        self.sigma = torch.from_numpy(reference.sigma).to(device)
        values, vectors = torch.linalg.eigh(self.sigma)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Statistics) -> float:
        """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) (Heusel et al., 2017)."""
        mu, sigma = (torch.from_numpy(array).to(self.mu.device) for array in other)
        cross = torch.linalg.eigvalsh(self.root @ sigma @ self.root).clamp(min=0).sqrt().sum()
        return ((self.mu - mu).square().sum() + self.sigma.trace() + sigma.trace() - 2 * cross).item()


def frechet_of_few(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two small sets of features, (N, D) and (M, D), without any D x D matrix.

    tr sqrt(S1 S2) is the sum of the singular values of X1 X2^T / sqrt((N - 1) (M - 1)), X centred.
    """
    first, second = first.double(), second.double()
    means = first.mean(dim=0), second.mean(dim=0)
    first, second = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((first, second), means, strict=True))
    cross = torch.linalg.svdvals(first @ second.T).sum()
    return ((means[0] - means[1]).square().sum() + first.square().sum() + second.square().sum() - 2 * cross).item()


def adm_inception_score(logits: Tensor) -> float:
    """Return ADM's Inception score of logits (N, classes): the mean over consecutive parts of 5,000 images.

    guided-diffusion/evaluations/evaluator.py. The order matters: parts must not hold few classes.
    """
    scores = []
    for part in logits.split(ADM_SCORE_IMAGES):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean().exp().item())
    return sum(scores) / len(scores)


def inception_score(logits: Tensor) -> float:
    """Return torch-fidelity's Inception score: the mean over ten parts in a fixed random order."""
    return isc_features_to_metric(logits)["inception_score_mean"]


def kid(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return torch-fidelity's kernel distance and its std over subsets; subsets are smaller where images are fewer."""
    size = min(KID_SUBSET_IMAGES, len(samples), len(reference))
    found = kid_features_to_metric(
        samples.cpu(), reference.cpu(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(samples: Tensor, reference: Tensor, k: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Return the shares of samples among the reference's neighbourhoods, and of the reference among the samples'.

    Kynkaanniemi et al., 2019; torch-fidelity's formula, which is ADM's too.
    """
    return calculate_precision_recall_part(samples, reference, k, NEIGHBOURS_AT_ONCE)


@dataclass(frozen=True)
class Interval:
    """A value with its standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95% confidence interval."""
        return self.value - NORMAL_95 * self.error

    @property
    def high(self) -> float:
        """Upper end of it."""
        return self.value + NORMAL_95 * self.error


def share_error(share: float, count: int) -> float:
    """Return the standard error of a share of so many: what a bootstrap of them tends to, in closed form."""
    return (share * (1 - share) / count) ** 0.5


def halves(labels: Tensor, resamples: int, seed: int = 0) -> list[Tensor]:
    """Return sorted random halves of range(N) with half of each class in each, always the same ones.

    Args:
        labels: (N,) classes; all equal where there are none.
        resamples: how many.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        order = torch.randperm(len(labels), generator=generator)
        order = order[labels.cpu()[order].argsort(stable=True)]  # by class, at random within each
        pairs = order[: len(order) // 2 * 2].view(-1, 2)
        chosen = torch.randint(2, (len(pairs), 1), generator=generator)
        found.append(pairs.gather(1, chosen).flatten().sort().values)
    return found


def bootstrap_errors(measure: Callable[[Tensor], list[float]], labels: Tensor, resamples: int) -> list[float]:
    """Return the standard errors of what `measure` gives for all of N images.

    By half-sampling: the spread over random halves, drawn without replacement, equals that of the ordinary bootstrap
    (variance sigma^2 / (N / 2) x (1 - 1 / 2)), but no image comes twice, which k-NN and kernels don't bear. Halves are
    balanced, as samples are: chance in the classes is no error of theirs. FID is larger for fewer images; the spread
    around the mean of the halves doesn't contain that.

    Args:
        measure: the numbers of the images at these places.
        labels: (N,) classes of the images.
        resamples: halves.
    """
    values = np.array([measure(half) for half in halves(labels, resamples)])
    return values.std(axis=0, ddof=1).tolist()
