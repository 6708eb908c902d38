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

    # mar, ldm (VA-VAE and its like), sd-vae-ft-ema, sd-vae-ft-mse, dc-ae-f32c32, demo, pixels (none), a folder that
    # `flowar train-vae` wrote, or diffusers' AutoencoderKL, -DC or -RAE as a folder or hub id
    name: str = "mar"
    weights: str | None = free(None)  # mar: the file kl16.ckpt; ldm: its state dict; the weights' hash is what counts


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Which network gives the features that images are measured by, and where its weights are."""

    # Any of torch-fidelity's; timm:NAME, a model of timm by its name; or own: a judge, a small classifier of the
    # dataset's classes that is trained here
    name: str = "inception-v3-compat"
    # None: in torch hub's folder (below TORCH_HOME), or fetched; of own: the judge's file, None: with the reference
    weights: str | None = None
    other_weights: bool = False  # accept others than the published ones; the numbers then compare with nothing else
    # Of own: real images, a sub-folder per class, that train the judge if its file is not there; None: the images that
    # the model was trained on, where they are, else the reference
    images: str | None = free(None)
    flip: bool | None = free(None)  # of own: train the judge on mirror images too; None: as the dataset was prepared


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Images -> moments in MDS shards."""

    images: str = MISSING  # folder with a sub-folder per class, folder or pattern of *.tar or *.parquet
    out_dir: str = free(MISSING)  # the dataset to write
    vae: VAEConfig = field(default_factory=VAEConfig)  # that encodes them
    image_size: int = 256  # side of the views, pixels
    crop: Crop = "center"  # FlowAR: random; MAR: center
    flip: bool = True  # center: store the mirror image too; random: mirror every other view; ten_crop: always
    views: int = 10  # stored of each image with crop=random; an epoch uses one of them
    resize: int | None = None  # short side before the crop; None: random 9/8 and ten_crop 1.1 of image_size
    seed: int = 0  # of random crops
    image_column: str = free("image")  # parquet only; the hash of the listing tells what came of these two
    label_column: str = free("label")  # parquet only: the column of class numbers
    skip_unreadable: bool = False  # leave damaged images out, with a list, instead of stopping
    moments_dtype: Literal["float16", "float32"] = "float16"  # the rounding error is measured and recorded
    batch_size: int = 32  # views encoded at once
    chunk_images: int = 1024  # the piece of work that one worker claims
    shard_size_mib: int = 256  # of one file of rows
    precision: Literal["fp32", "tf32"] = "fp32"  # of the VAE on a GPU
    num_workers: int = free(2)  # processes that decode images; 0 decodes in the main one
    lease_s: float = free(60)  # a worker without a sign of life for this long is taken for dead
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

    path: str = MISSING  # folder that `flowar prepare` wrote, or a remote one
    cache: str | None = None  # as data.cache
    images: str | None = None  # the source, to encode a sample of it again; None: where the passport says it was
    image_column: str = "image"  # of a parquet source
    label_column: str = "label"  # parquet only: the column of class numbers
    vae: VAEConfig | None = None  # None: the one that the passport names
    num_images: int = 64  # images encoded again and shown; 0 only checks the files
    picture: str | None = None  # contact sheet; None: PATH.check.png
    seed: int = 0  # which images
    max_error: float = 0.05  # accepted between stored and new means, in std of the latents
    device: str = "auto"  # auto: the GPU where there is one, else cpu; or cuda, cuda:1, cpu


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards, and how they are read."""

    # folder that `flowar prepare` wrote, or its copy at s3://, gs://, oci://, ... (mosaicml-streaming)
    path: str = free(MISSING)
    cache: str | None = free(None)  # folder for the shards of a remote path; None: flowar-USER below TMPDIR
    num_workers: int = free(2)  # processes that read ahead; 0 reads in the main one
    patience_s: float = free(300)  # storage that fails or hangs is tried again for so long; a job is then started anew
    # What brings latents to unit std: "vae", its one number, as released models have it; "channel", the mean and std
    # of each channel over the dataset, for VAEs without such a number, or whose channels differ.
    normalize: Literal["vae", "channel"] = "vae"
    # Of models that train on sequences of images of one class (ARFlow): "uniform", every class equally often, as
    # released; "frequency", each in proportion to its number of images.
    class_draw: Literal["uniform", "frequency"] = "uniform"
