import torch

from flowar.ema import EMA


def test_averages_follow_the_closed_form():
    model = torch.nn.Linear(3, 3)
    start = model.weight.detach().clone()
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(5):
        ema.update(model)
    torch.testing.assert_close(ema.averages["weight"], start + 1 - 0.9**5)


def test_averages_of_low_precision_weights_are_float32():
    model = torch.nn.Linear(3, 3).bfloat16()
    ema = EMA(model, decay=0.9999)
    with torch.no_grad():
        model.weight.add_(1)
    before = ema.averages["weight"].clone()
    ema.update(model)
    assert ema.averages["weight"].dtype == torch.float32
    assert (ema.averages["weight"] > before).all()  # a step that bfloat16 would round away


def test_state_goes_round_and_into_a_model():
    model, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    ema, copied = EMA(model, 0.9), EMA(other, 0.9)
    copied.load_state_dict(ema.state_dict())
    copied.copy_to(other)
    assert torch.equal(model.weight, other.weight)
    with torch.no_grad():
        model.weight.zero_()
    assert ema.averages["weight"].abs().sum() > 0  # averages are no views of the weights
