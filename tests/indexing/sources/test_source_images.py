"""Thumbnails: images are stored unchanged where possible, and converted to small, safe files otherwise."""

import base64
import gzip
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from zim_world import drawing, picture

from gog_edge.errors import PictureError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.images import BEYOND_LIMITS, TOO_SMALL, UNDECODABLE, ThumbnailOptions, make_thumbnail
from gog_edge.indexing.sources.svg import MAX_SVG_BYTES, render_svg
from gog_edge.picture import decode_picture


def opened(data, **options):
    made = make_thumbnail(data, "x", ThumbnailOptions(**options))
    assert isinstance(made, bytes)
    return Image.open(io.BytesIO(made))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
def test_images_that_can_be_served_are_unchanged(kind):
    data = picture(1, kind)
    assert make_thumbnail(data, "x") is data


def test_images_above_320_pixels_are_reduced():
    assert opened(picture(1, "PNG", 320, 200)).format == "PNG"
    assert opened(picture(1, "PNG", 321, 200)).size == (320, 199)
    assert opened(picture(1, "JPEG", 3000, 1000)).size == (320, 107)
    assert opened(picture(1, "JPEG", 300, 1000), max_side=100).size == (30, 100)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_become_webp(kind):
    shown = opened(picture(3, kind))
    assert (shown.format, shown.size) == ("WEBP", (220, 160))


def test_cmyk_and_16_bit_images_become_webp():
    assert opened(picture(4, "JPEG", mode="CMYK")).format == "WEBP"
    grey = Image.fromarray(np.arange(80 * 80, dtype=np.uint16).reshape(80, 80) * 10)
    assert opened(saved(grey, "PNG")).format == "WEBP"


def test_animations_become_their_first_frame():
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG", "GIF"):
        shown = opened(saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=90))
        assert shown.format == "WEBP" and not getattr(shown, "is_animated", False)
        assert np.allclose(np.asarray(shown.convert("RGB"))[40, 40], (255, 0, 0), atol=12)


def test_exif_rotation_is_applied():
    image = Image.open(io.BytesIO(picture(5, "PNG", 200, 100)))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(saved(image, "JPEG", exif=exif)).size == (100, 200)


def test_svg_is_rendered():
    shown = opened(drawing(1))
    assert shown.size == (320, 214)
    assert opened(b'<?xml version="1.0"?>\n<!-- made -->\n' + drawing(1)).size == (320, 214)


SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="60" height="60">'
       "{}</svg>")


