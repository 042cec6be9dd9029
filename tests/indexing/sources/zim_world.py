"""Writes ZIM files of generated articles with libzim: images in four formats, both figure formats, redirects."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from libzim.writer import Compression, Creator, Hint, Item, StringProvider
from PIL import Image

ARTICLES = 3000
PICTURES = 240
WIKIPEDIA = {"Title": "Made world", "Name": "wikipedia_en_made", "Date": "2026-08-15", "Language": "eng",
             "Creator": "Wikipedia", "Flavour": "maxi", "Publisher": "nobody"}  # fmt: skip
_WORDS = (
    "river", "castle", "bridge", "painter", "valley", "harbour", "museum", "tower", "battle", "garden", "market",
    "temple", "island", "forest", "railway", "station", "cathedral", "mountain", "village", "lake", "theatre",
    "sculpture", "dynasty", "festival", "glacier", "lighthouse",
)  # fmt: skip
_VERBS = ("crosses", "overlooks", "resembles", "replaced", "inspired", "borders", "preceded", "surrounds")
FOREIGN = {"Москва": "Вид на реку зимой", "القاهرة": "منظر النهر ليلا", "東京": "夜の川の眺め"}


class Entry(Item):
    """An entry of a ZIM file."""

    def __init__(self, path, title, content, mimetype="text/html"):
        super().__init__()
        self._path, self._title, self._content, self._mimetype = path, title, content, mimetype

    def get_path(self):
        return self._path

    def get_title(self):
        return self._title

    def get_mimetype(self):
        return self._mimetype

    def get_contentprovider(self):
        return StringProvider(self._content)

    def get_hints(self):
        return {Hint.FRONT_ARTICLE: self._mimetype == "text/html"}


def write_zim(path: Path, entries, redirects=(), metadata=WIKIPEDIA, *, packed=True, cluster=2**21) -> Path:
    """Write entries (path, title, content, mimetype) and redirects (path, title, target); `cluster` is in bytes."""
    creator = Creator(path).config_indexing(False, "eng").config_clustersize(cluster)
    with creator.config_compression(Compression.zstd if packed else Compression.none):
        creator.set_mainpath("A0000")
        for entry in entries:
            creator.add_item(Entry(*entry))
        for name, title, target in redirects:
            creator.add_redirection(name, title, target, {Hint.FRONT_ARTICLE: True})
        for name, value in metadata.items():
            creator.add_metadata(name, value)
    return path


def picture(seed: int, kind: str = "WEBP", width: int = 220, height: int = 160, **options) -> bytes:
    """Return an image file with random colours."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.convert(options.pop("mode", "RGB")).save(out, kind, **options)
    return out.getvalue()


def drawing(seed: int) -> bytes:
    """Return an SVG file."""
    red, green, x = (seed * 37) % 256, (seed * 91) % 256, seed % 60
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 120 80"><rect width="120" height="80" '
            f'fill="rgb({red},{green},90)"/><circle cx="{20 + x}" cy="40" r="18" fill="white"/></svg>').encode()


def picture_path(number: int) -> str:
    """Return the path of a picture in the ZIM file."""
    return f"_assets_/{number % 16:x}/p{number}.{('webp', 'png', 'jpg', 'svg')[number % 4]}"


def pictures():
    """Yield (path, title, content, mimetype) of all pictures."""
    for number in range(PICTURES):
        path = picture_path(number)
        kind = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG", "svg": "SVG"}[path.rpartition(".")[2]]
        data = drawing(number) if kind == "SVG" else picture(number, kind)
        yield path, "", data, f"image/{kind.lower() + ('+xml' if kind == 'SVG' else '')}"


def sentence(rng: np.random.Generator) -> str:
    """Return a random sentence."""
    a, b, c, verb, year = rng.integers(0, 2**16, 5).tolist()
    word = _WORDS[a % len(_WORDS)], _WORDS[b % len(_WORDS)].title(), _WORDS[c % len(_WORDS)]
    return f"The old {word[0]} of {word[1]} {_VERBS[verb % len(_VERBS)]} the {word[2]} since {900 + year % 1100}."


def paragraph(rng: np.random.Generator) -> str:
    """Return the HTML of a paragraph with links and references."""
    parts = [f'{sentence(rng)} <a href="A{rng.integers(ARTICLES):04d}" title="x">{sentence(rng)}</a>'
             f'<sup id="c" class="reference"><a href="#n">[{k}]</a></sup>' for k in range(int(rng.integers(2, 7)))]
    return f"<p>{' '.join(parts)}</p>\n"


def figure(number: int, caption: str, older: bool) -> str:
    """Return the HTML of a figure, as <figure> or as MediaWiki wrote it before."""
    image = f'<a href="File:P"><img src="./{picture_path(number)}" width="220" height="160" alt="p{number}.jpg"></a>'
    if older:
        return (f'<div class="thumb tright"><div class="thumbinner">{image}<div class="thumbcaption">'
                f'<div class="magnify"></div>{caption}</div></div></div>')
    return f'<figure typeof="mw:File/Thumb" class="mw-halign-right">{image}<figcaption>{caption}</figcaption></figure>'


