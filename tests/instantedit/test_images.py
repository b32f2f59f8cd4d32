import numpy as np
import pytest
from PIL import Image

from jaxlab.instantedit.image_io import prepare_image, read_image, to_uint8, write_image

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)


@pytest.mark.latest
def test_arrays_and_pictures_of_one_image_agree():
    expected = RGB / np.float32(255)
    got = prepare_image(RGB)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    for same in (Image.fromarray(RGB), expected, expected.astype(np.float64), RGB.astype(np.uint16) * 257):
        np.testing.assert_allclose(prepare_image(same), expected, rtol=0, atol=1e-6)
    grey = RGB[..., 0]
    for same in (grey, grey[..., None], Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        np.testing.assert_allclose(prepare_image(same), expected[..., :1].repeat(3, -1), rtol=0, atol=1e-6)
    for mode in ("1", "P", "CMYK", "YCbCr", "HSV"):
        assert prepare_image(Image.fromarray(RGB).convert(mode)).shape == (8, 16, 3)
    np.testing.assert_array_equal(to_uint8(got), RGB)


def test_transparent_pixels_become_white_with_a_warning():
    alpha = np.full((8, 16, 1), 255, np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 51
    rgba = np.concatenate([RGB, alpha], axis=-1)
    for image in (rgba, rgba / 255, Image.fromarray(rgba)):
        with pytest.warns(UserWarning, match="white"):
            got = prepare_image(image)
        np.testing.assert_allclose(got[0, 0], 1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[0, 1], 0.2 * RGB[0, 1] / 255 + 0.8, rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[1:], RGB[1:] / 255, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="white"):
        prepare_image(Image.fromarray(rgba).convert("LA"))


def test_resizing_is_pillows_bicubic():
    got = prepare_image(RGB, size=(16, 24))
    assert got.shape == (16, 24, 3)
    theirs = np.asarray(Image.fromarray(RGB).resize((24, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-6)
    # Pale enough that no overshoot is cut off.
    floats = prepare_image(RGB / np.float32(510) + 0.25, size=(16, 24))
    theirs = np.asarray(Image.fromarray(RGB // 2 + 64).resize((24, 16), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(floats, theirs, rtol=0, atol=3 / 255)
    assert prepare_image(RGB[..., 0], size=(16, 24)).shape == (16, 24, 3)
    assert prepare_image(RGB[:5], size=8).shape == (8, 8, 3)
    assert prepare_image(RGB[:5, :7], multiple=1).shape == (5, 7, 3)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    picture = Image.fromarray(RGB)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn right
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = prepare_image(read_image(tmp_path / "turned.png"))
    np.testing.assert_allclose(turned, np.rot90(RGB, -1) / 255, rtol=0, atol=1e-6)


def test_files(tmp_path):
    write_image(tmp_path / "a.png", RGB)
    write_image(tmp_path / "b.png", RGB / np.float32(255))
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), RGB)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: expected a PNG, JPEG, WebP or GIF image"):
        read_image(tmp_path / "text.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.png: expected a PNG.*truncated"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"a\.picture"):
        write_image(tmp_path / "a.picture", RGB)


def _with(value):
    image = RGB / np.float32(255)
    image[3, 4, 1] = value
    return image


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((8, 8, 2), np.uint8), r"\(8, 8, 2\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\(1, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((9, 8, 3), np.uint8), "multiples of 8, got 9x8"),
        (Image.new("RGB", (20, 8)), "multiples of 8, got 8x20"),
        (Image.new("F", (8, 8)), "mode 'F'"),
        (_with(np.nan), "1 values are not finite"),
        (_with(np.inf), "not finite"),
        (_with(255.0), r"\[0, 1\], got .* to 255"),
        (_with(-0.5), "got -0.5"),
        ("a path", "image: expected a PIL image, or an array .* got str"),
        (None, "got NoneType"),
    ],
)
def test_bad_images(unchecked, image, told):
    with pytest.raises(ValueError, match=told):
        prepare_image(image)


def test_bad_sizes(unchecked):
    with pytest.raises(ValueError, match="0x8"):
        prepare_image(RGB, size=(0, 8))
    with pytest.raises(ValueError, match="multiples of 8, got 12x12"):
        prepare_image(RGB, size=12)
