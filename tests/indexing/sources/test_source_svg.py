"""SVG drawings in any unit and encoding, compressed or not; nothing outside of the file is read."""

import gzip
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from gog_edge.errors import PictureError
from gog_edge.indexing.sources.svg import MAX_SVG_BYTES, decode_svg, is_svg, render_svg

SPACE = 'xmlns="http://www.w3.org/2000/svg"'
RECT = '<rect width="100%" height="100%" fill="#ff0000"/>'


def drawing(attributes='width="100" height="80"', inside=RECT, declaration=""):
    return f"{declaration}<svg {SPACE} {attributes}><title>Größe</title>{inside}</svg>"


def rendered(data):
    return Image.open(io.BytesIO(render_svg(data if isinstance(data, bytes) else data.encode(), 320))).convert("RGB")


@pytest.mark.parametrize(
    ("attributes", "ratio"),
    [
        ('width="100" height="80"', 1.25), ('width="100px" height="80px"', 1.25), ('width="210mm" height="297mm"',
                                                                                   210 / 297),
        ('width="21cm" height="29.7cm"', 210 / 297), ('width="2in" height="1in"', 2), ('width="100pt" height="50pt"',
                                                                                       2),
        ('width="10pc" height="5pc"', 2), ('width="10em" height="5em"', 2), ('width="10ex" height="5ex"', 2),
        ('width="1in" height="96px"', 1), ('width="72pt" height="25.4mm"', 1), ('width="6pc" height="2.54cm"', 1),
        ('width="100%" height="100%" viewBox="0 0 100 50"', 2), ('viewBox="0 0 100 50"', 2), ('viewBox="0,0,100,50"',
                                                                                              2),
        ('width="50vw" height="auto" viewBox="0 0 100 50"', 2), ('width="200mm" viewBox="0 0 100 50"', 2),
        ('width="1e3mm" height="5e2mm"', 2), ('width="900000mm" height="450000mm"', 2),
    ],
)  # fmt: skip
def test_sizes_in_any_unit(attributes, ratio):
    image = rendered(drawing(attributes))
    assert max(image.size) == 320 and image.size[0] / image.size[1] == pytest.approx(ratio, rel=0.02)
    assert image.getpixel((image.size[0] // 2, image.size[1] // 2)) == (255, 0, 0)


def test_a_drawing_without_size_is_as_large_as_its_content():
    image = rendered(f'<svg {SPACE}><rect width="90" height="60" fill="#ff0000"/></svg>')
    assert image.size[0] == 320 and image.getpixel((160, 100)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("declared", "codec"),
    [("ISO-8859-1", "latin-1"), ("iso-8859-15", "iso8859-15"), ("Windows-1252", "cp1252"), ("windows-1250", "cp1250"),
     ("UTF-8", "utf-8"), ("UTF-8", "utf-8-sig"), ("UTF-16", "utf-16"), ("utf-16", "utf-16-le"), ("UTF-16BE",
                                                                                                 "utf-16-be"),
     ("Shift_JIS", "shift_jis"), ("GB18030", "gb18030"), ("macintosh", "mac_roman"), ("UTF-16", "utf-8")],
)  # fmt: skip
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "svgz"])
def test_any_declared_encoding(declared, codec, pack):
    text = drawing(declaration=f'<?xml version="1.0" encoding="{declared}" standalone="no"?>\n<!-- made -->\n')
    if codec == "shift_jis":
        text = text.replace("Größe", "大きさ")
    data = pack(text.encode(codec))
    assert is_svg(data) and rendered(data).getpixel((100, 100)) == (255, 0, 0)
    assert ("大きさ" if codec == "shift_jis" else "Größe") in decode_svg(data)


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_undeclared_encodings_that_the_first_bytes_show(codec):
    data = drawing().encode(codec)
    assert is_svg(data) and rendered(data).getpixel((100, 100)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["utf-9", "idna", "punycode", "zip", "unicode_escape", "base64", "x" * 40])
def test_unknown_encodings_are_refused(name):
    with pytest.raises(PictureError, match="decoded"):
        render_svg(drawing(declaration=f'<?xml version="1.0" encoding="{name}"?>').encode(), 320)


def test_bytes_that_do_not_fit_the_encoding_are_refused():
    with pytest.raises(PictureError, match="save it as UTF-8"):
        render_svg(drawing().encode("latin-1"), 320)


def test_the_namespaces_of_adobe_illustrator_are_expanded():
    doctype = ('<?xml version="1.0" encoding="utf-8"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
               '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd" [\n\t<!ENTITY ns_svg "http://www.w3.org/2000/svg">\n'
               '\t<!ENTITY ns_xlink \'http://www.w3.org/1999/xlink\'>\n\t<!ENTITY colour "#ff0000">\n]>\n')
    text = (f'{doctype}<svg xmlns="&ns_svg;" xmlns:xlink="&ns_xlink;" width="100" height="80">'
            '<rect width="90" height="70" fill="&colour;"/></svg>')
    assert rendered(text).getpixel((100, 100)) == (255, 0, 0)


