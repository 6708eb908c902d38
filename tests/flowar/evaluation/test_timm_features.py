import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor

from flowar.base.errors import UserError
from flowar.config.data import ExtractorConfig
from flowar.evaluation.extractors import Extractor

CPU = torch.device("cpu")
NAME = "test_resnet"  # timm's smallest, for tests


def test_a_timm_model_gives_the_features_that_timm_gives_and_its_file_is_data(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    picture = Image.effect_mandelbrot((200, 200), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    about = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**about, "crop_pct": 1.0})  # the whole image, as for generated ones
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(transform(picture)[None]), pre_logits=True)
    for file in ("model.safetensors", "model.pth"):
        extractor = Extractor(ExtractorConfig(name=f"timm:{NAME}", weights=str(tmp_path / file)), CPU)
        found = extractor(pil_to_tensor(picture)[None])["features"]
        assert found.shape == (1, model.num_features)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # PIL rounds what it resizes to bytes


def test_unknown_models_and_weights_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no model test_resnett; did you mean test_resnet"):
        Extractor(ExtractorConfig(name="timm:test_resnett"), CPU)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold this model: missing"):
        Extractor(ExtractorConfig(name=f"timm:{NAME}", weights=str(tmp_path / "other.safetensors")), CPU)
