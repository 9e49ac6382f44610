"""Images: sources, sizes and patches. transformers' processor is the arbiter of patches, Pillow of all before them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgemma_ext.model.vision import SOFT_TOKENS, Patches, image_size, patches_of, read_image
from pictures import file_of, gradient, smooth

# Width x height of an image, and of what it becomes for each of SOFT_TOKENS; transformers 5.23.
SIZES = {
    (97, 61): [(480, 288), (672, 432), (1008, 624), (1392, 864), (2016, 1248)],
    (61, 97): [(288, 480), (432, 672), (624, 1008), (864, 1392), (1248, 2016)],
    (1, 1): [(384, 384), (528, 528), (768, 768), (1104, 1104), (1584, 1584)],
    (960, 672): [(480, 336), (672, 432), (960, 672), (1344, 912), (1920, 1344)],
    (1920, 1080): [(528, 288), (720, 384), (1056, 576), (1488, 816), (2112, 1200)],
    (4032, 3024): [(432, 336), (624, 480), (912, 672), (1296, 960), (1824, 1344)],
    (3000, 10): [(3360, 48), (6720, 48), (13440, 48), (19632, 48), (27792, 48)],
    (10, 3000): [(48, 3360), (48, 6720), (48, 13440), (48, 19632), (48, 27792)],
    (1390, 5): [(3360, 48), (6720, 48), (13344, 48), (18912, 48), (26736, 96)],
    (1190, 17): [(3360, 48), (4704, 48), (6672, 48), (9456, 96), (13392, 144)],
    (595, 34): [(1632, 48), (2352, 96), (3312, 144), (4704, 240), (6672, 336)],
}
# Image, soft tokens → those it has, digests of transformers' pixels and positions, which are padded, and the sum of the
# pixels' bytes.
PIXELS = [
    (gradient(97, 61), 70, 60, "707b66115cc00bc8", "6a477053a0030ff0", 52_993_706),
    (gradient(97, 61), 280, 273, "91102f05298398ec", "6a8ec8b7ec82189b", 241_132_057),
    (smooth(640, 480), 70, 63, "9e9fbf485d87e4be", "5461cbbf51a9722b", 55_298_041),
    (smooth(640, 480), 280, 266, "1e5aa9aa51a864e2", "b3f89b38d2b04bed", 233_505_581),
    (gradient(672, 960), 280, 280, "a6d5e6967042b371", "a561e00afb7b1bd9", 245_921_536),  # not resized
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    width, height = size
    found = [image_size(height, width, soft_tokens)[::-1] for soft_tokens in SOFT_TOKENS]
    assert found == SIZES[size]


def test_every_image_has_a_size_within_its_soft_tokens() -> None:
    for soft_tokens in SOFT_TOKENS:
        for height in range(1, 130, 3):
            for width in range(1, 3000, 97):
                rows, columns = (side // 48 for side in image_size(height, width, soft_tokens))
                assert 0 < rows * columns <= soft_tokens, (height, width)


@pytest.mark.parametrize("soft_tokens", [0, 100, 256, "280", None])
def test_numbers_of_soft_tokens_that_there_are_not(soft_tokens: Any) -> None:
    with pytest.raises(ValueError, match="soft_tokens must be one of 70, 140, 280, 560, 1120, got"):
        image_size(100, 100, soft_tokens)


def padded(patches: Patches, soft_tokens: int) -> tuple[Any, Any]:
    """As transformers pads them: pixels by 0, positions by -1."""
    pixels = np.zeros((9 * soft_tokens, 768), np.float32)
    positions = np.full((9 * soft_tokens, 2), -1, np.int64)
    pixels[: len(patches.pixels)], positions[: len(patches.pixels)] = patches.pixels, patches.positions
    return pixels, positions


def digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", PIXELS, ids=lambda case: f"{case[0].shape[:2]} {case[1]}")
def test_patches_have_the_bits_that_were_noted(case: tuple[Any, int, int, str, str, int]) -> None:
    rgb, soft_tokens, wanted, of_pixels, of_positions, total = case
    patches = patches_of(rgb, soft_tokens)
    assert patches.soft_tokens == wanted == len(patches.pixels) // 9
    assert int((patches.pixels.double() * 255).round().sum()) == total
    pixels, positions = padded(patches, soft_tokens)
    assert (digest(pixels), digest(positions)) == (of_pixels, of_positions)


@pytest.mark.parametrize("size", [(97, 61), (2, 3), (224, 224), (13441, 48), (5, 1400)], ids=str)
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    processing = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    rgb = gradient(*size)
    theirs = processing.Gemma4ImageProcessorPil()(Image.fromarray(rgb), max_soft_tokens=140, return_tensors="np")
    pixels, positions = padded(patches_of(rgb, 140), 140)
    assert np.array_equal(theirs["pixel_values"][0], pixels)
    assert np.array_equal(theirs["image_position_ids"][0], positions)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    rgb = gradient(19, 7)
    file = file_of(Image.fromarray(rgb))
    path = tmp_path / "a.png"
    path.write_bytes(file)
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    for source in (path, str(path), file, bytearray(file), memoryview(file), url, Image.fromarray(rgb)):
        assert np.array_equal(read_image("images", source), rgb)


@pytest.mark.parametrize("by_file", [False, True])
def test_an_image_is_turned_upright(by_file: bool) -> None:
    rgb = gradient(19, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    image = Image.fromarray(rgb)
    image.getexif()[0x0112] = 6
    source = file_of(Image.fromarray(rgb), exif=exif) if by_file else image
    assert np.array_equal(read_image("images", source), np.rot90(rgb, -1))


@pytest.mark.parametrize("by_file", [False, True])
def test_transparency_lies_on_white(by_file: bool) -> None:
    image = Image.new("RGBA", (4, 3), (200, 100, 0, 64))
    found = read_image("images", file_of(image) if by_file else image)
    wanted = [round(255 + (channel - 255) * 64 / 255) for channel in (200, 100, 0)]
    assert np.abs(found.astype(int) - wanted).max() <= 1  # Pillow rounds in its own way


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    file = file_of(image, transparency=1)
    assert np.array_equal(read_image("images", file), np.full((3, 4, 3), 255, np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA"])
def test_modes_of_eight_bits_are_as_pillow_converts_them(mode: str) -> None:
    image = Image.fromarray(gradient(19, 7)).convert("L" if mode == "LA" else mode).convert(mode)
    assert np.array_equal(read_image("images", image), np.array(image.convert("RGB")))


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ((255, 0, 0), (0, 255, 0))]
    file = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image("images", file)[0, 0].tolist() == [255, 0, 0]


REFUSED: dict[str, tuple[Any, str]] = {
    "no image": (b"hello", "images is no image that Pillow can read"),
    "nothing": (b"", "images is no image that Pillow can read"),
    "cut off": (file_of(Image.fromarray(gradient(64, 64)))[:2000], "images cannot be decoded"),
    "cut off in JPEG": (file_of(Image.fromarray(gradient(64, 64)), "JPEG")[:900], "images cannot be decoded"),
    "16 bits": (Image.fromarray(np.full((3, 4), 700, np.uint16)), "images has pixels of mode I;16; supported: 8 bits"),
    "floating point": (Image.new("F", (4, 3)), "images has pixels of mode F"),
    "a file that is not there": ("/nowhere/a.png", "images cannot be read"),
    "a folder": ("/", "images cannot be read"),
    "a URL": ("https://x.example/a.png", "images is a URL, which is not fetched"),
    "base64 that is none": ("data:image/png;base64,@@@@", "images is a data URL whose base64 cannot be decoded"),
    "a data URL without base64": ("data:image/png,abc", "images is a data URL without ;base64"),
    "an array": (gradient(4, 3), "images must be a path, the bytes of an image file, a data URL or a Pillow image"),
    "a number": (3, "images must be a path"),
    "an image in memory that is too large": (Image.new("1", (9500, 9500)), "images is an image of more than 89,478"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_image_here_is_refused(what: str) -> None:
    source, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        read_image("images", source)


@pytest.mark.parametrize("side", [9500, 13_400])  # Pillow warns of the one and refuses the other
@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(ValueError, match="images is an image of more than 89,478,485 pixels"):
        read_image("images", file_of(Image.new("1", (side, side))))
