"""Removes from a parsed page what is not text of its article.

It is recognised by CSS class and by element wherever possible, so that it works in every language.
"""

from __future__ import annotations

import re

from selectolax.lexbor import LexborNode

from gog_edge.indexing.sources.markup.figures import addresses_of
from gog_edge.indexing.sources.markup.marks import INLINE

_NO_TEXT = ", ".join(
    (
        "style", "script", "noscript", "template", "link", "meta", "audio", "video", "form", "nav", "footer", "object",
        "iframe", "noframes", "canvas", "select", "datalist", "dialog", "button", "menu",
        ".mw-editsection", ".editsection", ".mw-empty-elt", ".mw-jump-link", ".printfooter", ".catlinks", "#catlinks",
        ".toc", "#toc", ".magnify", "#contentSub", "#siteSub", "#jump-to-nav", ".subpages", ".zim-footer",
        ".navbox", ".navbox-styles", ".vertical-navbox", ".sidebar", ".authority-control", ".portalbox", ".portal",
        ".ambox", ".ombox", ".tmbox", ".cmbox", ".fmbox", ".mbox-small", ".metadata", ".sistersitebox", ".noprint",
        ".hatnote", ".dablink", ".rellink", ".shortdescription", ".nomobile", "[role=note]",
        ".reference", ".mw-ref", ".mw-cite-backlink", ".reflist", ".references", ".mw-references-wrap", ".refbegin",
        "[id^='cite_ref']:not(a)", "[id^='cite_note']", "sup[id^='_ref-']", "[id^='_note-']",
        ".geo-inline-hidden", ".geo-nondefault", ".geo-multi-punct", "#coordinates", ".coordinates", ".mw-kartographer",
        "[hidden]", "[aria-hidden=true]", "[role=navigation]", "[role=search]", "[role=banner]", "[role=contentinfo]",
        "[role=menu]", "[role=menubar]", "[role=dialog]",
    )
)  # fmt: skip
_HIDDEN = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)

# The mark of a reference, as MediaWiki writes it: [1], [a], [note 1].
_MARK = re.compile(r"\[\s*(?:[^\W\d_]{1,16}[\s.-]{0,2})?(?:\d{1,4}|[^\W\d_]{1,4})\s*\]")
_BARE_MARK = re.compile(r"\(?\s*(?:\d{1,4}|[^\W\d_]{1,2}|[*†‡§¶]{1,3})\s*\)?")
_NOTE = re.compile(r"#_?(?:cite[_-]?(?:note|ref)|(?:end|foot)?notes?\d*[-_:.]|(?:end|foot)note|e?f?tn\d|f?n[-_:.]?\d|"
                   r"f?nref|ref[-_:.]?\d)", re.IGNORECASE)  # fmt: skip
_MAX_MARK = 24  # characters
# Elements that are looked at one by one.
_DOUBTFUL = ("[style], sup, a[href*='#'], a[href*='action=edit'], a[href*='oldid='], a[href*='creativecommons.org'], "
             "a[href*='Special:Categories']")

# What is below an article in ZIM files of many years: where the text is from, its licence, when it was edited, and its
# categories.
_LICENCE_LINK = re.compile(r"[?&]oldid=|creativecommons\.org/licenses/|Special:Categories")
_FOOTER = re.compile(
    r"(?:this|the) (?:article|page|text|content) (?:is|was|has been) (?:issued|based|taken|from|last|licen[cs]ed|"
    r"available|released)|(?:text|content|material) (?:is )?(?:available|licen[cs]ed|released) under|"
    r"additional terms may apply|retrieved from|(?:last|zuletzt) (?:edited|modified|updated|bearbeitet)\b|"
    r"(?:categor(?:y|ies|ía|ías|ia|ie|ieën|ias)|catégories?|kategori(?:e|en|er|a|ja)?|категори[яиії]+|κατηγορί(?:α|ες)|"
    r"カテゴリ|分类|分類|분류|تصنيف(?:ات)?|קטגורי(?:ה|ות))\s*[:：]",
    re.IGNORECASE,
)
_ATTRIBUTION = re.compile(
    r"(?=.*\bCreative Commons\b)(?=.*\bwiki)(?=.*\b(?:Attribution|Share ?Alike|BY-SA)\b)", re.IGNORECASE | re.DOTALL
)
_MAX_FOOTER = 700  # characters
_MAX_FOOTERS = 8  # blocks


def remove_all_but_text(body: LexborNode, html: bytes) -> None:
    """Remove navigation, references, hidden elements, and footers from the body of a page.

    `html` is the page in lower case: a search in it shows faster than a query that there are no such elements.
    """
    if b"<noscript" in html:
        for node in body.css("noscript"):  # what a browser without JavaScript displays: images that load lazily
            for image in node.css("img"):
                node.insert_before(image, move=True)
    for node in body.css(_NO_TEXT):
        if node.tag in ("video", "object") and addresses_of(node):
            _keep_element_only(node)
        else:
            node.decompose(recursive=False)
    is_linked = False
    for node in body.css(_DOUBTFUL):
        attributes = node.attributes
        if _is_hidden(attributes.get("style") or ""):
            node.decompose(recursive=False)
        elif node.tag == "a":
            address = attributes.get("href") or ""
            is_linked = is_linked or _LICENCE_LINK.search(address) is not None
            _remove_link(node, address)
        elif node.tag == "sup" and _is_unlinked_mark(node):
            node.decompose(recursive=False)
    _remove_footers(body, is_linked)


