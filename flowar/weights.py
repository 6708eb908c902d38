"""Model folders (model.safetensors + config.json), the released checkpoints' names, and `flowar convert`.

The only place where the released names appear. Read next: vae.py.
"""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.schema import PASSPORT_FILE
from flowar.checkpoint import load_state
from flowar.config import CUSTOM_VARIANT, MODEL_VARIANTS, ConvertConfig, ModelConfig, load_config, variant_config
from flowar.errors import UserError
from flowar.model import FlowAR
from flowar.run_folder import CHECKPOINTS, find_latest, is_checkpoint, read_progress
from flowar.scales import num_tokens

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # the layout of huggingface_hub's PyTorchModelHubMixin

# Our name -> the released one, replaced in this order in every parameter name.
RELEASED_NAMES = (
    ("ar.class_embedding.", "class_emb."),
    ("ar.lower_position", "encoder_pos_embed_learned"),
    ("ar.upper_position", "decoder_pos_embed_learned"),
    ("ar.output_position", "diffusion_pos_embed_learned"),
    ("ar.input_projection.", "z_proj."),
    ("ar.input_norm.", "z_proj_ln."),
    ("ar.middle_norm.", "encoder_norm."),
    ("ar.middle_projection.", "decoder_embed."),
    ("ar.output_norm.", "decoder_norm."),
    ("ar.lower_blocks.", "encoder_blocks."),
    ("ar.upper_blocks.", "decoder_blocks."),
    ("flow.input_projection.", "flownet.input_proj."),
    ("flow.time_embedding.hidden.", "flownet.time_embed.mlp.0."),
    ("flow.time_embedding.output.", "flownet.time_embed.mlp.2."),
    ("flow.condition_projection.", "flownet.cond_embed."),
    ("flow.output_modulation.", "flownet.final_layer.adaLN_modulation.1."),
    ("flow.output_projection.", "flownet.final_layer.linear."),
    ("flow.blocks.", "flownet.res_blocks."),
    (".attention_modulation.", ".ada_lin_attn."),
    (".mlp_modulation.", ".ada_lin_mlp."),
    (".query_norm.", ".norm2_1."),
    (".semantics_norm.", ".norm2_2."),
    (".cross_attention.query.", ".crossattn.q."),
    (".cross_attention.key_value.", ".crossattn.kv."),
    (".cross_attention.output.", ".crossattn.proj."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.output.", ".attn.proj."),
    (".mlp.gate.", ".mlp.fc1_g."),
    (".mlp.value.", ".mlp.fc1_x."),
    (".mlp.output.", ".mlp.fc2."),
)
RELEASED_DERIVED = re.compile(r"mask|.*\.rope\.freqs")  # follow from the shape, so they are dropped
RELEASED_FLOW_HEAD_WIDTH = 64
RELEASED_SCALES = (1, 2, 4, 8, 16)


class HubFlowAR(
    FlowAR,
    PyTorchModelHubMixin,
    library_name="flowar",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2412.15205",
    tags=["image-generation", "flow-matching", "autoregressive"],
):
    """FlowAR with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)


def create_model(name_or_config: str | ModelConfig, **overrides: object) -> HubFlowAR:
    """Return a freshly initialised FlowAR in evaluation mode.

    Args:
        name_or_config: a row of `flowar.config.MODEL_VARIANTS`, for example "flowar-l", or a ModelConfig.
        overrides: settings of ModelConfig to change, for example num_classes=10.

    Raises:
        UserError: if the name or an override is unknown (names the nearest one) or settings don't fit together.
    """
    config = variant_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if overrides:
        config = config_from_dict(dataclasses.asdict(config) | overrides)
    return HubFlowAR(config).eval()


def config_from_dict(settings: dict[str, object]) -> ModelConfig:
    """Return the ModelConfig of `settings`, checked like a config file: unknown names and wrong types are refused."""
    return load_config(ModelConfig, overrides=tuple(f"{key}={json.dumps(value)}" for key, value in settings.items()))


def load_model(path: str | Path, weights: str = "ema") -> HubFlowAR:
    """Return the FlowAR stored at `path`, in evaluation mode, float32 on the CPU.

    Args:
        path: a folder with model.safetensors and config.json, the run_dir of a training run (its newest complete
            checkpoint), one checkpoint of it, or a Hugging Face hub id.
        weights: of a checkpoint: "ema" (the first average), "raw", or the name of an average, such as decay_0.9999.

    Raises:
        UserError: if there is no model, or its weights don't fit its config (names what is missing or unknown).
    """
    folder = find_model_folder(path)
    if is_checkpoint(folder):
        return _load_from_checkpoint(folder, weights)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no model: it has no {' and no '.join(missing)}; write one with `flowar convert`, or give the "
            "run_dir of a training run"
        )
    try:
        config = config_from_dict(json.loads((folder / CONFIG_FILE).read_text()))
        state = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error
    model = create_model(config)
    load_strictly(model, state, str(folder / WEIGHTS_FILE))
    return model


def _load_from_checkpoint(folder: Path, weights: str) -> HubFlowAR:
    averages = read_progress(folder)["averages"]
    name = averages[0] if weights == "ema" else weights
    if name not in ("raw", *averages):
        raise UserError(f"checkpoint {folder} has no weights={weights}; it has raw, {', '.join(averages)}")
    prefix = "model." if name == "raw" else f"ema.{name}."
    model = create_model(config_from_dict(json.loads((folder / CONFIG_FILE).read_text())))
    load_state({prefix + key: parameter.detach() for key, parameter in model.named_parameters()}, folder)
    return model


def hash_weights(state: dict[str, Tensor]) -> str:
    """Return a hash of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def find_model_folder(path: str | Path) -> Path:
    """Return the model folder or the checkpoint that `path` means; errors as `load_model`."""
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        latest = find_latest(folder)
        if latest is None:
            raise UserError(f"{folder} has no complete checkpoint yet; let `flowar train` run until it saves one")
        return latest
    return folder if folder.exists() else _download(str(path))


def save_model(config: ModelConfig, state: dict[str, Tensor], folder: str | Path) -> None:
    """Write model.safetensors and config.json into `folder`, which `load_model` reads back bit for bit."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def save_model_whole(
    config: ModelConfig, state: dict[str, Tensor], folder: Path, *, passport_of: Path | None = None
) -> None:
    """Write a model folder that isn't there yet, whole or not at all.

    Args:
        config, state: the model.
        folder: where to.
        passport_of: checkpoint whose dataset's passport goes along, so that sampling refuses another VAE.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    save_model(config, state, partial)
    if passport_of is not None and (passport_of / PASSPORT_FILE).is_file():
        shutil.copy(passport_of / PASSPORT_FILE, partial / PASSPORT_FILE)
    partial.rename(folder)


def load_strictly(model: FlowAR, state: dict[str, Tensor], source: str) -> None:
    """Load `state` into `model`; every key and shape has to fit.

    Raises:
        UserError: names the missing and unknown keys, or the first tensors of another shape.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"{source} does not hold this model: {_key_report(missing, unknown)}")
    shapes = [
        f"{name} is {tuple(state[name].shape)}, needs {tuple(expected[name].shape)}"
        for name in expected
        if state[name].shape != expected[name].shape
    ]
    if shapes:
        raise UserError(f"{source} holds another model ({len(shapes)} shapes differ): {'; '.join(shapes[:3])}")
    model.load_state_dict(state)


def convert_released(state_dict: dict[str, Tensor], ar_heads: int | None = None) -> HubFlowAR:
    """Return a FlowAR with the authors' weights, in evaluation mode; its shape is read from the tensors.

    Args:
        state_dict: a released state dict, or a checkpoint of the authors' trainer with "model_ema" (preferred) or
            "model" in it.
        ar_heads: heads of the AR Transformer; read from its rotary frequencies if None.

    Raises:
        UserError: if keys are missing or unknown (named), or the heads can't be told.
    """
    for wrapper in ("model_ema", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    config = _released_config(state_dict, ar_heads)
    with torch.device("meta"):
        released_names = {released_name(ours): ours for ours in FlowAR(config).state_dict()}
    missing = sorted(released_names.keys() - state_dict.keys())
    unknown = sorted(name for name in state_dict.keys() - released_names.keys() if not RELEASED_DERIVED.fullmatch(name))
    if missing or unknown:
        raise UserError(f"the checkpoint is not a released FlowAR: {_key_report(missing, unknown)}")
    weights = {
        ours: state_dict[theirs].squeeze(0) if theirs.endswith("_pos_embed_learned") else state_dict[theirs]
        for theirs, ours in released_names.items()
    }  # their position tables are (1, L, D)
    model = create_model(config)
    load_strictly(model, weights, "the checkpoint")
    return model


def released_name(ours: str) -> str:
    """Return the released name of one of our parameters."""
    name = ours if ours.startswith("flow.") else ours.replace(".modulation.", ".ada_lin.1.")
    name = name.replace(".modulation.", ".ada_lin.")
    for own, theirs in RELEASED_NAMES:
        name = name.replace(own, theirs)
    return name


def main(config: ConvertConfig, dry_run: bool = False) -> None:
    """Convert the authors' checkpoint to a model folder."""
    source, target = Path(config.checkpoint), Path(config.out_dir)
    if not source.is_file():
        raise UserError(
            f"there is no file {source}; download FlowAR-S.pth, FlowAR-L.pth or FlowAR-H.pth from the authors' release"
        )
    if target.exists():
        raise UserError(f"{target} already exists; give another out_dir, or remove it first")
    try:
        state_dict = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{source} is not a readable PyTorch checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state_dict, dict):
        raise UserError(f"{source} holds a {type(state_dict).__name__}, but a state dict is needed")
    model = convert_released(state_dict, config.ar_heads)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{source}: {model.config.variant}, {parameters / 1e6:.1f} M parameters")
    if dry_run:
        print(f"would write {target / WEIGHTS_FILE} and {target / CONFIG_FILE}")
        return
    save_model_whole(model.config, model.state_dict(), target)
    print(f"wrote {target / WEIGHTS_FILE} and {target / CONFIG_FILE}")


