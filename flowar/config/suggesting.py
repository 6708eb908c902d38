"""Settings of `flowar suggest`: a training that fits a dataset and this machine."""

from dataclasses import dataclass, field

from flowar.base.errors import UserError
from flowar.config.data import DataConfig
from flowar.config.load import free


@dataclass(frozen=True, kw_only=True)
class SuggestConfig:
    """A dataset -> a commented YAML for `flowar train`."""

    data: DataConfig = field(default_factory=DataConfig)  # the dataset
    file: str | None = free(None)  # YAML file to write, which must not exist; None: print it
    run_dir: str | None = None  # run_dir of the run; None: runs/ and the dataset's name
    variant: str | None = None  # model variant, such as flowar-xs; None: by the number of images and the device
    vae_weights: str | None = None  # vae.weights, for VAEs whose weights are one file
    minutes: float | None = None  # minutes of training; None: 15 on a CPU, a day on a GPU
    gpus: int = 1  # GPUs that will train; unused on a CPU
    device: str = free("auto")  # what is measured. auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"minutes={self.minutes} must be above 0")
        if self.gpus < 1:
            raise UserError(f"gpus={self.gpus} must be at least 1")