def _remove_link(link: LexborNode, address: str) -> None:
    """Remove a link that is the mark of a reference, or leads to the editor."""
    if "action=edit" in address:
        _remove_with_brackets(link)
    elif "#" in address:
        text = (link.text() or "").strip()
        if len(text) <= _MAX_MARK:
            marked = _enclosing_mark(link)
            if _is_reference(address, marked, text):
                _remove_with_brackets(marked)


def _keep_element_only(node: LexborNode) -> None:
    while (child := node.first_child) is not None:
        child.decompose(recursive=False)


def _is_hidden(style: str) -> bool:
    return _HIDDEN.search(style) is not None


# --- references ---------------------------------------------------------------------------------


def _is_reference(address: str, marked: LexborNode, text: str) -> bool:
    """Return whether a link is the mark of a note: "[1]", or a raised or bracketed "1" that leads to a note.

    Old pages and other sites do not mark references by a class. Other brackets are text.
    """
    is_note = _NOTE.search(address) is not None
    is_raised = "sup" in (marked.tag, marked.parent and marked.parent.tag)
    if _MARK.fullmatch(text) or _MARK.fullmatch((marked.text() or "").strip()):
        return is_note or is_raised or text.strip("[] ").isdigit()
    is_mark = not text or text in "↑^" or _BARE_MARK.fullmatch(text) is not None
    return is_note and is_mark and (is_raised or not text.isalnum() or _is_bracketed(marked))


def _is_unlinked_mark(raised: LexborNode) -> bool:
    """Return whether raised text is the mark of a note whose link was removed: [1], [note 1]."""
    text = (raised.text() or "").strip()
    return (len(text) <= _MAX_MARK and _MARK.fullmatch(text) is not None and any(map(str.isdecimal, text))
            and raised.css_first("a") is None)


def _enclosing_mark(link: LexborNode) -> LexborNode:
    """Return the outermost inline element around a link that has no other text than brackets."""
    node = link
    for _ in range(4):
        above = node.parent
        if above is None or above.tag not in ("sup", "span", "small", "b", "i") or not _is_alone(node):
            break
        node = above
    return node


def _is_alone(node: LexborNode) -> bool:
    """Return whether the text beside a node, in the same element, consists of brackets."""
    for step in ("prev", "next"):
        beside = getattr(node, step)
        for _ in range(3):
            if beside is None:
                break
            if (beside.text() or "").strip().strip("[]() "):
                return False
            beside = getattr(beside, step)
        else:
            return False
    return True


def _is_bracketed(node: LexborNode) -> bool:
    before, after = node.prev, node.next
    return (before is not None and after is not None and before.is_text_node and after.is_text_node
            and (before.text() or "").rstrip().endswith("[") and (after.text() or "").lstrip().startswith("]"))


def _remove_with_brackets(node: LexborNode) -> None:
    """Remove a node, and the square brackets around it if they contain nothing else."""
    before, after = node.prev, node.next
    if _is_bracketed(node) and before is not None and after is not None:
        before.replace_with((before.text() or "").rstrip()[:-1])
        after.replace_with((after.text() or "").lstrip()[1:])
    node.decompose(recursive=False)


# --- footers ------------------------------------------------------------------------------------


def _remove_footers(body: LexborNode, is_linked: bool) -> None:
    """Remove the blocks at the end of a page that state licence and origin, by their links or their words."""
    for _ in range(_MAX_FOOTERS):
        run = _last_run(body)
        text = " ".join("".join(node.text() or "" for node in run).split())
        if not text or len(text) > _MAX_FOOTER:
            return
        above = run[0].parent
        is_attributed = (above is None or above.tag != "p") and _ATTRIBUTION.match(text)
        if not (_FOOTER.match(text) or is_attributed or (is_linked and any(map(_leads_to_licence, run)))):
            return
        for node in run:
            node.decompose(recursive=False)


def _leads_to_licence(node: LexborNode) -> bool:
    links = [node] if node.tag == "a" else node.css("a") if node.is_element_node else []
    return any(_LICENCE_LINK.search(link.attributes.get("href") or "") for link in links)


def _last_run(body: LexborNode) -> list[LexborNode]:
    """Return the text and inline elements at the end of the last block that has text."""
    node = _last_text(body)
    while node is not None and node.parent is not None and _is_inline(node.parent):
        node = node.parent
    run = []
    while node is not None and (_is_inline(node) or node.is_comment_node):
        run.append(node)
        node = node.prev
    return run[::-1]


def _last_text(body: LexborNode) -> LexborNode | None:
    """Return the last text that is not white space."""
    node: LexborNode | None = body
    while node is not None:
        if node.is_text_node and (node.text() or "").strip():
            return node
        if (inside := node.last_child) is not None:
            node = inside
            continue
        while node is not None and node.mem_id != body.mem_id and node.prev is None:
            node = node.parent
        if node is None or node.mem_id == body.mem_id:
            return None
        node = node.prev
    return None


def _is_inline(node: LexborNode) -> bool:
    return node.is_text_node or (node.tag or "") in INLINE
