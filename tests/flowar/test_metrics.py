"""The formulas against independent implementations and known answers."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_fid as fidelity
from sklearn.neighbors import NearestNeighbors

from flowar.metrics import (
    Frechet,
    Interval,
    Statistics,
    adm_inception_score,
    bootstrap_errors,
    frechet_of_few,
    halves,
    kid,
    precision_recall,
    statistics,
)


def features(count, width=12, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mixing * scale + shift


def frechet_by_scipy(first, second):
    """The definition, by scipy's matrix root, as ADM's evaluator computes it."""
    mus = [x.double().mean(0).numpy() for x in (first, second)]
    sigmas = [np.cov(x.double().numpy(), rowvar=False) for x in (first, second)]
    root = scipy.linalg.sqrtm(sigmas[0] @ sigmas[1]).real
    return np.sum((mus[0] - mus[1]) ** 2) + np.trace(sigmas[0] + sigmas[1] - 2 * root)


def test_frechet_distance_equals_scipys_and_torch_fidelitys():
    first, second = features(500), features(400, seed=1, scale=1.3, shift=0.2)
    found = Frechet(statistics(second)).distance(statistics(first))
    assert found == pytest.approx(frechet_by_scipy(first, second), rel=1e-6)
    both = [{"mu": own.mu, "sigma": own.sigma} for own in (statistics(first), statistics(second))]
    theirs = fidelity.fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_two_known_gaussians():
    mu, std = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 3.0])
    standard = Statistics(np.zeros(3), np.eye(3))
    known = np.sum(mu**2) + np.sum((std - 1) ** 2)
    assert Frechet(standard).distance(Statistics(mu, np.diag(std**2))) == pytest.approx(known)
    assert Frechet(standard).distance(standard) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_images_than_features_needs_no_covariance():
    first, second = features(9, width=40), features(30, width=40, seed=1, shift=0.5)
    expected = Frechet(statistics(second)).distance(statistics(first))
    assert frechet_of_few(first, second) == pytest.approx(expected, rel=1e-5)


def test_statistics_are_numpys_in_double_precision():
    values = features(50_001, width=5, shift=1000.0)  # float32 sums would lose digits, and parts have to fit together
    found = statistics(values)
    np.testing.assert_allclose(found.mu, values.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(values.double().numpy(), rowvar=False), rtol=1e-9)


def test_adms_inception_score_is_the_mean_over_consecutive_parts():
    logits = torch.randn(11_000, 7, generator=torch.Generator().manual_seed(0)) * 3
    scores = []
    for start in (0, 5000, 10_000):
        p = scipy.special.softmax(logits[start : start + 5000].double().numpy(), axis=1)
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0, keepdims=True))), axis=1))))
    assert adm_inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-10)


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    labels = torch.arange(6000) % 10
    assert adm_inception_score(torch.nn.functional.one_hot(labels, 10).float() * 50) == pytest.approx(10, rel=1e-6)
    in_order = labels.sort().values  # what goes wrong with files that are sorted by class
    assert adm_inception_score(torch.nn.functional.one_hot(in_order, 10).float() * 50) < 9


def brute_force(samples, reference, k):
    """Precision and recall by sklearn's exact search, image by image."""

    def covered(points, centres):
        radii = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(centres).kneighbors(centres)[0][:, k]
        distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return (distances <= radii).any(axis=1).mean()

    samples, reference = samples.double().numpy(), reference.double().numpy()
    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_a_brute_force_search(k):
    samples, reference = features(300, shift=0.4), features(200, seed=1)
    assert precision_recall(samples, reference, k) == pytest.approx(brute_force(samples, reference, k), abs=1e-6)


def test_mode_collapse_lowers_recall_and_noise_lowers_precision():
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(10, 12, generator=generator) * 10
    real = modes[torch.arange(600) % 10] + torch.randn(600, 12, generator=generator)
    good = modes[torch.arange(600) % 10] + torch.randn(600, 12, generator=generator)
    collapsed = modes[torch.arange(600) % 3] + torch.randn(600, 12, generator=generator)
    noisy = good + 3 * torch.randn(600, 12, generator=generator)
    of_good, of_collapsed, of_noisy = (precision_recall(own, real) for own in (good, collapsed, noisy))
    assert of_collapsed[1] < 0.5 * of_good[1] and of_collapsed[0] > 0.9 * of_good[0]
    assert of_noisy[0] < 0.5 * of_good[0]


def test_kid_of_equal_distributions_is_near_zero_and_grows_with_distance():
    same, _ = kid(features(120), features(120, seed=1))
    far, std = kid(features(120, shift=2.0), features(120, seed=1))
    assert abs(same) < 0.1 * far and std > 0


def test_random_halves_give_the_standard_error_of_a_mean():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    nothing = torch.full((2000,), -1)
    error = bootstrap_errors(lambda half: [values[half].mean().item()], nothing, 400)[0]
    assert error == pytest.approx(values.std().item() / 2000**0.5, rel=0.1)
    assert all(len(set(half.tolist())) == 1000 for half in halves(nothing, 3))


def test_halves_of_balanced_samples_are_balanced_so_that_differences_of_classes_are_no_error():
    labels = torch.arange(200) % 10
    for half in halves(labels, 5):
        assert labels[half].bincount().tolist() == [10] * 10
    values = labels * 100.0 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    within = (values - labels * 100.0).std().item() / 200**0.5
    error = bootstrap_errors(lambda half: [values[half].mean().item()], labels, 400)[0]
    assert error == pytest.approx(within, rel=0.15)
    alone = halves(torch.arange(51), 3)  # one image of each class
    assert all(len(set(half.tolist())) == 25 for half in alone) and alone[0].tolist() != alone[1].tolist()


def test_intervals_of_fid_cover_its_mean_over_seeds():
    """Of many sets of Gaussian samples, the 95% interval of each has to contain the mean FID in about 95%."""
    reference = Frechet(statistics(features(5000, seed=100)))
    values, errors = [], []
    for seed in range(40):
        own = features(400, seed=seed, shift=0.3)

        def fid(places, own=own):
            return [reference.distance(statistics(own[places]))]

        values.append(fid(slice(None))[0])
        errors.append(bootstrap_errors(fid, torch.zeros(len(own)), 40)[0])
    mean = np.mean(values)
    covered = sum(Interval(*pair).low <= mean <= Interval(*pair).high for pair in zip(values, errors, strict=True))
    assert 34 <= covered <= 40  # 38 expected; 3 sigma are 4
