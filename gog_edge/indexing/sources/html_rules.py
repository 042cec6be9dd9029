"""What of a MediaWiki page is no article text: by class where there is one, so that it holds in every language."""

from __future__ import annotations

DROPPED = ", ".join(
    (
        "style", "script", "noscript", "template", "link", "meta", "audio", "video", "form", "nav", "footer", "object",
        ".mw-editsection", ".mw-empty-elt", ".mw-jump-link", ".printfooter", ".catlinks", ".toc", "#toc", ".magnify",
        "#contentSub", "#siteSub", ".subpages", ".zim-footer",
        ".navbox", ".navbox-styles", ".vertical-navbox", ".sidebar", ".authority-control", ".portalbox", ".portal",
        ".ambox", ".ombox", ".tmbox", ".cmbox", ".fmbox", ".mbox-small", ".metadata", ".sistersitebox", ".noprint",
        ".hatnote", ".dablink", ".rellink", ".shortdescription", ".nomobile",
        ".reference", ".mw-ref", ".mw-cite-backlink", ".reflist", ".references", ".mw-references-wrap", ".refbegin",
        ".geo-inline-hidden", ".geo-nondefault", ".geo-multi-punct", "#coordinates", ".coordinates", ".mw-kartographer",
        "[hidden]", "[role=navigation]", "[style*='display:none']", "[style*='display: none']",
    )
)  # fmt: skip
FOOTER = "<!--htdig_noindex-->", "<!--/htdig_noindex-->"  # around what Kiwix writes below an article
FORMULA = ".mwe-math-element"
MATH_IMAGE = "mwe-math"  # begins the classes of formulas drawn as images

INLINE = frozenset(
    (
        "a", "abbr", "b", "bdi", "bdo", "big", "br", "button", "cite", "code", "data", "del", "dfn", "em", "font", "i",
        "img", "input", "ins", "kbd", "label", "mark", "math", "picture", "q", "rb", "rp", "rt", "ruby", "s", "samp",
        "small", "source", "span", "strike", "strong", "sub", "sup", "svg", "time", "tt", "u", "var", "wbr",
    )
)  # fmt: skip
TEXT_BLOCKS = frozenset(("p", "blockquote", "pre", "figcaption", "address"))
LISTS = frozenset(("ul", "ol", "dl"))
HEADINGS = {"h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
LINE_STARTS = "p, div, li, dd, dt, tr, caption"
FIGURES = frozenset(("thumb", "gallery", "tmulti", "thumbinner"))  # classes: what stands in them are captions
INFOBOXES = ("infobox", "taxobox", "biota", "vcard-box")  # in classes, also as parts: infobox_v2

# Sections that hold nothing to cite. Of other languages they empty themselves, for the classes above fill them.
DROPPED_SECTIONS = frozenset(
    (
        "references", "external links", "see also", "notes", "bibliography", "further reading", "footnotes",
        "citations", "sources", "notes and references", "references and notes", "notes and citations", "works cited",
        "explanatory notes", "general references", "external link", "reference", "related pages", "other websites",
    )
)  # fmt: skip
