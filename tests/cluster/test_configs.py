from pathlib import Path

from cluster.submit import plan_pipeline

ROOT = Path(__file__).parents[2]


def test_the_example_of_a_pipeline_hands_on_its_folders():
    file, cluster = (ROOT / "configs" / name for name in ("pipeline/imagenet256.yaml", "cluster/h100.yaml"))
    _, (prepare, train, sample, evaluate) = plan_pipeline([str(file)], str(cluster))
    assert train.config.data.path == prepare.config.out_dir and train.config.vae == prepare.config.vae
    assert sample.config.model == train.config.run_dir and evaluate.config.samples == sample.config.out_dir
    assert (prepare.cluster.array, train.cluster.nodes, evaluate.cluster.tasks) == (8, 2, 1)
