"""The formulas against independent implementations and known answers."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_fid as fidelity
from sklearn.neighbors import NearestNeighbors

from flowar.evaluation.metrics import (
    Frechet,
    Statistics,
    adm_inception_score,
    frechet_of_few,
    groups,
    jackknife_error,
    kid,
    normal_interval,
    precision_recall,
    statistics,
    statistics_without,
    wilson_interval,
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


def test_leaving_out_groups_gives_the_standard_error_of_a_mean():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    group = groups(torch.full((2000,), -1), 200)
    error = jackknife_error([values[group != number].mean().item() for number in range(200)])
    assert error == pytest.approx(values.std().item() / 2000**0.5, rel=0.1)


def test_groups_of_balanced_samples_are_balanced_so_classes_add_no_error():
    labels = torch.arange(500) % 10
    group = groups(labels, 50)
    assert all(sorted(labels[group == number].tolist()) == list(range(10)) for number in range(50))
    values = labels * 100.0 + torch.randn(500, generator=torch.Generator().manual_seed(0))
    within = (values - labels * 100.0).std().item() / 500**0.5
    error = jackknife_error([values[group != number].mean().item() for number in range(50)])
    assert error == pytest.approx(within, rel=0.25)
    few = groups(torch.arange(51), 50)  # one image of each class
    assert few.bincount().tolist() == [3] + [2] * 24


def test_statistics_without_a_group_equal_those_of_the_others():
    values, group = features(300, shift=100.0), groups(torch.arange(300) % 3, 20)
    for number, found in enumerate(statistics_without(values, group)):
        needed = statistics(values[group != number])
        np.testing.assert_allclose(found.mu, needed.mu, rtol=1e-12)
        np.testing.assert_allclose(found.sigma, needed.sigma, rtol=1e-9, atol=1e-9)
    assert number == 19


def test_intervals_of_shares_are_valid_at_the_ends_too():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # a textbook's
    low, high = wilson_interval(1.0, 100)
    assert 0.95 < low < 0.97 and high == pytest.approx(1)


def test_intervals_of_fid_cover_its_mean_over_seeds_and_are_not_much_too_wide():
    """For many sets of Gaussian samples, about 95% of the 95% intervals must contain the mean FID."""
    reference = Frechet(statistics(features(5000, seed=100)))
    values, errors = [], []
    for seed in range(40):
        own = features(400, seed=seed, shift=0.3)
        group = groups(torch.zeros(len(own)), 50)
        values.append(reference.distance(statistics(own)))
        errors.append(jackknife_error([reference.distance(rest) for rest in statistics_without(own, group)]))
    intervals = [normal_interval(*pair) for pair in zip(values, errors, strict=True)]
    covered = sum(low <= np.mean(values) <= high for low, high in intervals)
    assert 34 <= covered <= 40  # 38 expected; 3 sigma are 4
    assert 0.7 < np.mean(errors) / np.std(values, ddof=1) < 1.5