def infobox(number: int, name: str, height: int) -> str:
    """Return the HTML of an infobox with a picture and two facts."""
    return (f'<table class="infobox vcard"><tbody><tr><th colspan="2">{name}</th></tr><tr><td colspan="2" '
            f'class="infobox-image"><img src="{picture_path(number)}" width="250"><div class="infobox-caption">{name} '
            f'seen from afar</div></td></tr><tr><th scope="row">Height</th><td>{height}&nbsp;m</td></tr><tr><th>Founded'
            f"</th><td>{900 + height}</td></tr></tbody></table>")


def article_html(number: int) -> str:
    """Return a page with everything that surrounds the text of a Wikipedia page."""
    rng = np.random.default_rng([number, 5])
    name, older = f"Place {number}", number % 2 == 0
    shown = [int(k) for k in rng.integers(0, PICTURES, 2)]
    html = [f'<html lang="en"><head><title>{name}</title><style>.x{{}}</style></head><body><main id="content">'
            f'<header><h1 id="firstHeading">{name}</h1></header><div id="contentSub">Subtitle</div>'
            '<div id="mw-content-text" class="mw-body-content"><div class="mw-parser-output">']
    first = figure(shown[0], f"{name} in <i>winter</i>", older)
    html += [infobox(shown[0], name, number) if number % 3 == 0 else first]
    html += ['<div class="hatnote">For others, see others.</div>', paragraph(rng), paragraph(rng)]
    for title in ("History", "Geography"):
        html.append(f'<div class="mw-heading"><h2>{title}</h2><span class="mw-editsection">[edit]</span></div>')
        html += [paragraph(rng) for _ in range(int(rng.integers(1, 5)))]
    html += ["<h3>Early years</h3>", paragraph(rng), figure(shown[1], f"The {name} today", older)]
    html.append(f"<ul>{''.join(f'<li>{sentence(rng)}</li>' for _ in range(4))}</ul>")
    html.append('<h2>References</h2><div class="reflist"><ol>' + "<li>A book.</li>" * 20 + "</ol></div>")
    html.append('<div class="navbox"><table>' + "<tr><td>a · b</td></tr>" * 15 + "</table></div></div>")
    html.append('<!--htdig_noindex--><div><div style="clear:both">This article is issued from <a class="external text">'
                "Wikipedia</a>.</div></div><!--/htdig_noindex--></div></main></body></html>")
    return "".join(html)


def articles(count: int):
    """Yield (path, title, content, mimetype) of all articles, the last three in other scripts."""
    for number in range(count):
        yield f"A{number:04d}", f"Place {number}", article_html(number), "text/html"
    for number, (title, caption) in enumerate(FOREIGN.items()):
        html = f"<body><p>{title}: {caption}。</p>{figure(number, caption, older=number % 2 == 0)}</body>"
        yield title, title, html, "text/html"


def odd_entries():
    """Yield entries that cannot be used, or only in part."""
    inline = base64.b64encode(picture(9001, "PNG")).decode()
    pages = {
        "Odd_broken": '<img src="_assets_/broken.webp" width="200">',
        "Odd_missing": '<img src="_assets_/none.webp"><img src="http://x/y.png">',
        "Odd_inline": f'<img src="data:image/png;base64,{inline}" alt="Inside">',
        "Odd_icon": '<img src="i.png" width="20"><img src="_assets_/tiny.png">',
    }
    for path, html in pages.items():
        yield path, path.replace("_", " "), f"<body><p>Words about something.</p>{html}</body>", "text/html"
    yield "Odd_lost", "Odd lost", '<link href="./download_error_placeholder.css"><p>Oops.</p>', "text/html"
    yield "Odd_empty", "Odd empty", "<html><body><div class='navbox'>x</div></body></html>", "text/html"
    yield "Odd_gallery", "Odd gallery", figure(1, "Only a picture", older=True), "text/html"
    yield "_assets_/broken.webp", "", picture(9002)[:200], "image/webp"
    yield "_assets_/tiny.png", "", picture(9003, "PNG", 20, 20), "image/png"
    yield "style.css", "", "body {}", "text/css"


def redirects(count: int):
    """Yield (path, title, target) of a redirect to every third article, and of one to a picture."""
    for number in range(0, count, 3):
        yield f"Site_{number}", f"Site {number}", f"A{number:04d}"
    yield "Picture_of_it", "Picture of it", picture_path(0)


def write_world(path: Path, count: int = ARTICLES, metadata=WIKIPEDIA) -> Path:
    """Write articles, unusable entries, pictures and redirects."""
    entries = (*articles(count), *odd_entries(), *pictures())
    return write_zim(path, entries, redirects(count), metadata, packed=count < 1000)  # compressing more takes too long
