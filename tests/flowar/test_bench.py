"""`flowar bench` on tiny models: what it measures, and what it prints."""

import dataclasses

import pytest
import torch

from flowar import bench
from flowar.base.errors import UserError
from flowar.cli import main
from flowar.config.benching import BenchConfig
from flowar.config.models import MODEL_CONFIGS, variant_config
from flowar.models.build import FAMILIES
from flowar.models.flowar import baseline
from flowar.models.tally import PeakMemory
from tests import linear_family
from tests.conftest import tiny_config

CPU = torch.device("cpu")


def tiny(**settings):
    return BenchConfig(
        **({"model": tiny_config(), "batch_size": 2, "rounds": 2, "num_steps": 4, "device": "cpu"} | settings)
    )


@pytest.mark.parametrize("what", ["train", "sample", "attention"])
def test_model_and_baseline_are_measured_turn_by_turn(what):
    found = bench.measure(tiny(what=what), CPU)
    assert list(found) == ["model", "baseline"]
    for one in found.values():
        assert len(one.seconds) == 2 and min(one.seconds) > 0
        assert min(one.peak_bytes, one.operations, one.bytes, one.flops) > 0


def test_the_table_has_both_limits_and_the_ratio(capsys):
    main([
        "bench", "model.variant=flowar-demo", "depth=2", "batch_size=2", "rounds=1", "device=cpu", "profile=true"
    ])  # fmt: skip
    printed = capsys.readouterr().out
    for word in ("train: flowar-demo, 2 blocks each", "images/s", "MFU by useful FLOPs", "peak memory", "operations",
                 "limit by arithmetic", "limit by traffic", "times as fast as the baseline", "Self CPU"):  # fmt: skip
        assert word in printed, word


def test_a_shape_is_cut_to_few_blocks():
    cut = BenchConfig(model=variant_config("flowar-h"), depth=2).measured_model
    whole = variant_config("flowar-h")
    assert (cut.ar_depth, cut.flow_depth, cut.variant) == (2, 2, "custom")
    assert dataclasses.replace(cut, ar_depth=30, flow_depth=12, variant="flowar-h") == whole
    with pytest.raises(UserError, match=r"model.ar_depth=3 must be even"):
        _ = BenchConfig(depth=3).measured_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rounds": 0}, "rounds=0 must be at least 1"), ({"attention": "flash"}, "attention=flash needs precision=bf16")],
)
def test_settings_that_cannot_be_measured_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_a_family_without_baseline_is_measured_alone(monkeypatch):
    assert bench.baseline_of(tiny_config()) is baseline
    monkeypatch.setitem(FAMILIES, "linear", linear_family)
    monkeypatch.setitem(MODEL_CONFIGS, "linear", linear_family.LinearConfig)
    config = linear_family.LinearConfig()
    assert bench.baseline_of(config) is None
    assert list(bench.measure(tiny(model=config), CPU)) == ["model"]


def test_peak_memory_is_the_most_at_once():
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        second = first + 1  # two tensors at once
        view = second[:10]
        del first, second  # the second lives on in its view
        third = torch.zeros(500)
        del view, third
        third = torch.zeros(100)
    assert (memory.peak, memory.live) == (2 * 4000, 400)
    del third
    assert memory.live == 0
