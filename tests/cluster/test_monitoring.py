import json
import re

from cluster.monitoring import GAUGES, StatusRow, as_json, as_prometheus
from cluster.runs import RunCells
from cluster.status import status, status_rows
from flowar.train import main
from tests.conftest import training

# One sample line of Prometheus' text exposition format: name, labels with escaped values, a number.
LINE = re.compile(r'[a-z_]+\{([a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)*\} [-+.0-9e]+')


def test_numbers_of_a_run_are_those_of_its_records(shards, tmp_path, capsys):
    main(training(shards, tmp_path / "run", epochs=1))
    capsys.readouterr()
    status([str(tmp_path / "run"), "--json"])
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (run["run"], run["verb"], run["state"]) == ("run", "train", "FINISHED")
    assert run["step"] == run["num_steps"] == run["checkpoint_step"] == last["step"] and run["loss"] == last["loss"]
    status([str(tmp_path / "run"), "--prometheus"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("#") and not LINE.fullmatch(line)] == []
    assert sum('state="FINISHED"} 1' in line for line in lines) == 1
    for name in set(GAUGES) - {"restarts"}:
        assert f"# TYPE flowar_{name} gauge" in lines
    assert status_rows([tmp_path / "run"])[0][0].run_dir == tmp_path / "run"


def test_odd_names_stay_one_label():
    row = StatusRow('a"b\\c\nd', "7", "sample", "RUNNING", "n1", RunCells(), 2, None)
    lines = as_prometheus([row]).splitlines()
    assert 'flowar_restarts{run="a\\"b\\\\c\\nd",folder="",job="7",verb="sample"} 2.0' in lines
    assert all(line.startswith("#") or LINE.fullmatch(line) for line in lines)
    assert json.loads(as_json([row], ["note"]))["runs"][0]["restarts"] == 2