@pytest.mark.parametrize(
    "doctype",
    ['<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>',
     '<!DOCTYPE svg [<!ENTITY b SYSTEM "file:///etc/hostname">]>',
     '<!DOCTYPE svg [<!ENTITY % b "x">]>', '<!DOCTYPE svg [<!ENTITY b "<rect/>">]>',
     "<!DOCTYPE svg [" + "".join(f'<!ENTITY e{n} "x">' for n in range(65)) + "]>"],
    ids=["nested", "external", "parameter", "markup", "many"],
)  # fmt: skip
def test_other_entities_are_refused(doctype):
    with pytest.raises(PictureError, match="entities"):
        render_svg((doctype + drawing(inside="<desc>&b;</desc>")).encode(), 320)


def test_entities_that_expand_beyond_the_limit_are_refused():
    text = f'<!DOCTYPE svg [<!ENTITY a "{"x" * 1000}">]>' + drawing(inside=f"<desc>{'&a;' * 10_000}</desc>")
    with pytest.raises(PictureError, match="the limit is"):
        render_svg(text.encode(), 320)


def test_compressed_drawings_are_bounded():
    with pytest.raises(PictureError, match="the limit is"):
        render_svg(gzip.compress(b"<svg>" + b" " * (50 * MAX_SVG_BYTES)), 320)
    with pytest.raises(PictureError, match="twice"):
        render_svg(gzip.compress(gzip.compress(drawing().encode())), 320)
    whole = gzip.compress(drawing().encode())
    for data in (whole[: len(whole) // 2], whole[:12] + b"\xff" * 30):
        with pytest.raises(PictureError):
            render_svg(data, 320)


def test_nothing_is_fetched(tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    secret = tmp_path / "secret.png"
    Image.new("RGB", (60, 60), "blue").save(secret)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        inside = (f'<style>@import url("{base}/a.css"); rect {{ fill: #ff0000; filter: url({base}/f.svg#f) }} '
                  f'@font-face {{ font-family: f; src: url("{base}/f.woff") }}</style>{RECT}'
                  f'<use href="{base}/b.svg#c"/><use href="file://{secret}"/><text font-family="f">x</text>')
        rendered(f'<?xml-stylesheet href="{base}/s.css"?>' + drawing(inside=inside))
        for reference in (f"{base}/d.png", str(secret), f"file://{secret}", "secret.png", "../secret.png"):
            with pytest.raises(PictureError, match="refers to"):
                render_svg(drawing(inside=f'<image href="{reference}" width="9" height="9"/>').encode(), 320)
        server.shutdown()
    assert not asked


@pytest.mark.parametrize(
    "data",
    [b"<?xml " + b"encoding=" * 400_000, b'<?xml encoding="a" ' * 150_000, b"<!DOCTYPE svg [" + b"<!ENTITY " * 300_000,
     b"<svg " + b'a="' * 1_000_000, b"<!DOCTYPE svg []" + b" " * 4_000_000, b"<svg>" + b"&x;" * 1_000_000],
)  # fmt: skip
def test_malformed_drawings_are_refused_quickly(data):
    start = time.monotonic()
    is_svg(data)
    with pytest.raises(PictureError):
        render_svg(data, 320)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("attributes", ['width="0" height="0"', 'width="-5" height="9"'])
def test_drawings_without_area_are_refused(attributes):
    with pytest.raises(PictureError):
        render_svg(drawing(attributes).encode(), 320)


def test_prefixed_root_elements():
    text = ('<s:svg xmlns:s="http://www.w3.org/2000/svg" width="100" height="80"><s:rect width="100" height="80" '
            'fill="#ff0000"/></s:svg>')
    assert is_svg(text.encode()) and np.asarray(rendered(text))[100, 100].tolist() == [255, 0, 0]


@pytest.mark.parametrize("head", ["<!DOCTYPE html><html><body>", "<!-- page --><html>", "<?xml version='1.0'?><html>"])
def test_pages_that_contain_a_drawing_are_not_drawings(head):
    assert not is_svg(f"{head}<svg xmlns='http://www.w3.org/2000/svg'/>".encode())


@pytest.mark.parametrize("head", [
    "<?xml version='1.0'?><?xml-stylesheet href='a.css'?>\n<!-- <html> -->", "<!doctype svg>",
    '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd" [\n'
    '<!ENTITY ns "http://x.example">\n]>\n',
])  # fmt: skip
def test_what_may_precede_the_root_element(head):
    assert is_svg(f"{head}<svg xmlns='http://www.w3.org/2000/svg'/>".encode())
