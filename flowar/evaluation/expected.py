"""What is published of the models' quality: the one table of these numbers. Read next: page.py, which shows them.

All are of ImageNet at 256 px, 50,000 images, against ADM's reference statistics. The paper's numbers and those that
others measured with the weights that its authors released differ by more than chance: what `flowar convert` gives can
be expected to come near to the second ones.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Numbers of one model from one source; a pair is the range of two measurements."""

    source: str
    metrics: dict[str, float | tuple[float, float]]  # by their names in metrics.json


PAPER_SOURCE = "paper, table 1"
MEASURED_SOURCE = "released weights, measured by others"
# The paper is arXiv:2412.15205, version 1. Others: table 1 of XYZFlow (S, L, H), and FD-loss (arXiv:2604.28190: H).
EXPECTED = {
    "flowar-s": (
        Published(PAPER_SOURCE, {"fid": 3.61, "inception_score": 234.1, "precision": 0.83, "recall": 0.50}),
        Published(MEASURED_SOURCE, {"fid": 3.70, "inception_score": 235.1, "precision": 0.81, "recall": 0.51}),
    ),
    "flowar-b": (  # no weights were released
        Published(PAPER_SOURCE, {"fid": 2.90, "inception_score": 272.5, "precision": 0.84, "recall": 0.54}),
    ),
    "flowar-l": (
        Published(PAPER_SOURCE, {"fid": 1.90, "inception_score": 281.4, "precision": 0.83, "recall": 0.57}),
        Published(MEASURED_SOURCE, {"fid": 1.87, "inception_score": 273.1, "precision": 0.80, "recall": 0.62}),
    ),
    "flowar-h": (
        Published(PAPER_SOURCE, {"fid": 1.65, "inception_score": 296.5, "precision": 0.83, "recall": 0.60}),
        Published(
            MEASURED_SOURCE,
            {"fid": (1.67, 1.68), "inception_score": (274.1, 276.3), "precision": 0.80, "recall": 0.62},
        ),
    ),
}
DECIMALS = {"inception_score": 1}  # as they are published; others have two


def show_published(metric: str, published: Published) -> str:
    """Return a source's value of a metric as text; nothing if it doesn't give one."""
    value = published.metrics.get(metric)
    if value is None:
        return ""
    decimals = DECIMALS.get(metric, 2)
    ends = value if isinstance(value, tuple) else (value,)
    return " to ".join(f"{end:.{decimals}f}" for end in ends)