@pytest.mark.parametrize(
    "inside",
    [
        '<image width="60" height="60" xlink:href="/etc/hostname"/>',
        '<image width="60" height="60" href=" file:///etc/hostname"/>',
        "<g>" * 5000 + "</g>" * 5000,
        "<g>",
    ],
    ids=["path", "address", "deep", "open"],
)
def test_svg_with_external_references_or_excessive_depth_is_skipped(inside):
    assert make_thumbnail(SVG.format(inside).encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


def test_large_svg_is_skipped():
    assert make_thumbnail(SVG.format("<rect/>" * 700_000).encode(), "a.svg") == Skipped(BEYOND_LIMITS, "a.svg")


def as_uri(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def nested_drawing(depth):
    inner = SVG.format("<rect/>")
    for _ in range(depth):
        inner = SVG.format(f'<image width="60" height="60" href="{as_uri(inner.encode(), "image/svg+xml")}"/>')
    return inner


@pytest.mark.parametrize("kind", ["image/svg+xml", " IMAGE/SVG+XML", "text/plain", "", "image/svg+xml;x=image/png"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("element", ["image", "feImage", "s:image"])
def test_svg_that_embeds_svg_is_refused(kind, pack, element):
    uri = as_uri(pack(SVG.format("<rect/>").encode()), kind)
    inside = f'<{element} xmlns:s="http://www.w3.org/2000/svg" width="60" height="60" xlink:href="{uri}"/>'
    with pytest.raises(PictureError, match="PNG, JPEG"):
        render_svg(SVG.format(inside).encode(), 60)


def test_recursively_embedded_svg_is_skipped():
    assert make_thumbnail(nested_drawing(20).encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


@pytest.mark.parametrize(("kind", "form"), [("PNG", "image/png"), ("JPEG", "Image/JPEG"), ("WEBP", " image/webp")])
def test_pictures_embedded_in_svg_are_rendered(kind, form):
    uri = as_uri(saved(Image.new("RGB", (60, 60), (255, 0, 0)), kind), form.strip())
    shown = SVG.format(f'<image width="60" height="60" xlink:href="{" " * form.startswith(" ")}{uri}"/>')
    pixels = decode_picture(render_svg(shown.encode(), 60)).pixels
    assert pixels[30, 30].tolist() == pytest.approx([255, 0, 0], abs=12)


@pytest.mark.parametrize("count", [1, 4])
def test_decompression_bombs_in_svg_are_refused(count):
    """One picture of 36 megapixels, or four of 9 megapixels, each a file of a few kilobytes."""
    side = 6000 // count**0.5
    uri = as_uri(saved(Image.new("1", (int(side), int(side))), "PNG"), "image/png")
    shown = SVG.format(f'<image width="60" height="60" href="{uri}"/>' * count)
    with pytest.raises(PictureError, match="the limit is"):
        render_svg(shown.encode(), 60)


@pytest.mark.parametrize(
    "data", ["data:image/png;base64,AAA", "data:image/png,", "data:image/png", "data:image/gif,GIF89a"]
)
def test_svg_with_invalid_embedded_pictures_is_skipped(data):
    shown = SVG.format(f'<image width="60" height="60" href="{data}"/>')
    assert make_thumbnail(shown.encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


def test_svg_with_entities_is_skipped():
    bomb = '<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + SVG.format("<text>&b;</text>")
    assert make_thumbnail(bomb.encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


def test_svg_with_an_extreme_aspect_ratio_takes_little_memory():
    strip = SVG.replace('height="60"', 'height="60000000"').format("<rect width='9' height='9'/>")
    assert make_thumbnail(strip.encode(), "a.svg") == Skipped(TOO_SMALL, "a.svg")


def test_moderately_nested_svg_is_rendered():
    inside = "<g>" * 150 + '<rect width="60" height="60" fill="#ff0000"/>' + "</g>" * 150
    made = make_thumbnail(SVG.format(inside).encode(), "a.svg")
    assert decode_picture(made).pixels[160, 160].tolist() == pytest.approx([255, 0, 0], abs=12)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", picture(6)[:200], picture(6, "JPEG")[:1500], b"<svg", b"<?xml <svg"]
)
def test_undecodable_images_are_skipped(data):
    assert make_thumbnail(data, "a.webp") == Skipped(UNDECODABLE, "a.webp")


def test_icons_are_skipped_by_their_size():
    assert make_thumbnail(picture(7, "PNG", 300, 47), "a.png") == Skipped(TOO_SMALL, "a.png")
    assert opened(picture(7, "PNG", 300, 47), min_side=1).size == (300, 47)


def test_decompression_bombs_are_skipped():
    data = saved(Image.new("L", (20_000, 20_000)), "PNG")
    assert make_thumbnail(data, "a.png") == Skipped(BEYOND_LIMITS, "a.png")


def test_errors_of_limits_are_told_by_an_attribute():
    bomb = saved(Image.new("L", (20_000, 20_000)), "PNG")
    large_svg = b"<svg>" + b" " * MAX_SVG_BYTES
    assert make_thumbnail(large_svg, "a.svg") == Skipped(BEYOND_LIMITS, "a.svg")
    for data, beyond in ((bomb, True), (b"not a picture", False)):
        with pytest.raises(PictureError) as caught:
            decode_picture(data)
        assert caught.value.beyond_limits is beyond and type(caught.value) is PictureError
        assert pickle.loads(pickle.dumps(caught.value)).beyond_limits is beyond


def test_thumbnails_are_deterministic():
    assert make_thumbnail(picture(8, "BMP"), "x") == make_thumbnail(picture(8, "BMP"), "y")
