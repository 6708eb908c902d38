"""What `flowar doctor` finds on made-up nodes."""

import copy
import dataclasses
import json
import shutil
import types

import pytest
import torch
import torch.distributed as dist

from flowar.base.distributed import start_world, stop_world
from flowar.base.errors import UserError
from flowar.config.jobs import DoctorConfig
from flowar.doctor import far_gpu, find_problems, main, measure_pairs, report
from tests import processes
from tests.conftest import flip_bit

GPU = {"name": "H100", "total_gib": 80.0, "used_gib": 1.0, "ecc_errors": 0, "driver": "570"}


def nodes():
    """Four healthy nodes with two tasks each."""
    seen = {
        "versions": {"torch": "2.14", "NCCL": "2.30"},
        "gpus": [dict(GPU), dict(GPU)],
        "cpus": 8,
        "shm_gib": 100.0,
        "open_files": 65536,
        "write_mib_per_s": 1000.0,
        "create_ms": 1.0,
        "rename_ms": 1.0,
        "stat_ms": 1.0,
        "clock_s": 1e9,
        "far_gpu": "",
        "tflops": 50.0,
        "all_reduce_gb_per_s": 40.0,
        "damaged": [],
    }
    return [copy.deepcopy(seen) | {"node": f"n{rank // 2}", "rank": rank} for rank in range(8)]


def config(tmp_path, **changes):
    return DoctorConfig(run_dir=str(tmp_path), **changes)


def test_sound_nodes_are_fit(tmp_path, capsys):
    report(nodes(), config(tmp_path))
    assert "fit: n0, n1, n2, n3" in capsys.readouterr().out
    assert json.loads((tmp_path / "doctor.json").read_text())["problems"] == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": {"torch": "2.13", "NCCL": "2.30"}}, "torch is 2.13, elsewhere 2.14"),
        ({"gpus": [dict(GPU)]}, "1 GPUs, elsewhere 2"),
        ({"gpus": [dict(GPU), GPU | {"ecc_errors": 3}]}, "GPU 1 has 3 uncorrected memory errors"),
        ({"gpus": [dict(GPU), GPU | {"used_gib": 40.0}]}, "GPU 1 has 40.0 GiB in use by others"),
        ({"cpus": 1}, "1 CPUs per task, elsewhere 8"),
        ({"shm_gib": 0.06}, "0.06 GiB free in /dev/shm"),
        ({"open_files": 1024}, "ulimit -n is 1024"),
        ({"write_mib_per_s": 100.0}, "100, median 1e+03 MiB/s written"),
        ({"rename_ms": 500.0}, "it takes 500 ms to rename a file"),
        ({"create_ms": 500.0}, "it takes 500 ms to create a file"),
        ({"clock_s": 1e9 - 60}, "its clock is 60 s behind"),
        ({"far_gpu": "0000:3b:00.0"}, "rank 5 uses GPU 0000:3b:00.0 from another socket"),
        ({"tflops": 20.0}, "20, median 50 TFLOP/s"),
        ({"all_reduce_gb_per_s": 5.0}, "5, median 40 GB/s of all-reduces"),
        ({"damaged": ["shard.00003.mds"]}, "reads shard shard.00003.mds differently"),
    ],
)
def test_problems_of_a_node_are_printed_and_the_node_is_named_to_exclude(tmp_path, capsys, changes, expected):
    seen = nodes()
    seen[5] |= changes
    assert list(find_problems(seen, config(tmp_path))) == ["n2"]
    with pytest.raises(UserError, match=r"1 of 4 nodes are not fit; exclude them: cluster.exclude=n2$"):
        report(seen, config(tmp_path))
    assert f"n2: {expected}" in capsys.readouterr().out


def test_one_real_machine_is_examined(shards, tmp_path, capsys):
    settings = config(tmp_path / "run", data=str(shards), write_mib=4, min_open_files=1, min_shm_gib=0.0)
    main(settings)
    seen = json.loads((tmp_path / "run" / "doctor.json").read_text())["seen"]
    assert len(seen) == 1 and seen[0]["write_mib_per_s"] > 0 and seen[0]["tflops"] > 0
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["doctor.json"]
    data = shutil.copytree(shards, tmp_path / "data")
    flip_bit(next(data.glob("**/*.mds")), -10)
    with pytest.raises(UserError, match="1 of 1 nodes are not fit"):
        main(dataclasses.replace(settings, data=str(data)))
    assert "differently from what was written" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to run_dir=.*file/run: "):
        main(config(tmp_path / "file" / "run"))


@pytest.mark.parametrize(("cpus", "far"), [({0, 1}, ""), ({7, 8}, ""), ({4, 5}, "0000:3b:00.0")])
def test_a_gpu_of_another_socket_is_found(tmp_path, monkeypatch, cpus, far):
    where = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: where)
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0" / "local_cpulist").write_text("0-3,8\n")
    assert far_gpu(torch.device("cuda", 0), cpus, tmp_path) == far


def look_for_others(folder):
    """Write down the doctor's message when it waits for one second."""
    with pytest.raises(UserError) as refused:
        main(config(folder, timeout_s=1))
    (folder / "said").write_text(str(refused.value))


def test_a_node_that_never_starts_is_named_long_before_the_usual_timeout(tmp_path):
    """Rank 0 of two nodes waits in the rendezvous, which is also what its note says."""
    (tmp_path / ".doctor_1").mkdir()
    (tmp_path / ".doctor_1" / "rank_00003").write_text("of an earlier start")
    ranks = {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": processes.free_port()}
    nodes = {"FLOWAR_NODE": "n1", "FLOWAR_NODES": "n1,n2"}
    alone = processes.start(look_for_others, tmp_path, log=tmp_path / "log", environment=ranks | nodes)
    processes.join([alone], tmp_path / "log")
    assert (
        (tmp_path / "said")
        .read_text()
        .startswith(
            "rank 0 waited timeout_s=1 s for the others, or lost them; of 4 ranks: rank_00000 on n1 is waiting for the "
            "others to start; ranks 1 of n1 never started; ranks 2, 3 of n2 never started; exclude"
        )
    )


def measure_two_nodes(folder):
    """Measure the network between two simulated nodes of two ranks, and record the collectives."""
    world = start_world(torch.device("cpu"), with_group=True)
    calls = []
    for name in ("all_reduce", "batch_isend_irecv"):
        fine = getattr(dist, name)
        setattr(dist, name, lambda *given, name=name, fine=fine: calls.append(name) or fine(*given))
    speed = measure_pairs(world, f"node{world.rank // 2}", message_mib=1)
    (folder / str(world.rank)).write_text(json.dumps([calls, speed]))
    stop_world()


@pytest.mark.slow
def test_all_ranks_communicate_before_the_first_ranks_of_nodes_do_in_pairs(tmp_path):
    """Otherwise NCCL would wait forever, as its first call makes the communicator and needs all ranks for that."""
    processes.run_ranks(measure_two_nodes, tmp_path, world_size=4, log=tmp_path / "log")
    calls, speeds = zip(*(json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)), strict=True)
    assert all(of_rank[0] == "all_reduce" for of_rank in calls)
    assert ["batch_isend_irecv" in of_rank for of_rank in calls] == [True, False, True, False]
    assert min(speeds) > 0
