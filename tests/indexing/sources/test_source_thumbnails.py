"""Images as they will be served: kept where they can be, made small and safe otherwise."""

import base64
import gzip
import io

import numpy as np
import pytest
from PIL import Image
from zim_world import drawing, picture

from gog_edge.errors import PictureError
from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.images import TOO_SMALL, UNDECODABLE, ThumbnailRules, draw_svg, make_thumbnail
from gog_edge.picture import decode_picture


def opened(data, **options):
    made = make_thumbnail(data, "x", ThumbnailRules(**options))
    assert isinstance(made, bytes)
    return Image.open(io.BytesIO(made))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
def test_what_can_be_served_stays_as_it_is(kind):
    data = picture(1, kind)
    assert make_thumbnail(data, "x") is data


def test_the_largest_that_stays_has_320_pixels():
    assert opened(picture(1, "PNG", 320, 200)).format == "PNG"
    assert opened(picture(1, "PNG", 321, 200)).size == (320, 199)
    assert opened(picture(1, "JPEG", 3000, 1000)).size == (320, 107)
    assert opened(picture(1, "JPEG", 300, 1000), longest=100).size == (30, 100)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_become_webp(kind):
    shown = opened(picture(3, kind))
    assert (shown.format, shown.size) == ("WEBP", (220, 160))


def test_colours_of_print_and_deep_samples_become_webp():
    assert opened(picture(4, "JPEG", mode="CMYK")).format == "WEBP"
    grey = Image.fromarray(np.arange(80 * 80, dtype=np.uint16).reshape(80, 80) * 10)
    assert opened(saved(grey, "PNG")).format == "WEBP"


def test_animations_stand_still():
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG", "GIF"):
        shown = opened(saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=90))
        assert shown.format == "WEBP" and not getattr(shown, "is_animated", False)
        assert np.allclose(np.asarray(shown.convert("RGB"))[40, 40], (255, 0, 0), atol=12)


def test_pictures_are_set_upright():
    image = Image.open(io.BytesIO(picture(5, "PNG", 200, 100)))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert opened(saved(image, "JPEG", exif=exif)).size == (100, 200)


def test_drawings_are_drawn():
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
        "<rect/>" * 700_000,
    ],
    ids=["path", "address", "deep", "open", "large"],
)
def test_drawings_that_reach_out_or_too_deep_are_left_out(inside):
    assert make_thumbnail(SVG.format(inside).encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


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
def test_drawings_as_images_of_drawings_are_left_out(kind, pack, element):
    uri = as_uri(pack(SVG.format("<rect/>").encode()), kind)
    inside = f'<{element} xmlns:s="http://www.w3.org/2000/svg" width="60" height="60" xlink:href="{uri}"/>'
    with pytest.raises(PictureError, match="PNG, JPEG"):
        draw_svg(SVG.format(inside).encode(), 60)


def test_drawings_within_each_other_without_end_are_left_out():
    assert make_thumbnail(nested_drawing(20).encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


@pytest.mark.parametrize(("kind", "form"), [("PNG", "image/png"), ("JPEG", "Image/JPEG"), ("WEBP", " image/webp")])
def test_pictures_within_drawings_are_shown(kind, form):
    uri = as_uri(saved(Image.new("RGB", (60, 60), (255, 0, 0)), kind), form.strip())
    shown = SVG.format(f'<image width="60" height="60" xlink:href="{" " * form.startswith(" ")}{uri}"/>')
    pixels = decode_picture(draw_svg(shown.encode(), 60)).pixels
    assert pixels[30, 30].tolist() == pytest.approx([255, 0, 0], abs=12)


@pytest.mark.parametrize("count", [1, 4])
def test_bombs_within_drawings_are_not_unpacked(count):
    """One picture of 36 megapixels, and four of 9, of a few kilobytes each."""
    side = 6000 // count**0.5
    uri = as_uri(saved(Image.new("1", (int(side), int(side))), "PNG"), "image/png")
    shown = SVG.format(f'<image width="60" height="60" href="{uri}"/>' * count)
    with pytest.raises(PictureError, match="the limit is"):
        draw_svg(shown.encode(), 60)


@pytest.mark.parametrize(
    "data", ["data:image/png;base64,AAA", "data:image/png,", "data:image/png", "data:image/gif,GIF89a"]
)
def test_pictures_within_drawings_that_are_none_are_left_out(data):
    shown = SVG.format(f'<image width="60" height="60" href="{data}"/>')
    assert make_thumbnail(shown.encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


def test_drawings_with_entities_are_left_out():
    bomb = '<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + SVG.format("<text>&b;</text>")
    assert make_thumbnail(bomb.encode(), "a.svg") == Skipped(UNDECODABLE, "a.svg")


def test_drawings_of_outlandish_shape_cost_nothing():
    strip = SVG.replace('height="60"', 'height="60000000"').format("<rect width='9' height='9'/>")
    assert make_thumbnail(strip.encode(), "a.svg") == Skipped(TOO_SMALL, "a.svg")


def test_drawings_within_drawings_are_read_to_a_depth():
    inside = "<g>" * 150 + '<rect width="60" height="60" fill="#ff0000"/>' + "</g>" * 150
    made = make_thumbnail(SVG.format(inside).encode(), "a.svg")
    assert decode_picture(made).pixels[160, 160].tolist() == pytest.approx([255, 0, 0], abs=12)


@pytest.mark.parametrize(
    "data", [b"", b"no picture", picture(6)[:200], picture(6, "JPEG")[:1500], b"<svg", b"<?xml <svg"]
)
def test_what_does_not_decode_is_told(data):
    assert make_thumbnail(data, "a.webp") == Skipped(UNDECODABLE, "a.webp")


def test_icons_are_told_by_their_pixels():
    assert make_thumbnail(picture(7, "PNG", 300, 47), "a.png") == Skipped(TOO_SMALL, "a.png")
    assert opened(picture(7, "PNG", 300, 47), shortest=1).size == (300, 47)


def test_a_bomb_is_not_unpacked():
    data = saved(Image.new("L", (20_000, 20_000)), "PNG")
    assert make_thumbnail(data, "a.png") == Skipped(UNDECODABLE, "a.png")


def test_the_same_image_makes_the_same_bytes():
    assert make_thumbnail(picture(8, "BMP"), "x") == make_thumbnail(picture(8, "BMP"), "y")
