"""Digits that need no download: real handwritten ones, enlarged, and drawn house numbers.

They stand in for MNIST and SVHN in the profile `quick`; results on them are never the paper's. Everything is computed in
float64 and rounded to 8 bits at the end, so that every machine draws the same images.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmvae_lib.errors import DMVAEError

# --- handwritten digits ----------------------------------------------------------------------------------------

VERSIONS = 6  # of each training digit, adjacent: the digit itself, then five warps of it


def handwritten_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's real 8x8 handwritten digits (UCI optdigits) enlarged to MNIST's format.

    Returns train images (7782, 1, 28, 28) uint8 and labels (7782,), test images (500, 1, 28, 28) and labels (500,).
    Each training digit comes in VERSIONS versions, one after the other, the first unwarped; the warps (rotation,
    scale, shear, shift) are always the same. Test digits are enlarged only.
    """
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    digits = load_digits()
    images = torch.from_numpy(digits.images).div(16)[:, None]  # (1797, 1, 8, 8), 0 to 16 in the source
    labels = torch.from_numpy(digits.target).long()
    n = 1297  # of scikit-learn's 1,797; they come writer by writer, so the last 500 are by other writers
    generator = torch.Generator().manual_seed(0)
    warped = (torch.arange(n * VERSIONS) % VERSIONS > 0).double()
    warp = _affine(
        rotation=_uniform(generator, n * VERSIONS, -0.2, 0.2) * warped,
        shear=_uniform(generator, n * VERSIONS, -0.2, 0.2) * warped,
        zoom=1 + _uniform(generator, n * VERSIONS, -0.12, 0.08) * warped,
        shift=_uniform(generator, (n * VERSIONS, 2), -0.07, 0.07) * warped[:, None],
    )
    train = _enlarge(images[:n].repeat_interleave(VERSIONS, 0), warp)
    test = _enlarge(images[n:], torch.eye(2, 3, dtype=torch.float64))
    return train, labels[:n].repeat_interleave(VERSIONS), test, labels[n:]


def _enlarge(images: Tensor, warp: Tensor) -> Tensor:
    """(N, 1, 8, 8) in [0, 1] -> (N, 1, 28, 28) uint8: bicubic, the 8 pixels 24 wide, as MNIST leaves a margin."""
    grid = F.affine_grid((warp * 28 / 24).expand(len(images), 2, 3), (len(images), 1, 28, 28), align_corners=False)
    return _to_uint8(F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False))


# --- house numbers ---------------------------------------------------------------------------------------------

FONTS = (  # the TrueType fonts with lining figures that ship inside matplotlib
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneralBol", "cmss10", "cmb10"),
)
CELL, FIGURE = 48, 32  # pixels: a glyph's cell, and a figure's height in it


