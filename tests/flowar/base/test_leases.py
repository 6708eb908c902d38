import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from flowar.base.leases import WATCHED, Leases, _holder_is_gone, claim_name, claimed_chunks, finish_together

SHORT_S, LONG_S = 0.6, 2
PATIENCE_S = 600  # for what is sure to come


@pytest.fixture
def two(tmp_path):
    with Leases(tmp_path, SHORT_S) as ours, Leases(tmp_path, SHORT_S) as theirs:
        yield ours, theirs


def from_another_machine(folder, name):
    """Make a claim look as if a process of another machine had left it."""
    path = folder / f"{name}.0"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "elsewhere"}))


def test_a_claim_has_one_holder_until_it_is_given_up(two):
    ours, theirs = two
    assert ours.claim("a") and not theirs.claim("a") and theirs.claim("b")
    assert ours.is_mine("a")
    ours.release("a")
    time.sleep(SHORT_S / 4)  # a claim just seen alive is not read again
    assert theirs.claim("a") and not ours.claim("a")


def test_a_living_holder_keeps_its_claim_for_longer_than_a_lease(tmp_path):
    """Shown to others by twelve beats, six of which are a lease; a lease is long, as a busy machine delays a beat."""
    with Leases(tmp_path, LONG_S) as ours, Leases(tmp_path, LONG_S) as theirs:
        assert ours.claim("a")
        beats = set()
        while len(beats) < 12:
            assert not theirs.claim("a")
            beats.add((tmp_path / "a.0").read_text())
            time.sleep(0.05)


def test_a_holder_that_is_silent_for_a_lease_loses_its_claim_and_learns_of_it(tmp_path):
    silent = Leases(tmp_path, SHORT_S)  # no context: nothing keeps it alive
    assert silent.claim("a")
    from_another_machine(tmp_path, "a")
    with Leases(tmp_path, SHORT_S) as ours:
        began = time.monotonic()
        while not ours.claim("a"):
            time.sleep(0.02)
        assert time.monotonic() - began > SHORT_S  # the least that it waits, on any machine
        assert ours.is_mine("a") and not silent.is_mine("a")
        assert not Leases(tmp_path, SHORT_S).claim("a")
    with Leases(tmp_path, SHORT_S) as next_one:
        assert next_one.claim("a")  # given up when the last one left
        assert not silent.is_mine("a")


def hold(folder, ready):
    with Leases(folder, 600) as leases:
        leases.claim("a")
        ready.set()
        time.sleep(600)


def test_a_killed_process_of_this_machine_loses_its_claim_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(PATIENCE_S)
    with Leases(tmp_path, 600) as ours:
        assert not ours.claim("a")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with Leases(tmp_path, 600) as other:
            assert other.claim("a")
            assert not ours.claim("a")


def race(folder, barrier, won):
    with Leases(folder, PATIENCE_S) as leases:
        barrier.wait()
        for number in range(200):
            if leases.claim(str(number)):
                won.put(number)
        barrier.wait()  # nobody gives up before all have tried


def test_of_many_processes_one_gets_each_claim(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path, barrier, won)) for _ in range(4)]
    for process in processes:
        process.start()
    numbers = sorted(won.get(timeout=PATIENCE_S) for _ in range(200))
    for process in processes:
        process.join()
    assert numbers == list(range(200)) and won.empty()


def test_the_holder_is_named(two):
    ours, _ = two
    ours.claim("a")
    assert ours.holder("a").endswith(f"process {os.getpid()}") and ours.holder("b") == "nobody"


