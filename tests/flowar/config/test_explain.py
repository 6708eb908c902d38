"""Help: every setting says what it is, from the comment beside its field."""

import pytest

from flowar.cli import VERBS, explain_setting
from flowar.config.explain import COLUMNS, describe_settings, explain


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_says_what_it_is_and_fits_a_narrow_terminal(verb):
    settings = explain(VERBS[verb].schema)
    assert [setting.key for setting in settings if not setting.text] == []
    assert len({setting.key for setting in settings}) == len(settings)
    lines = describe_settings(settings).splitlines()
    assert [line for line in lines if len(line) > COLUMNS and " " in line.strip()] == []


def test_a_setting_is_explained_with_its_default_its_choices_and_the_verbs_that_have_it():
    text = " ".join(explain_setting("solver").split())
    assert "solver=euler of the flow's ODE" in text and "one of euler, heun, midpoint" in text
    assert "in sample" in text and "preview.solver=" in text
    micro = " ".join(explain_setting("micro_batch_size").split())
    assert "null: its whole share of the batch" in micro and "[a whole number, or null]" in micro
    assert "run_dir=... (has to be given)" in explain_setting("run_dir")
    assert "init.model=null" in explain_setting("init") and "init.weights=ema" in explain_setting("init")
    assert explain_setting("optim.lrr") == "optim.lrr is not a setting; did you mean optim.lr?"
