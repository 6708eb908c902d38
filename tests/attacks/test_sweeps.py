"""Sweeps whose settings, scores, results or reference were damaged or swapped."""

import shutil

import pytest

from flowar import sweep
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from tests.attacks.measured import NUM, sweeping
from tests.attacks.test_samples import cut, rewrite


@pytest.fixture(scope="module")
def root(measurable):
    """The objects that are measured."""
    return measurable


@pytest.fixture(scope="module")
def swept(root):
    sweep.main(sweeping(root, root / "swept"))
    return root / "swept"


def score_file(folder, place):
    return sorted(folder.glob(f"settings/*/score_{NUM}.json"))[place]


SWEEPS = {
    "half the settings": (lambda d: cut(d / "config.json"), "config.json is damaged"),
    "no settings": (lambda d: (d / "config.json").unlink(), "belongs to a sweep, but .*config.json, .* is missing"),
    "edited settings": (lambda d: rewrite(d / "config.json", '"seed": 0', '"seed": 3'), "config.json is damaged"),
    "half the results": (lambda d: cut(d / "sweep.json"), "sweep.json is damaged .*; delete it and run the same"),
    "half a score": (lambda d: cut(score_file(d, 0)), f"score_{NUM}.json is damaged .*; delete it and run the same"),
    "an edited score": (lambda d: rewrite(score_file(d, 0), '"fid": ', '"fid": 1'), f"score_{NUM}.json is damaged"),
    "a score of nothing": (lambda d: score_file(d, 0).write_text("{}"), f"score_{NUM}.json is damaged"),
    "another's score": (
        lambda d: shutil.copy(score_file(d, 1), score_file(d, 0)), f"score_{NUM}.json is for other images: setting is",
    ),
    "half the reference": (lambda d: cut(d / "reference.json"), "reference.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("attack", SWEEPS)
def test_a_damaged_sweep_is_named(root, swept, tmp_path, attack):
    shutil.copytree(swept, tmp_path / "swept", ignore=shutil.ignore_patterns("models"))
    (tmp_path / "swept" / "models").symlink_to(swept / "models")
    damage, message = SWEEPS[attack]
    damage(tmp_path / "swept")
    with pytest.raises(UserError, match=message):
        sweep.main(sweeping(root, tmp_path / "swept"))


def test_another_reference_at_the_same_place_is_noticed(root, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "swept")
    reference = shutil.copytree(root / "ref_real", tmp_path / "ref")
    record = read_record(tmp_path / "swept" / "config.json", "") | {"reference": str(reference)}
    write_record(tmp_path / "swept" / "config.json", record)
    config = sweeping(root, tmp_path / "swept", reference=str(reference))
    sweep.main(config)
    shutil.rmtree(reference)
    shutil.copytree(root / "ref_others", reference)
    with pytest.raises(UserError, match="has other statistics than at the start of this sweep"):
        sweep.main(config)