def test_a_dead_finisher_of_another_machine_is_replaced_and_all_wait_until_it_is_done(tmp_path):
    claims, done = tmp_path / "claims", tmp_path / "done"
    claims.mkdir()
    assert Leases(claims, SHORT_S).claim("finish")  # no context: it is dead
    from_another_machine(claims, "finish")
    with Leases(claims, SHORT_S) as ours:
        began = time.monotonic()
        assert finish_together(ours, done.exists, done.touch)
        assert time.monotonic() - began > SHORT_S and done.exists() and not claims.exists()
        assert not finish_together(ours, done.exists, done.unlink)  # nothing to do any more
    with Leases(claims, SHORT_S) as failing, pytest.raises(ZeroDivisionError):
        finish_together(failing, lambda: False, lambda: 1 / 0)


def test_a_claim_that_a_dead_holder_left_empty_is_taken_over_by_one_who_looks_anew_each_time(tmp_path):
    """Killed between making the file and writing into it; a sweep makes new `Leases` for each look."""
    (tmp_path / "a.0").touch()
    deadline, is_mine = time.monotonic() + PATIENCE_S, False
    while not is_mine:
        assert time.monotonic() < deadline
        with Leases(tmp_path, SHORT_S) as ours:
            is_mine = ours.claim("a")
        time.sleep(SHORT_S / 20)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"5", b"\xff\xfe", b'{"machine": 1.5}'])
def test_a_damaged_claim_is_of_nobody_who_is_known_to_be_dead(content):
    assert not _holder_is_gone(content.decode(errors="replace"))


def test_looking_at_a_hundred_held_chunks_costs_one_listing_and_a_few_reads(tmp_path, monkeypatch):
    chunks = list(range(100))
    with Leases(tmp_path, PATIENCE_S) as theirs, Leases(tmp_path, PATIENCE_S) as ours:
        assert all(theirs.claim(claim_name(chunk)) for chunk in chunks)
        listed, opened = [], []
        scandir, read_text = os.scandir, Path.read_text
        monkeypatch.setattr("os.scandir", lambda path: listed.append(path) or scandir(path))
        monkeypatch.setattr(Path, "read_text", lambda path, **how: opened.append(path) or read_text(path, **how))
        assert list(claimed_chunks(ours, lambda: chunks, wait=False)) == []
        assert len(listed) == 1 and len(opened) == WATCHED


def test_what_others_did_is_known_by_the_claims_and_looked_at_once_more_in_the_end(tmp_path, monkeypatch):
    """Chunk 2 is said to be done from before, but isn't there."""
    monkeypatch.setattr("random.randrange", lambda count: 0)
    there, looked = set(), []

    def missing():
        looked.append(set(there))
        return sorted({0, 1, 2} - there)

    with Leases(tmp_path, PATIENCE_S) as theirs, Leases(tmp_path, PATIENCE_S) as ours:
        assert theirs.claim(claim_name(2))
        theirs.finish(claim_name(2))
        done = []
        for chunk in claimed_chunks(ours, missing, is_missing=lambda chunk: chunk not in there):
            done.append(chunk)
            there.add(chunk)
            ours.finish(claim_name(chunk))
            if 1 not in there and theirs.claim(claim_name(1)):
                there.add(1)
                theirs.finish(claim_name(1))
        assert sorted(done) == [0, 2] and looked == [set(), {0, 1, 2}]


def finish_slowly(folder, number, left, may_end):
    def finish():
        assert may_end.wait(PATIENCE_S)
        (folder / "done").touch()

    with Leases(folder / "claims", PATIENCE_S) as leases:
        left.put((number, finish_together(leases, (folder / "done").exists, finish, wait=False)))


def test_whoever_finds_another_one_finishing_leaves(tmp_path):
    context = multiprocessing.get_context("spawn")
    left, may_end = context.Queue(), context.Event()
    processes = [context.Process(target=finish_slowly, args=(tmp_path, i, left, may_end)) for i in range(4)]
    for process in processes:
        process.start()
    early = [left.get(timeout=PATIENCE_S) for _ in range(3)]
    assert not (tmp_path / "done").exists() and not any(has_finished for _, has_finished in early)
    may_end.set()
    assert left.get(timeout=PATIENCE_S)[1]
    for process in processes:
        process.join()
