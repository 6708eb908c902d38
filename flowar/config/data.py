"""Settings of datasets: the VAE, `flowar prepare`, `flowar check`, and how shards are read."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from flowar.base.errors import UserError
from flowar.config.load import free

Crop = Literal["center", "random", "ten_crop"]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Which tokenizer, and where its weights are."""

    # mar, ldm (VA-VAE and similar), sd-vae-ft-ema, sd-vae-ft-mse, dc-ae-f32c32, demo, pixels (no VAE), a folder written
    # by `flowar train-vae`, or diffusers' AutoencoderKL, -DC or -RAE as a folder or hub id
    name: str = "mar"
    weights: str | None = free(None)  # mar: the file kl16.ckpt; ldm: a state dict


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Which network gives the features that images are compared by, and where its weights are."""

    # One of torch-fidelity's networks; timm:NAME for a timm model; or own: a judge, that is a small classifier of the
    # dataset's classes, trained here
    name: str = "inception-v3-compat"
    # File of the weights; None: in torch hub's folder (TORCH_HOME), or fetched. own: the judge's file; None: next to
    # the reference
    weights: str | None = None
    other_weights: bool = False  # accept unpublished weights; the numbers are then not comparable
    # own: real images that train the judge, one sub-folder per class; None: those that the model was trained on, else
    # the reference
    images: str | None = free(None)
    flip: bool | None = free(None)  # own: also train the judge on mirror images; None: as the dataset was prepared


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Images -> moments in MDS shards."""

    images: str = MISSING  # folder with a sub-folder per class, folder or pattern of *.tar or *.parquet
    out_dir: str = free(MISSING)  # the dataset to write
    vae: VAEConfig = field(default_factory=VAEConfig)  # that encodes them
    image_size: int = 256  # side of the views, pixels
    crop: Crop = "center"  # FlowAR: random; MAR: center
    flip: bool = True  # center: store the mirror image too; random: mirror every other view; ten_crop: always
    views: int = 10  # views stored per image with crop=random; each epoch uses one
    resize: int | None = None  # short side before the crop; None: random 9/8 and ten_crop 1.1 of image_size
    seed: int = 0  # for random crops
    image_column: str = free("image")  # parquet only: the column of images
    label_column: str = free("label")  # parquet only: the column of class numbers
    skip_unreadable: bool = False  # leave damaged images out, with a list, instead of stopping
    moments_dtype: Literal["float16", "float32"] = "float16"  # the rounding error is measured and recorded
    batch_size: int = 32  # views encoded at once
    chunk_images: int = 1024  # images that one worker claims at once
    shard_size_mib: int = 256  # largest size of a shard
    precision: Literal["fp32", "tf32"] = "fp32"  # precision of the VAE on a GPU
    num_workers: int = free(2)  # processes that decode images; 0 decodes in the main one
    lease_s: float = free(60)  # a worker that is silent for this long counts as dead
    device: str = free("auto")  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu

    def __post_init__(self) -> None:
        for name in ("image_size", "views", "batch_size", "chunk_images", "shard_size_mib"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lease_s <= 0 or self.num_workers < 0 or self.seed < 0:
            raise UserError(
                f"lease_s={self.lease_s} must be above 0, num_workers={self.num_workers} and seed={self.seed} not below"
            )
        if self.crop == "center" and self.resize is not None:
            raise UserError(
                f"resize={self.resize} is for crop=random and crop=ten_crop; crop=center resizes to image_size"
            )
        if self.resize is not None and self.resize < self.image_size:
            raise UserError(f"resize={self.resize} is below image_size={self.image_size}; a crop can't be larger")
        if self.crop == "ten_crop" and not self.flip:
            raise UserError(
                "crop=ten_crop holds mirror images by definition; leave flip=true, or use crop=center flip=false"
            )


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Whether a folder that flowar wrote is whole. All settings but `path` are for datasets."""

    path: str = MISSING  # any folder that flowar wrote, or a remote dataset
    cache: str | None = None  # folder for the shards of a remote dataset, as data.cache
    images: str | None = None  # source images, to encode some again; None: where the passport says
    image_column: str = "image"  # parquet only: the column of images
    label_column: str = "label"  # parquet only: the column of class numbers
    vae: VAEConfig | None = None  # the VAE; None: the one that the passport names
    num_images: int = 64  # images encoded again and shown; 0 only checks the files
    picture: str | None = None  # contact sheet; None: PATH.check.png
    seed: int = 0  # for choosing these images
    max_error: float = 0.05  # largest accepted difference of stored and new means, in std of the latents
    device: str = "auto"  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards, and how they are read."""

    # folder that `flowar prepare` wrote, or its copy at s3://, gs://, oci://, ... (mosaicml-streaming)
    path: str = free(MISSING)
    cache: str | None = free(None)  # folder for the shards of a remote path; None: flowar-USER below TMPDIR
    num_workers: int = free(2)  # processes that read ahead; 0 reads in the main one
    patience_s: float = free(300)  # how long failing storage is retried before the run stops and its job restarts
    # How latents are brought to unit std. vae: the VAE's one number, as in released models; channel: mean and std of
    # each channel over the dataset, for VAEs without such a number or with uneven channels
    normalize: Literal["vae", "channel"] = "vae"
    # Only for models that train on sequences of one class (ARFlow). uniform: every class equally often, as released;
    # frequency: in proportion to its number of images
    class_draw: Literal["uniform", "frequency"] = "uniform"
