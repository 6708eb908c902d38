"""`FlowARPipeline`: a model and its VAE as a diffusers pipeline. Nothing here computes: it calls `sample_latents`.

Read next: models/flowar/generate.py, latents/vae.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.latents.schema import LatentScale
from flowar.latents.vae import VAE, load_vae
from flowar.models.build import family_of, released_time_grid, sample_latents
from flowar.models.family import Model
from flowar.models.folders import find_model_folder, load_model, save_model
from flowar.sampling.job import choose_vae, fit_vae, read_class_names, resolve_classes

PIPELINE_FILE = "model_index.json"  # diffusers' name
TOKENIZER_FILE = "tokenizer.json"  # which VAE, and how its latents are scaled
CLASSES_FILE = "classes.json"
COPY_AGAIN = "copy the folder again, or save the pipeline again"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PipelineModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases are not typed
    """A model of any family as a component of a pipeline: its folder is one that `load_model` reads."""

    config_name = "config.json"

    def __init__(self, model: Model, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.class_names = tuple(class_names)

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Write the model folder."""
        save_model(self.model.config, self.model.state_dict(), save_directory)
        write_record(Path(save_directory) / CLASSES_FILE, {"class_names": list(self.class_names)})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> "PipelineModel":
        """Return what `save_pretrained` wrote; errors as `load_model`."""
        names = read_record(Path(folder) / CLASSES_FILE, COPY_AGAIN, needs=["class_names"])["class_names"]
        return cls(load_model(folder), names)


class PipelineTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A VAE as a component of a pipeline, with the scale that its latents have in the model."""

    config_name = "config.json"

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Write the VAE in diffusers' layout, or only its name where it has no weights."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        own = getattr(self.vae.autoencoder, "autoencoder", self.vae.autoencoder)  # of an adapter
        if hasattr(own, "save_pretrained"):
            own.save_pretrained(folder)
        elif self.vae.name != "pixels":
            raise UserError(
                f"VAE {self.vae.name} can't be saved: it is not one of the classes of diffusers; keep its own files"
            )
        scale = self.vae.latent_scale._asdict()
        write_record(folder / TOKENIZER_FILE, {"name": self.vae.name, "scale": scale})

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> "PipelineTokenizer":
        """Return what `save_pretrained` wrote; errors as `load_vae`."""
        record = read_record(Path(folder) / TOKENIZER_FILE, COPY_AGAIN, needs=["name", "scale"])
        vae = load_vae("pixels" if record["name"] == "pixels" else str(folder))
        vae.name = record["name"]
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in record["scale"].items()}
        vae.latent_scale = LatentScale(**values)
        return cls(vae)


class FlowARPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class labels -> images, in diffusers' manner, for models of every family.

    `components`, `to`, `set_progress_bar_config`, `save_pretrained` are those of diffusers.
    """

    model: PipelineModel
    tokenizer: PipelineTokenizer

    def __init__(self, model: PipelineModel, tokenizer: PipelineTokenizer) -> None:
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "FlowARPipeline":
        """Return the pipeline of a model, on the CPU.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote; or a model folder, its hub id or the
                run_dir of a training run, whose VAE is found as by `flowar sample`.
            kwargs: for what `save_pretrained` wrote, diffusers' own; for the others `weights`, as of `load_model`, and
                `vae`, from `load_vae`.

        Raises:
            UserError: if there is no model, or the VAE is missing or differs from the one in training.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / PIPELINE_FILE).is_file():
            check_components(folder / PIPELINE_FILE)
            pipeline: FlowARPipeline = super().from_pretrained(folder, **kwargs)
            return pipeline
        weights, vae = kwargs.pop("weights", "ema"), kwargs.pop("vae", None)
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} can't be used with {folder}, which holds no {PIPELINE_FILE}")
        found = find_model_folder(pretrained_model_name_or_path)
        model = load_model(found, weights)
        if vae is None:
            vae_config = choose_vae(None, found)
            vae = load_vae(vae_config.name, vae_config.weights)
        fit_vae(found, model.config, vae)
        return cls(PipelineModel(model, read_class_names(found)), PipelineTokenizer(vae))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        *,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 25,
        guidance_interval: tuple[float, float] = (0.0, 0.9),
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        time_grid: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["FlowARPipeline", int, int, dict[str, Tensor]], object] | None = None,
        **settings: Any,
    ) -> Any:
        """Return images in the form of `output_type`; the latents are those of `sample_latents`, bit for bit.

        Args:
            class_labels: one class or several, by number or name.
            guidance_scale: classifier-free guidance; 1 is off.
            num_inference_steps: of the solver, at each scale, on the family's released time grid.
            guidance_interval: (low, high) in time; outside nothing is guided.
            generator: of the noise; torch's global one if None.
            noise: as of `sample_latents`, instead of a generator.
            time_grid: as of `sample_latents`, instead of num_inference_steps.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent".
            return_dict: return an object with `.images`, not a tuple.
            callback_on_step_end: called as (pipeline, stage, side, {"latents": ...}) after each scale of FlowAR, before
                each step of ARFlow; what it returns is not used.
            settings: others of the family's `sample_latents`, such as solver.

        Raises:
            UserError: if a class or the output type is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")
        model = self.model.model
        wanted = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        labels = torch.tensor(resolve_classes(wanted, self.model.class_names), device=self._execution_device)
        check_labels(labels, model.config.num_classes)
        grid = released_time_grid(num_inference_steps, model.config.family) if time_grid is None else time_grid
        stages = len(family_of(model.config).token_rows(model.config))
        with self.progress_bar(total=stages) as bar:

            def tell(stage: int, latents: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, stage, latents.shape[-1], {"latents": latents})

            latents = sample_latents(
                model,
                labels,
                time_grid=grid,
                guidance=guidance_scale,
                guidance_interval=guidance_interval,
                generator=generator,
                noise=noise,
                on_stage=tell,
                **settings,
            )
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.tokenizer.vae.decode(latents), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a UserError that names a label which is not a class of the model; num_classes means any class."""
    wrong = [label for label in labels.tolist() if not 0 <= label <= num_classes]
    if wrong:
        raise UserError(f"class_labels holds {wrong[0]}; the model has classes 0 to {num_classes - 1}")


def check_components(file: Path) -> None:
    """Refuse a pipeline of other classes than these: what a folder of somebody names is data, not code to import.

    Raises:
        UserError: if it names others.
    """
    try:
        index = json.loads(file.read_text())
        found = {key: tuple(index[key]) for key in ("model", "tokenizer")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not the index of a FlowARPipeline ({error!r}); {COPY_AGAIN}") from error
    own = {"model": (__name__, PipelineModel.__name__), "tokenizer": (__name__, PipelineTokenizer.__name__)}
    others = [key for key in index if not key.startswith("_") and key not in own]
    if found != own or others:
        raise UserError(f"{file} names other components than {sorted(own.values())}; {COPY_AGAIN}")