def _released_config(state_dict: dict[str, Tensor], ar_heads: int | None) -> ModelConfig:
    """Return the shape of a released checkpoint, read off its tensors."""

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise UserError(
                f"the checkpoint is not a released FlowAR: missing {name}; its keys are {_few(sorted(state_dict))}"
            )
        return state_dict[name].shape

    def depth(prefix: str) -> int:
        found = [int(m[1]) for name in state_dict if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
        if not found:
            raise UserError(f"the checkpoint is not a released FlowAR: missing {prefix}.0")
        return max(found) + 1

    tokens = shape("encoder_pos_embed_learned")[1]
    if tokens != num_tokens(RELEASED_SCALES):
        raise UserError(
            f"encoder_pos_embed_learned holds {tokens} tokens, but the released models have "
            f"{num_tokens(RELEASED_SCALES)} (scales {RELEASED_SCALES})"
        )
    rows, ar_width = shape("class_emb.weight")
    flow_width, latent_channels = shape("flownet.input_proj.weight")
    if ar_heads is None:
        frequencies = "encoder_blocks.0.attn.rope.freqs"
        if frequencies not in state_dict:
            raise UserError(
                f"the checkpoint has no {frequencies} to tell the AR Transformer's heads by; give ar_heads=... "
                "(12 for -S and -B, 16 for -L and -H)"
            )
        ar_heads = ar_width // (4 * len(state_dict[frequencies]))  # a quarter of a head's width
    config = ModelConfig(
        variant=CUSTOM_VARIANT,
        scales=RELEASED_SCALES,
        latent_channels=latent_channels,
        num_classes=rows - 1,
        ar_depth=2 * max(depth("encoder_blocks"), depth("decoder_blocks")),
        ar_width=ar_width,
        ar_heads=ar_heads,
        flow_depth=depth("flownet.res_blocks"),
        flow_width=flow_width,
        flow_heads=flow_width // RELEASED_FLOW_HEAD_WIDTH,
        flow_block="attn_cross_mlp" if any(".crossattn." in name for name in state_dict) else "attn_mlp",
    )
    for known in MODEL_VARIANTS.values():
        if dataclasses.replace(config, variant=known.variant) == known:
            return known
    return config


def _download(hub_id: str) -> Path:
    """Return the local folder of a model on the Hugging Face hub."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"there is no folder {hub_id}, and the Hugging Face hub gave no model of that name: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _key_report(missing: list[str], unknown: list[str]) -> str:
    parts = [f"{what} {_few(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    return "; ".join(parts)


def _few(names: list[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


if __name__ == "__main__":
    from flowar.cli import run_verb

    run_verb("convert")
