import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data_prep.crops import centre_crop, decode_image, make_views, num_views, resize_side
from flowar.base.errors import UserError
from flowar.config.data import PrepareConfig


def cropping(**settings):
    return PrepareConfig(images="", out_dir="", **({"image_size": 32} | settings))


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def photo(width=60, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(100, 40), (33, 90), (32, 32), (200, 300), (20, 25)])
def test_the_centre_crop_is_the_central_square_at_the_asked_size(size):
    width, height = size
    columns = np.abs(np.linspace(-1, 1, width))[None, :] + np.abs(np.linspace(-1, 1, height))[:, None]
    cropped = np.asarray(centre_crop(Image.fromarray((columns * 100).astype(np.uint8)).convert("RGB"), 32)).astype(int)
    assert cropped.shape == (32, 32, 3)
    assert np.abs(cropped - cropped[::-1, ::-1]).max() <= 12  # symmetric about the centre


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = photo(32, 32)
    assert np.array_equal(make_views(image, cropping(flip=False), 0)[0], np.asarray(image))


def test_a_centre_crop_is_stored_with_its_mirror_image():
    views = make_views(photo(), cropping(), 0)
    assert len(views) == num_views(cropping()) == 2
    assert np.array_equal(views[0], np.asarray(centre_crop(photo(), 32)))
    assert np.array_equal(views[1], views[0][:, ::-1])


def test_random_views_are_crops_of_the_resized_image_and_follow_from_seed_image_and_view():
    config = cropping(crop="random", views=12)
    views = make_views(photo(), config, 7)
    assert views.shape == (12, 32, 32, 3) and resize_side(config) == 36
    resized = np.asarray(v2.Resize(36)(photo()))
    mirrored = 0
    for view in views:
        found = [
            (flipped, top, left)
            for flipped, image in enumerate((resized, resized[:, ::-1]))
            for top in range(resized.shape[0] - 31)
            for left in range(resized.shape[1] - 31)
            if np.array_equal(image[top : top + 32, left : left + 32], view)
        ]
        assert len(found) == 1
        mirrored += found[0][0]
    assert 0 < mirrored < 12 and len({view.tobytes() for view in views}) > 8
    assert np.array_equal(make_views(photo(), config, 7), views)
    assert np.array_equal(make_views(photo(), cropping(crop="random", views=3), 7), views[:3])
    assert not np.array_equal(make_views(photo(), config, 8), views)
    assert not np.array_equal(make_views(photo(), cropping(crop="random", views=12, seed=1), 7), views)


def test_without_flip_no_random_view_is_mirrored():
    straight = make_views(photo(), cropping(crop="random", views=12, flip=False), 7)
    resized = np.asarray(v2.Resize(36)(photo()))
    places = np.lib.stride_tricks.sliding_window_view(resized, (32, 32, 3)).reshape(-1, 32, 32, 3)
    assert all((places == view).all(axis=(1, 2, 3)).any() for view in straight)


def test_ten_crops_are_torchvisions_of_a_larger_centre_crop():
    config = cropping(crop="ten_crop")
    assert resize_side(config) == 35
    expected = v2.TenCrop(32)(torch.from_numpy(np.asarray(centre_crop(photo(), 35)).copy()).permute(2, 0, 1))
    views = torch.from_numpy(make_views(photo(), config, 0)).permute(0, 3, 1, 2)
    assert torch.equal(views, torch.stack(list(expected)))


def test_grey_palette_alpha_and_cmyk_images_become_rgb():
    for mode in ("L", "LA", "P", "RGBA", "1"):
        assert decode_image(saved(photo().convert(mode))).mode == "RGB"
    assert decode_image(saved(photo().convert("CMYK"), format="TIFF")).mode == "RGB"


def test_rotated_images_are_turned_upright():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    assert decode_image(saved(Image.fromarray(pixels), exif=exif)).getpixel((0, 0)) == (0, 0, 0)


def test_sixteen_bit_images_are_scaled_and_not_clipped():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(np.asarray(decode_image(saved(Image.fromarray(ramp))))[..., 0].ravel(), np.arange(256))


def test_a_dark_sixteen_bit_image_stays_dark_and_unknown_ranges_are_refused():
    dark = Image.fromarray(np.full((16, 16), 200, np.uint16))
    assert np.asarray(decode_image(saved(dark))).max() == 0
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="have no known range"):
            decode_image(saved(Image.fromarray(np.full((16, 16), 70000, kind)), format="TIFF"))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    animated = saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert decode_image(animated).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_image_is_an_error_and_no_grey_area(cut):
    whole = saved(photo(200, 200), format="JPEG")
    with pytest.raises((OSError, SyntaxError)):
        decode_image(whole[: int(len(whole) * cut)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 40}, "resize=40 is for crop=random and crop=ten_crop"),
        ({"crop": "random", "resize": 20}, "resize=20 is below image_size=32"),
        ({"crop": "ten_crop", "flip": False}, "crop=ten_crop holds mirror images by definition"),
        ({"crop": "random", "views": 0}, "views=0 must be at least 1"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        cropping(**settings)
