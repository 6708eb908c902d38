"""`flowar watch`: a page that follows a training run."""

import shutil
import subprocess
import sys
from datetime import timedelta

import pytest

from flowar import train, watch
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest
from flowar.cli import main
from flowar.config.training import PreviewConfig
from flowar.config.watching import WatchConfig
from flowar.training.report import record_evaluation
from flowar.training.run_view import choose_steps, view_run
from flowar.training.watch_page import show_duration
from tests.browser import check_page
from tests.conftest import training

HOSTILE = "<script>alert(1)<"  # a folder's name can't have a slash


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A finished run of two starts, in a folder with a hostile name."""
    run_dir = tmp_path_factory.mktemp("watched") / HOSTILE
    preview = PreviewConfig(every_steps=6, num_images=4, num_steps=2, guidance=1.0)
    for epochs in (2, 6):
        train.main(training(shards, run_dir, epochs=epochs, log_every_steps=1, preview=preview))
    return run_dir


@pytest.fixture
def copy(run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns(watch.WATCH_FILE))


def test_the_page_shows_curves_by_scale_restarts_checkpoint_and_growing_samples(run, browser, capsys):
    main(["watch", str(run), "--once"])
    page = run / watch.WATCH_FILE
    assert f"open {page}" in capsys.readouterr().out
    view = view_run(run)
    assert view.num_steps == 18 and [start.after_step for start in view.starts] == [0, 6]
    assert [picture.step for picture in view.film] == [6, 12, 18] and view.newest.step == 18
    assert view.film[0].size == (2 * (2 + 2 * 34), 2 * (2 + 34))  # the first row of a grid of two classes, doubled
    assert view.newest.size == (2 * (2 + 2 * 34), 2 * (2 + 2 * 34))
    text = page.read_text()
    for word in (
        "scale 1",
        "scale 2",
        "scale 8",
        "total, weighted",
        "Images per second",
        "since the newest checkpoint",
    ):
        assert word in text
    assert 'http-equiv="refresh"' not in text and text.count('class="mark"') == 4  # one restart, four charts
    check_page(browser, page, names=(HOSTILE, "finished"), num_images=4)


def test_the_fids_of_its_checkpoints_are_a_curve_for_each_way_to_measure(copy, browser):
    for step, num_samples, fid in ((6, 100, 9.0), (12, 100, 4.0), (12, 5000, 3.0), (18, 5000, float("nan"))):
        values = {"step": step, "num_samples": num_samples, "protocol": "adm", "samples": "s"}
        record_evaluation(copy, values | {"reference": f"refs/{HOSTILE}"} | ({"fid": fid} if fid == fid else {}))
    ways = [f"adm, {num_samples} samples, against {HOSTILE}" for num_samples in (100, 5000)]
    measured = view_run(copy).measured
    assert [tuple(each) for each in measured] == [(6, 9.0, ways[0]), (12, 3.0, ways[1]), (12, 4.0, ways[0])]
    watch.main(WatchConfig(run_dir=str(copy), once=True))
    check_page(browser, copy / watch.WATCH_FILE, names=("FID of checkpoints", *ways))
    file = next((copy / "evaluations").glob("*.json"))
    file.write_text(file.read_text().replace("adm", "mda"))
    with pytest.raises(UserError, match="is damaged .* remove it and evaluate those samples again"):
        view_run(copy)


def test_a_run_is_looked_at_until_it_is_finished_and_a_bad_look_keeps_the_page(copy, monkeypatch, capsys):
    last, metrics = find_latest(copy), copy / "metrics.jsonl"
    hidden, whole, pages = last.rename(copy / last.name), metrics.read_text(), []

    def change_the_run(seconds):
        pages.append((seconds, (copy / watch.WATCH_FILE).read_text()))
        if len(pages) == 1:
            metrics.write_text(whole + '{"step": "x"}\n')
        else:
            metrics.write_text(whole)
            hidden.rename(last)

    monkeypatch.setattr(watch.time, "sleep", change_the_run)
    watch.main(WatchConfig(run_dir=str(copy), every_s=7))
    assert len(pages) == 2 and pages[0] == pages[1]
    assert pages[0][0] == 7 and '<meta http-equiv="refresh" content="7">' in pages[0][1]
    assert ">training</span>" in pages[0][1] and ">finished</span>" in (copy / watch.WATCH_FILE).read_text()
    printed = capsys.readouterr().out
    assert "not updated: " in printed and "metrics.jsonl is damaged in line 19" in printed


def test_a_finished_run_without_its_last_preview_is_looked_at_once_more(copy, monkeypatch):
    """It is drawn after the last checkpoint; where there will be none, the second look ends the watching."""
    last = copy / "previews" / "step_00000018.png"
    hidden, pages = last.rename(copy / last.name), []

    def sleep(seconds):
        pages.append((copy / watch.WATCH_FILE).read_text())
        if len(pages) == 1:
            hidden.rename(last)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    for number in (1, 2):
        watch.main(WatchConfig(run_dir=str(copy)))
        page = (copy / watch.WATCH_FILE).read_text()
        assert len(pages) == number and "refresh" in pages[-1] and "refresh" not in page
        assert ("Samples after step 18" in page) == (number == 1) and "Samples after step 18" not in pages[-1]
        last.unlink(missing_ok=True)


def test_what_is_half_written_foreign_or_damaged_doesnt_end_the_watching(copy, browser):
    """A preview that can't be read is named on the page; a start that is being written will count at the next look."""
    with (copy / "history.jsonl").open("a") as history:
        history.write('{"after_step": 18, "ti')
    (copy / "previews" / "step_00000012.png").write_bytes(b"not a picture")
    (copy / "previews" / "step_<script>.png").write_bytes(b"neither")
    watch.main(WatchConfig(run_dir=str(copy), once=True))
    view = view_run(copy)
    assert len(view.starts) == 2 and [picture.step for picture in view.film] == [6, 18]
    assert len(view.notes) == 1 and "step_00000012.png can't be read as a PNG; is it damaged?" in view.notes[0]
    check_page(browser, copy / watch.WATCH_FILE, names=(view.notes[0],), num_images=3)


