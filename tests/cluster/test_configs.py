from pathlib import Path

from cluster.submit import plan_pipeline
from flowar.config.jobs import FollowConfig
from flowar.config.load import load_config
from flowar.config.measuring import SweepConfig
from flowar.sweep import list_settings, plan_rounds

ROOT = Path(__file__).parents[2]


def test_the_example_pipeline_passes_its_folders_on():
    file, cluster = (ROOT / "configs" / name for name in ("pipeline/imagenet256.yaml", "cluster/h100.yaml"))
    _, (prepare, train, sample, evaluate) = plan_pipeline([str(file)], str(cluster))
    assert train.config.data.path == prepare.config.out_dir and train.config.vae == prepare.config.vae
    assert sample.config.model == train.config.run_dir and evaluate.config.samples == sample.config.out_dir
    assert (prepare.cluster.array, train.cluster.nodes, evaluate.cluster.tasks) == (8, 2, 8)


def test_the_examples_for_following_and_sweeping_match_their_headers():
    following = load_config(FollowConfig, ROOT / "configs" / "follow" / "imagenet256.yaml")
    assert (following.every_steps, following.num_images, following.milestone_images) == (10_000, 10_000, 50_000)
    assert following.evaluate.sample.features_only
    sweeping = load_config(SweepConfig, ROOT / "configs" / "sweep" / "flowar_l.yaml")
    settings = list_settings(sweeping)
    assert plan_rounds(len(settings), sweeping) == [(60, 5_000), (15, 10_000), (4, 50_000)]
