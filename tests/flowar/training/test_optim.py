import pytest

from flowar.config.training import OptimConfig
from flowar.models.flowar import family
from flowar.models.flowar.model import FlowAR
from flowar.training.optim import learning_rate, make_optimizer, set_learning_rate
from tests.conftest import tiny_config

SCHEDULE = {"num_steps": 100, "warmup_steps": 20, "lr": 4e-4, "min_lr": 1e-5}


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    assert learning_rate(0, **SCHEDULE) == 0
    assert learning_rate(10, **SCHEDULE) == pytest.approx(2e-4)
    assert learning_rate(20, **SCHEDULE) == pytest.approx(4e-4)
    assert learning_rate(60, **SCHEDULE) == pytest.approx((4e-4 + 1e-5) / 2)
    assert learning_rate(100, **SCHEDULE) == pytest.approx(1e-5)
    rates = [learning_rate(step, **SCHEDULE) for step in range(101)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, **(SCHEDULE | {"warmup_steps": 0})) == 4e-4


def test_matrices_decay_and_vectors_do_not():
    model = FlowAR(tiny_config(flow_block="attn_cross_mlp"))
    decayed, others = make_optimizer(model, family, OptimConfig()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.02, 0.0)
    vectors = {id(p) for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert {id(p) for p in others["params"]} == vectors
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_setting_the_rate_reaches_every_group():
    optimizer = make_optimizer(FlowAR(tiny_config()), family, OptimConfig())
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("decay_flow", [True, False])
def test_decay_of_the_flow_transformer_is_a_choice(decay_flow):
    model = FlowAR(tiny_config())
    decayed = {
        id(p) for p in make_optimizer(model, family, OptimConfig(decay_flow=decay_flow)).param_groups[0]["params"]
    }
    for name, parameter in model.named_parameters():
        wanted = parameter.ndim > 1 and (decay_flow or not name.startswith("flow."))
        assert (id(parameter) in decayed) == wanted, name