def house_numbers(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` drawn crops of house numbers in SVHN's format: images (n, 3, 32, 32) uint8 and labels (n,) int64.

    The label is the digit in the middle; parts of neighbouring digits may show at the sides, as in SVHN. Classes
    take turns (label i is i mod 10). The same arguments give the same images; seeds give independent ones.

    Half of the figures are lighter than their wall and half are darker, as in SVHN: the mean of both shows no figure,
    so that a decoder needs a private code to draw one.

    Raises DMVAEError for a font that matplotlib does not ship.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    # 500 images at a time: the working set stays within the caches.
    return torch.cat([_draw(part, generator) for part in labels.split(500)]), labels


@cache
def _glyphs() -> Tensor:
    """(fonts, 10, CELL, CELL) in [0, 1]: every figure in every font, one height, centred."""
    import matplotlib  # here, because only drawing needs it

    atlas = np.zeros((len(FONTS), 10, CELL, CELL), np.float32)
    for row, name in enumerate(FONTS):
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
        try:
            # Fonts differ in how much of their size a figure takes: measure a zero, then scale.
            _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("0")
            font = ImageFont.truetype(path, 100 * FIGURE / (bottom - top))
        except OSError as error:
            raise DMVAEError(f"house_numbers: cannot read the font {path} ({error}); reinstall matplotlib.") from error
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            cell = Image.new("L", (CELL, CELL))
            origin = ((CELL - left - right) / 2, (CELL - top - bottom) / 2)
            ImageDraw.Draw(cell).text(origin, str(digit), fill=255, font=font)
            atlas[row, digit] = np.asarray(cell, np.float32) / 255
    return torch.from_numpy(atlas).double()


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) labels -> (n, 3, 32, 32) uint8."""
    n = len(labels)
    ink = _write(labels, generator)  # (n, 1, 32, 32), how much of each pixel the figures cover

    # Grey of what is darker, wall or figure; the other is lighter by the contrast.
    grey = _uniform(generator, (n, 1), 0.05, 0.45)
    contrast = _uniform(generator, (n, 1), 0.4, 0.75)
    # Warm to cold light, the same on wall and figure; beyond it walls and figures have little colour of their own.
    warmth = 0.25 * _normal(generator, n, 1, 1) * torch.tensor([1.0, 0.0, -1.0])
    tint = warmth + 0.06 * _normal(generator, n, 2, 3)
    tint = tint - tint.mean(-1, keepdim=True)  # colour, not lightness: that is the contrast's
    background = (grey + tint[:, 0]).clamp(0.02, 0.98)[..., None, None]
    foreground = (grey + contrast + tint[:, 1]).clamp(0.02, 0.98)[..., None, None]
    swapped = _chance(generator, (n, 1, 1, 1), 0.5)
    background, foreground = background.lerp(foreground, swapped), foreground.lerp(background, swapped)
    texture = _normal(generator, n, 1, 4, 4) + 0.2 * _normal(generator, n, 3, 4, 4)
    texture = texture * _uniform(generator, (n, 1, 1, 1), 0, 0.07)
    texture = F.interpolate(texture, size=(32, 32), mode="bicubic", align_corners=False)
    axis = torch.linspace(-1, 1, 32, dtype=torch.float64)
    slope = _normal(generator, n, 2, 1, 1, 1) * 0.15
    shading = slope[:, 0] * axis + slope[:, 1] * axis[:, None]  # the light comes from one side
    # A third of the figures stand off the wall and cast a shadow down to the right.
    shadow = F.pad(ink, (1, 0, 1, 0))[..., :-1, :-1] * (1 - ink)
    shadow = shadow * _uniform(generator, (n, 1, 1, 1), 0.1, 0.5) * _chance(generator, (n, 1, 1, 1), 0.33)
    image = (background + texture) * (1 - shadow) * (1 - ink) + (foreground + 0.5 * texture) * ink + shading

    # Out of focus and shaken: a Gaussian blur of its own width along each axis, as a matrix product.
    width = _uniform(generator, (n, 1, 1, 1), 0.4, 1.6)
    image = _blur(width * _uniform(generator, (n, 1, 1, 1), 0.8, 1.25)) @ image
    image = image @ _blur(width * _uniform(generator, (n, 1, 1, 1), 0.8, 1.25)).mT
    noise = _normal(generator, n, 3, 32, 32) * _uniform(generator, (n, 1, 1, 1), 0, 0.02)
    return _to_uint8(image + noise)


def _write(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The coverage (n, 1, 32, 32) of each digit in the middle and its neighbours, where it has any, beside it."""
    n = len(labels)
    font = torch.randint(len(FONTS), (n, 1), generator=generator)
    digits = torch.randint(10, (n, 3), generator=generator)
    digits[:, 1] = labels
    present = _chance(generator, (n, 3), 0.2)
    present[:, 1] = 1

    height = _uniform(generator, n, 24, 28)  # of the figures, in pixels
    rotation, shear = (_normal(generator, n).mul(0.05).clamp(-0.15, 0.15) for _ in range(2))
    shift = _normal(generator, n, 2).mul(0.025).clamp(-0.07, 0.07)
    warp = _affine(rotation, shear, height / 32 * CELL / FIGURE, shift)
    warp[:, 0] *= _uniform(generator, n, 1.0, 1.12)[:, None]  # house numbers are often narrow
    grid = F.affine_grid(warp, (n, 1, 32, 32), align_corners=False)  # (n, 32, 32, 2), in the middle glyph's cell
    advance = _uniform(generator, (n, 1), 0.8, 1.0) * 2 * FIGURE / CELL  # from one figure to the next, in the cell
    slots = torch.tensor([-1.0, 0.0, 1.0]) * advance  # (n, 3)
    grid = grid[:, None] - torch.stack([slots, torch.zeros_like(slots)], -1)[:, :, None, None]
    glyphs = _glyphs()[font, digits].flatten(0, 1)[:, None]  # (3n, 1, CELL, CELL)
    covered = F.grid_sample(glyphs, grid.flatten(0, 1), padding_mode="zeros", align_corners=False)
    return (covered.view(n, 3, 32, 32) * present[..., None, None]).amax(1, keepdim=True)


def _blur(width: Tensor) -> Tensor:
    """(n, 1, 1, 1) standard deviations in pixels -> (n, 1, 32, 32) matrices that blur along one axis."""
    position = torch.arange(32.0, dtype=torch.float64)
    kernel = (-0.5 * ((position - position[:, None]) / width).square()).exp()
    return kernel / kernel.sum(-1, keepdim=True)


# --- helpers ---------------------------------------------------------------------------------------------------


def _affine(rotation: Tensor, shear: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """(n, 2, 3) maps from output to input coordinates; angles in radians, `shift` (n, 2) in half image sides."""
    cos, sin = rotation.cos() / zoom, rotation.sin() / zoom
    matrix = torch.stack([torch.stack([cos, sin + shear * cos], -1), torch.stack([-sin, cos - shear * sin], -1)], -2)
    return torch.cat([matrix, -(matrix @ shift[..., None])], -1)


def _uniform(generator: torch.Generator, shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _chance(generator: torch.Generator, shape: tuple[int, ...], probability: float) -> Tensor:
    return (torch.rand(shape, generator=generator) < probability).double()


def _to_uint8(images: Tensor) -> Tensor:
    # Enlarged sixteenths often end half way between two levels, and processors differ in the last digit: all go up.
    return images.mul(255).add(1e-6).round().clamp(0, 255).to(torch.uint8)
