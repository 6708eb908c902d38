"""`flowar sample`: draw images with any number of processes together. No metrics.

Read next: sampling/job.py for what is drawn, sampling/worker.py for how processes share it.
"""

from pathlib import Path

from flowar.config.drawing import SampleConfig
from flowar.sampling.gallery import save_gallery
from flowar.sampling.images import ImageSink
from flowar.sampling.job import SamplingJob, open_job
from flowar.sampling.worker import Sink, draw_samples


def main(config: SampleConfig, dry_run: bool = False) -> None:
    """Draw the missing images, together with all other processes that run the same command.

    Image i depends only on the settings and i.
    """
    if not config.preview:
        draw_samples(config, open_feature_sink if config.features_only else ImageSink, dry_run)
        return
    job = open_job(config)
    folder = Path(config.out_dir) / "preview"
    if not dry_run:
        save_gallery(config, job.model, job.vae, job.classes, folder)
    print(f"{'would write' if dry_run else 'wrote'} contact_sheet.png, growth.png and guidance.png in {folder}")


def open_feature_sink(job: SamplingJob) -> Sink:
    """Return the sink for features of a job's images."""
    from flowar.evaluation.extractors import Extractor  # torch-fidelity takes seconds to import
    from flowar.evaluation.store import FeatureSink

    return FeatureSink(job, Extractor(job.config.extractor, job.device))