def test_a_run_before_its_first_record_has_a_page_too(copy, browser):
    (copy / "metrics.jsonl").unlink()
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    shutil.rmtree(copy / "previews")
    watch.main(WatchConfig(run_dir=str(copy), once=True))
    check_page(browser, copy / watch.WATCH_FILE, names=("no values yet", "checkpoint yet"), num_images=0)


def test_what_cant_be_watched_or_written_is_one_clear_error(copy, tmp_path):
    for settings, message in (
        ({"run_dir": str(tmp_path)}, "is not the folder of a training run; start `flowar train` there first"),
        ({"file": str(tmp_path / "none" / "a.html")}, "none does not exist; make it, or give another file"),
        ({"file": str(copy / "config.yaml")}, "config.yaml must end in .html, as what is there is written over"),
        ({"every_s": 0.5}, "every_s=0.5 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            watch.main(WatchConfig(**{"run_dir": str(copy), "once": True} | settings))
    (tmp_path / "a.html").mkdir()
    with pytest.raises(UserError, match=r"can't write .*a.html: Is a directory; free some space, or give another file"):
        watch.main(WatchConfig(run_dir=str(copy), file=str(tmp_path / "a.html"), once=True))
    (copy / "history.jsonl").rename(copy / "history")
    (copy / "history.jsonl").mkdir()
    with pytest.raises(UserError, match=r"can't read .*history.jsonl: Is a directory; check its storage and its perm"):
        watch.main(WatchConfig(run_dir=str(copy), once=True))
    (copy / "history.jsonl").rmdir()
    (copy / "history.jsonl").write_text((copy / "history").read_text() + "[]\n")
    with pytest.raises(UserError, match=r"history.jsonl is damaged in line 3 \(TypeError.*or remove that line"):
        watch.main(WatchConfig(run_dir=str(copy), once=True))


def test_a_dry_run_writes_nothing_and_another_file_may_be_named(copy, tmp_path, capsys):
    main(["watch", str(copy), "--dry-run"])
    assert f"would write {copy / watch.WATCH_FILE}" in capsys.readouterr().out
    assert not (copy / watch.WATCH_FILE).exists()
    main(["watch", str(copy), f"file={tmp_path / 'a.html'}", "once=true"])
    assert "finished" in (tmp_path / "a.html").read_text() and not (copy / watch.WATCH_FILE).exists()


def test_watching_needs_no_torch(copy):
    code = "import sys, flowar.cli; flowar.cli.main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "watch", str(copy), "--once"], check=True)
    assert (copy / watch.WATCH_FILE).exists()


def test_the_film_has_the_first_the_last_and_steps_between():
    steps = dict.fromkeys(range(10, 310, 10))
    assert choose_steps({}) == [] and choose_steps({5: None}) == [5]
    assert choose_steps(steps) == [10, 50, 90, 130, 180, 220, 260, 300]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3725, "1 h 2 min"), (180000, "2 d 2 h")]
)
def test_durations_have_two_units_at_most(seconds, shown):
    assert show_duration(timedelta(seconds=seconds)) == shown
