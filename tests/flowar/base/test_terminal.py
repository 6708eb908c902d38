"""Words of users and of files reach a terminal as they are: brackets in them are no markup and no format."""

import json

import pytest

from data_prep.progress import PrepareProgress
from flowar import doctor, evaluate, sweep
from flowar.base.errors import UserError
from flowar.base.leases import Leases
from flowar.base.terminal import plain_console
from flowar.config.data import DataConfig
from flowar.config.jobs import DoctorConfig
from flowar.evaluation.store import take_chunks
from flowar.latents.shards import LatentShards
from tests.conftest import upload
from tests.flowar.test_doctor import nodes

HOSTILE = ["[/x]", "{x}", "[red]", ":smile:", "[link=a]b", "\\[/x]", "{task.no}"]


def evaluation(word):
    metric = {"value": 1.0, "low": 0.5, "high": 1.5, "note": word}
    about = {"num_samples": 3, "protocol": "adm", "extractor": {"name": word}}
    return about | {"reference": word, "notes": [word], "metrics": {"fid": metric}}


def show_features(word, folder):
    with Leases(folder, 60) as leases:
        left = [0]
        for chunk in take_chunks(leases, lambda: list(left), word, 1):
            left.remove(chunk)


def show_sweep(word, folder):
    row = {"name": word, "num_images": 3, "fid": 1.0, "interval": None, "gflops": 1.0, "pareto": True}
    plain_console(width=200).print(sweep.sweep_table([row], word))


def show_nodes(word, folder):
    with pytest.raises(UserError, match="nodes are not fit"):
        doctor.report([node | {"damaged": [word]} for node in nodes()], DoctorConfig(run_dir=str(folder.parent)))


def show_holder(word, folder):
    """Who holds a chunk, as its claim says."""
    with Leases(folder, 60) as leases:
        (folder / "000000.0").write_text(json.dumps({"host": word, "pid": 3}))
        with PrepareProgress(1, 1, 0) as progress:
            progress.wait_for([leases.holder("000000")])


PLACES = {
    "the table of evaluate": lambda word, _: plain_console(width=200).print(
        evaluate.evaluation_table(evaluation(word))
    ),
    "the bar of evaluate": show_features,
    "the table of sweep": show_sweep,
    "the findings of doctor": show_nodes,
    "the holders of prepare": show_holder,
}


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("place", PLACES)
def test_words_are_printed_as_they_are(tmp_path, capsys, monkeypatch, place, word):
    monkeypatch.setenv("COLUMNS", "200")
    PLACES[place](word, tmp_path / "claims")
    assert word in capsys.readouterr().out


def test_a_dataset_is_fetched_from_an_address_with_any_brackets(bucket, shards, tmp_path):
    address = upload(bucket, shards, "in [/x] {x}")
    remote = LatentShards(DataConfig(path=address, cache=str(tmp_path)))
    remote.fetch_all()
    assert len(remote.read([0, 1])) == 2
