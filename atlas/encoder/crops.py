"""Training crops for the encoder: flags as the runtime cuts them out of scenes, drawn one at a time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from atlas import scenes
from atlas.scenes import PlacedFlag
from gog_edge.types import Box, Pixels, Size

PAD = 0.04  # the runtime's margin around a box, relative to its width and height
JITTER = 0.08  # largest error of each side of a policy's box, relative to its length
_BACKGROUND = Size(480, 360)


def draw_backgrounds(count: int, seed: int) -> list[Image.Image]:
    """Draw scene backgrounds of 480x360 pixels."""
    return [scenes.draw_background(np.random.default_rng([seed, 5, k]), _BACKGROUND) for k in range(count)]


def crop_padded(pixels: Pixels, box: Box, pad: float = PAD) -> Pixels:
    """Return the box and its margin, clipped to the picture: [h, w, 3], each side at least two pixels."""
    height, width = pixels.shape[:2]
    x0, x1 = round(box.x0 - pad * box.width), round(box.x1 + pad * box.width)
    y0, y1 = round(box.y0 - pad * box.height), round(box.y1 + pad * box.height)
    x0, y0 = min(max(x0, 0), width - 2), min(max(y0, 0), height - 2)
    return pixels[y0 : max(min(y1, height), y0 + 2), x0 : max(min(x1, width), x0 + 2)]


def squash(pixels: Pixels, side: int) -> Pixels:
    """Resize as the encoder does: bicubic to `side` x `side` pixels without keeping the aspect ratio."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


class CropMaker:
    """Draws a flag on a piece of background with the distortions that scenes apply, and crops it."""

    def __init__(self, flags: Sequence[Pixels], *, seed: int, backgrounds: int = 240) -> None:
        self._flags = flags  # neighbouring flags are sampled from these
        self._backgrounds = draw_backgrounds(backgrounds, seed)
        self._rng = np.random.default_rng([seed, 9])

    def crop(self, flag: Pixels, side: int) -> Pixels:
        """Return a random view of the flag, resized as by the encoder: [side, side, 3] uint8."""
        rng = self._rng
        width = int(np.exp(rng.uniform(np.log(40), np.log(300))))
        canvas, item = self._draw(flag, width)
        if rng.random() < 0.5:
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5 + width / 250)))
        pixels = np.asarray(canvas, dtype=np.float32) * rng.uniform(0.7, 1.15) * rng.uniform(0.94, 1.06, 3)
        pixels += rng.normal(0, 1, (*pixels.shape[:2], 1)) * rng.uniform(0, 6)
        shown = np.clip(pixels, 0, 255).astype(np.uint8)
        x0, y0, x1, y1 = item.bounds
        box = Box(x0 * canvas.width, y0 * canvas.height, x1 * canvas.width, y1 * canvas.height)
        view = crop_padded(shown, self._jittered(box), PAD * rng.uniform(0, 1.5))
        if rng.random() < 0.25:
            view = self._jpeg(view)
        return squash(view, side)

    def _jittered(self, box: Box) -> Box:
        """Return the box with errors like a policy's; sometimes much too wide, as for a flag that fills the picture."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.2:
            return box
        low, high = (-JITTER, JITTER) if kind < 0.9 else (0.0, 0.17)
        left, top, right, bottom = rng.uniform(low, high, 4)
        return Box(
            box.x0 - left * box.width,
            box.y0 - top * box.height,
            box.x1 + right * box.width,
            box.y1 + bottom * box.height,
        )

    def negative(self, side: int) -> Pixels:
        """Return a crop that shows no single flag: a scene of several, background, or a misplaced box.

        Shape [side, side, 3], uint8.
        """
        rng = self._rng
        if rng.random() < 0.2:
            background = np.asarray(self._backgrounds[rng.integers(len(self._backgrounds))])
            return squash(self._window(background, []), side)
        count = int(rng.integers(2, scenes.MAX_FLAGS + 1))
        chosen = [self._flags[k] for k in rng.integers(len(self._flags), size=count)]
        spec = scenes.make_spec(int(rng.integers(2**31)), [str(k) for k in range(len(chosen))])
        picture = scenes.draw_scene(spec, {str(k): flag for k, flag in enumerate(chosen)}, int(rng.integers(140, 260)))
        if rng.random() < 0.6:
            return squash(picture, side)
        size = Size(picture.shape[1], picture.shape[0])
        return squash(self._window(picture, [spec.box(k, size) for k in range(len(chosen))]), side)

    def _window(self, picture: Pixels, flags: Sequence[Box]) -> Pixels:
        """Return a random part of the picture with IoU below 0.3 for every flag; the whole picture if none is found."""
        rng = self._rng
        height, width = picture.shape[:2]
        for _ in range(20):
            w, h = width * rng.uniform(0.15, 0.6), height * rng.uniform(0.15, 0.6)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = Box(x, y, x + w, y + h)
            if all(box.iou(flag) < 0.3 for flag in flags):
                return crop_padded(picture, box, 0)
        return picture

    def _draw(self, flag: Pixels, width: int) -> tuple[Image.Image, PlacedFlag]:
        rng = self._rng
        size = Size(int(width * 1.5), int(width * 0.75 * 1.5))
        background = self._backgrounds[rng.integers(len(self._backgrounds))]
        scale = rng.uniform(0.3, 1)
        w, h = int(_BACKGROUND.width * scale), int(_BACKGROUND.height * scale)
        left, top = int(rng.integers(_BACKGROUND.width - w + 1)), int(rng.integers(_BACKGROUND.height - h + 1))
        canvas = background.resize((size.width, size.height), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        cell = (0.15, 0.15, 0.85, 0.85)
        corners = scenes.sample_corners(rng, cell, size.width / size.height, fill=(0.85, 1.0))
        occluder = None
        item = PlacedFlag("", corners, float(rng.uniform(0.8, 1.2)))
        if rng.random() < 0.22:
            occluder = scenes.sample_occluder(rng, item.bounds)
            item = PlacedFlag("", corners, item.light, occluder)
        if rng.random() < 0.12:
            self._paste_neighbour(canvas, item)
        scenes.paste_flag(canvas, flag, item)
        if occluder is not None:
            scenes.draw_occluder(canvas, occluder)
        return canvas, item

    def _paste_neighbour(self, canvas: Image.Image, item: PlacedFlag) -> None:
        """Paste another flag next to this one, so that the crop may include its edge."""
        rng = self._rng
        x0, y0, x1, y1 = item.bounds
        side = 1 if rng.random() < 0.5 else -1
        gap = rng.uniform(1.02, 1.1)
        dx, dy = (side * gap * (x1 - x0), 0.0) if rng.random() < 0.6 else (0.0, side * gap * (y1 - y0))
        a, b, c, d = ((x + dx, y + dy) for x, y in item.corners)
        flag = self._flags[int(rng.integers(len(self._flags)))]
        scenes.paste_flag(canvas, flag, PlacedFlag("", (a, b, c, d), 1.0))

    def _jpeg(self, view: Pixels) -> Pixels:
        stream = io.BytesIO()
        Image.fromarray(view).save(stream, "JPEG", quality=int(self._rng.integers(45, 95)))
        return np.asarray(Image.open(stream))
