"""Parsing of article HTML: text, figures, and what is neither."""

import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.indexing.sources.html import parse_page
from gog_edge.indexing.sources.markup.decoding import MAX_DEPTH, exceeds_max_depth
from gog_edge.indexing.sources.markup.figures import parse_srcset
from gog_edge.indexing.sources.text import MAX_CHARACTERS


def texts(html):
    return [text for _, text in parse_page(html).paragraphs]


def single_figure(html):
    (figure,) = parse_page(html).figures
    return figure


def test_sections_have_paths():
    page = parse_page("<p>a</p><h2>One</h2><p>b</p><h3>Two</h3><p>c</p><h4>Three</h4><p>d</p><h2>Four</h2><p>e</p>")
    assert page.paragraphs == (("", "a"), ("One", "b"), ("One / Two", "c"), ("One / Two / Three", "d"), ("Four", "e"))


def test_headings_are_found_in_any_container():
    html = ('<section><div class="mw-heading"><h2>One</h2><span class="mw-editsection">[edit]</span></div><p>a</p>'
            "</section><details open><summary><h2>Two</h2></summary><p>b</p></details><h2><span>Three</span></h2>c")
    assert parse_page(html).paragraphs == (("One", "a"), ("Two", "b"), ("Three", "c"))


def test_section_titles_are_truncated():
    ((section, text),) = parse_page(f"<h2>{'long ' * 1000}</h2><p>a</p>").paragraphs
    assert len(section) <= 200 and text == "a"


def test_inline_markup_and_entities_are_removed():
    html = "<p>H<sub>2</sub>O &amp; <i>more</i>,\n  5&nbsp;km&sup2; <b>so</b>\u00adft.<sup class=reference>1</sup></p>"
    assert texts(html) == ["H2O & more, 5 km² soft."]


def test_a_list_is_one_paragraph_with_a_line_per_item():
    assert texts("<ul><li>one<ol><li>two</li></ol></li><li>three</li></ul>") == ["one\ntwo\nthree"]
    assert texts("<dl><dt>Term</dt><dd>What it is</dd></dl>") == ["Term\nWhat it is"]


def test_a_table_is_one_paragraph_with_a_line_per_row():
    html = '<table class="wikitable"><caption>Sizes</caption><tr><th>A<th>B<tr><td>1<td>2<br>3</table>'
    assert texts(html) == ["Sizes\nA | B\n1 | 2\n3"]


def test_an_infobox_follows_the_lead_section():
    html = '<table class="infobox"><tr><th>Capital<td>Paris</table><p>Lead.</p><h2>More</h2><p>x</p>'
    assert parse_page(html).paragraphs == (("", "Lead."), ("", "Capital: Paris"), ("More", "x"))


@pytest.mark.parametrize(
    "noise",
    [
        '<div class="navbox">no</div>', '<table class="sidebar"><tr><td>no</table>', "<!-- no -->",
        '<span class="mw-editsection">no</span>', "<style>.no{}</style>", "<script>no()</script>",
        '<div class="hatnote">no</div>', '<div style="display:none">no</div>', "<div hidden>no</div>",
        '<div style="color:red; display: none">no</div>', '<table class="ambox"><tr><td>no</table>',
        '<ol class="references"><li>no</li></ol>', '<div id="toc"><ul><li>no</li></ul></div>',
        '<span id="coordinates">no</span>', '<div role="navigation">no</div>', '<sup class="mw-ref reference">no</sup>',
        "<!--htdig_noindex--><div>no</div><!--/htdig_noindex-->",
        "<noscript>no</noscript>", "<template>no</template>", '<div class="printfooter">no</div>',
        "<figure><img src=a.png><figcaption>no</figcaption></figure>",
        '<div class="thumb"><div class="thumbinner"><div class="thumbcaption">no</div></div></div>',
        '<ul class="gallery"><li class="gallerybox"><div class="gallerytext">no</div></li></ul>',
    ],
)  # fmt: skip
def test_page_furniture_is_removed(noise):
    assert texts(f"<body><p>before</p>{noise}<p>after</p></body>") == ["before", "after"]


@pytest.mark.parametrize("title", ["References", "External links", "See also", "NOTES", "Bibliography", " See  also "])
def test_reference_sections_are_removed_with_their_subsections(title):
    html = f"<p>a</p><h2>{title}</h2><p>no</p><h3>Books</h3><ul><li>no</li></ul><h2>Legacy</h2><p>b</p>"
    assert parse_page(html).paragraphs == (("", "a"), ("Legacy", "b"))


def test_lists_of_external_links_are_removed_in_any_language():
    html = '<p>a</p><h2>Weblinks</h2><ul><li><a class="external text">Amt</a></li></ul><h2>Orte</h2><ul><li>b</ul>'
    assert parse_page(html).paragraphs == (("", "a"), ("Orte", "b"))


def test_text_outside_of_blocks_is_kept():
    html = "<div>one <i>two</i><p>three</p>four<my-element>five</my-element></div><center><p>six</p></center>seven"
    assert texts(html) == ["one two", "three", "four", "five", "six", "seven"]


def test_formulas_become_latex():
    html = ('<p>As <span class="mwe-math-element"><span style="display: none;">'
            '<math alttext="{\\displaystyle E=mc^{2}}"><mi>E</mi></math></span>'
            '<img src="f.svg" class="mwe-math-fallback-image-inline" alt="x"></span> says.</p>')
    page = parse_page(html)
    assert page.paragraphs == (("", "As E=mc^{2} says."),)
    assert not page.figures and [skipped.reason for skipped in page.skipped] == ["image is a formula"]


FRAMES = {
    "figure": "<figure><a><img src=a.webp></a><figcaption>On <b>top</b></figcaption></figure>",
    "thumb": ('<div class="thumb tright"><div class="thumbinner"><img src=a.webp><div class="thumbcaption">'
              '<div class="magnify">+</div>On <b>top</b></div></div></div>'),
    "gallery": ('<ul class="gallery"><li class="gallerybox"><div class="thumb"><img src=a.webp></div>'
                '<div class="gallerytext"><p>On <b>top</b></p></div></li></ul>'),
    "pair": ('<div class="thumb tmulti"><div class="thumbinner multiimageinner"><div class="trow"><div class="tsingle">'
             '<div class="thumbimage"><img src=a.webp></div><div class="thumbcaption">On <b>top</b></div></div></div>'
             "</div></div>"),
    "infobox": '<table class="infobox_v2"><tr><td><img src=a.webp><br>On <b>top</b></td></tr></table>',
    "alt": "<p>text <img src=a.webp alt='On top'></p>",
}  # fmt: skip


@pytest.mark.parametrize("frame", FRAMES)
def test_captions_are_found_in_every_kind_of_frame(frame):
    figure = single_figure("<h2>Late</h2>" + FRAMES[frame])
    assert (figure.source, figure.caption, figure.lead) == ("a.webp", "On top", frame == "infobox")


def test_images_in_a_pair_have_their_own_captions():
    single = '<div class="tsingle"><img src={0}.webp><div class="thumbcaption">{0}</div></div>'
    pair = single.format("left") + single.format("right")
    html = f'<div class="thumb tmulti"><div class="thumbinner">{pair}</div></div>'
    assert [figure.caption for figure in parse_page(html).figures] == ["left", "right"]


def test_without_an_infobox_the_first_figure_before_a_heading_is_the_lead():
    image = "<figure><img src={}.webp></figure>"
    page = parse_page(f"{image.format('a')}{image.format('b')}<h2>x</h2>{image.format('c')}")
    assert [figure.lead for figure in page.figures] == [True, False, False]
    page = parse_page(f"{image.format('a')}<table class=infobox><tr><td><img src=b.webp></table>")
    assert [figure.lead for figure in page.figures] == [False, True]


def test_icons_are_skipped_and_file_names_are_not_captions():
    page = parse_page('<p><img src=a.png width=16 height="16"><img src=b.png width=200 alt="B.JPG"><img src=b.png>'
                     '<img><img src=""><img src=c.png width="huge"></p>')
    assert [skipped.reason for skipped in page.skipped] == ["image is an icon"]
    assert [(figure.source, figure.caption) for figure in page.figures] == [("b.png", ""), ("c.png", "")]


SCRIPTS = ["Москва — столица.", "القاهرة عاصمة مصر.", "東京は日本の首都。", "กรุงเทพมหานคร", "e\u0301té 👩‍👩‍👧"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_is_kept(text):
    assert texts(f"<p>{text}</p>") == [text]


def test_an_empty_page_has_no_content():
    for html in ("", "\0", "<", "<html></html>", "<!DOCTYPE html>"):
        page = parse_page(html)
        assert not page.figures and all(text for _, text in page.paragraphs)


def test_deeply_nested_pages_are_parsed():
    assert texts("<div>" * 3000 + "<p>deep</p>") == ["deep"]
    assert texts("<ul><li>" * 3000 + "deep") == ["deep"]


DEEP = MAX_DEPTH + 1


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * DEEP,
        "<ul><li>" * DEEP,
        "<Div class=a>" * DEEP + "</DIV>",
        "<div></span></p>" * DEEP,
        "<div><!--</div>--><!--x</div>--!><!-->" * DEEP,
        "<div title='</div>' lang=\"</div>\"id = '</div>'>" * DEEP,
        "<div \">" * DEEP,
        "<div =\">" * DEEP,
        "<div a=b'>" * DEEP,
        "<div><!x </div><? </div></ </div>" * DEEP,
    ],
)
def test_excessive_depth_is_detected_despite_malformed_tags(html):
    assert exceeds_max_depth(html)


@pytest.mark.parametrize(
    "html",
    [
        "",
        "<div>" * (DEEP - 1),
        "<div><p>a</div>" * 3 * DEEP,
        "<p>a<br>b<img src='>'>" * 3 * DEEP,
        "<table><tr><td>a<td>b</table>" * DEEP,
        "<!-- <div> -->" * DEEP,
        "<a title='<b>'></a>" * DEEP,
        "< div>" * DEEP,
        "<<" * DEEP + "<div",
    ],
)
def test_many_tags_are_not_excessive_depth(html):
    assert not exceeds_max_depth(html)


@pytest.mark.parametrize("part", ["<a ", '<a "', "<a b='", "<!--", "<!", "</", "<a b= ", "<a/ "])
def test_detecting_the_depth_takes_linear_time(part):
    began = time.monotonic()
    assert not exceeds_max_depth(part * 300_000 + "--" * 300_000)
    assert time.monotonic() - began < 2


PIECES = st.sampled_from(
    ["<p>", "</p>", "<div class=thumb>", "<div class='reflist'>", "</div>", "<ul>", "<li>", "</ul>", "<tr>", "<td>",
     "<table class=infobox>", "</table>", "<h2>", "</h2>", "<h3>History</h3>", "<h2>References</h2>", "<figure>",
     "</figure>", "<figcaption>", "<img src=a.png>", "<img data-src=b.png width=9>", "<br>", "</span>",
     "<math alttext=x>",
     "<span class=mwe-math-element>", "<!--", "-->", "<svg>", "<template>", "</template>", "<body>", "</body>", "&#0;",
     "&#xD800;", "\x1e", "\x1f", "\0", "<li class=gallerybox>", "<frameset>", "<select><option>", "<b", "'>",
     "<sup class=reference>"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=20), max_size=40))
def test_any_input_is_parsed(pieces):
    html = "".join(pieces)
    page = parse_page(html)
    assert page == parse_page(html)
    for section, text in page.paragraphs:
        assert text == text.strip() and text and not set("\x1e\x1f\0") & set(section + text)
        (section + text).encode()
        assert len(text) <= MAX_CHARACTERS
    assert len({figure.source for figure in page.figures}) == len(page.figures)


# --- lines, numbers and readings ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<pre><code>cd /srv\nwget FILE\n  indented line</code></pre>", "cd /srv\nwget FILE\n  indented line"),
        ("<pre>\n\ta  b\r\n\n<span>c</span> <b>d</b>\n</pre>", "a  b\nc d"),
        ("<div class=mw-highlight><pre><span>if x:</span>\n    <span>y()</span></pre></div>", "if x:\n    y()"),
        ("<ul><li>Run<pre>a\n  b</pre>then</li></ul>", "Run\na\n  b\nthen"),
        ("<ul><li><p>a</p>b <i>c</i><ul><li>d</li></ul>e</li></ul>", "a\nb c\nd\ne"),
        ("<p style='white-space: pre-wrap'>a\n b</p>", "a\n b"),
        ("<textarea>a\n b</textarea>", "a\n b"),
        ("<xmp>a\n b</xmp>", "a\n b"),
        ("<div class=poem><p>Roses<br>\nare red,<br/>violets</p></div>", "Roses\nare red,\nviolets"),
        ("<p>a\n  b</p>", "a b"),
        ("<pre>&#1;a</pre>", "a"),
    ],
)
def test_line_ends_are_kept_where_browsers_keep_them(html, text):
    assert texts(html) == [text]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("10<sup>6</sup> km<sup>2</sup>", "10⁶ km²"),
        ("10<sup>−3</sup> s<sup><i>-1</i></sup>", "10⁻³ s⁻¹"),
        ("2<sup>n</sup>, 10<sup>6.5</sup>, the 1<sup>st</sup>, XX<sup>e</sup>", "2ⁿ, 10^6.5, the 1st, XXe"),
        ("H<sub>2</sub>SO<sub>4</sub>, log<sub>10</sub>2, 101<sub>2</sub>", "H2SO4, log₁₀2, 101₂"),
        ("5<sup>1</sup>⁄<sub>2</sub>", "5¹⁄₂"),
    ],
)
def test_exponents_do_not_become_other_numbers(html, text):
    assert texts(f"<p>{html}</p>") == [text]
    assert [unicodedata.normalize("NFKC", text)] == [unicodedata.normalize("NFKC", one) for one in texts(html)]


def test_words_with_readings_stay_whole():
    ruby = "<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp>字<rt>じ</rt></ruby>"
    assert texts(f"<p>{ruby}を読む。<ruby>x</ruby></p>") == ["漢字(かんじ)を読む。x"]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ('<math alttext="{\\displaystyle a^{2}}"><mi>a</mi></math>', "a^{2}"),
        ('<math><semantics><mi>x</mi><annotation encoding="application/x-tex">\\frac{1}{2}</annotation></semantics>'
         "</math>", "\\frac{1}{2}"),
        ("<math><msup><mi>c</mi><mn>2</mn></msup><mo>=</mo><mfrac><mn>1</mn><mn>2</mn></mfrac></math>",
         "c^{2}=(1)/(2)"),
        ("<math><msqrt><mi>x</mi></msqrt><msubsup><mi>y</mi><mn>1</mn><mn>2</mn></msubsup></math>", "√(x)y_{1}^{2}"),
        ('<img class="tex" alt="e^x" src="m.png">', "e^x"),
        ('<img class="mwe-math-fallback-image-inline tex" alt="e^x" src="m.png">', "e^x"),
        ('<span class=katex><span class=katex-mathml><math><mi>x</mi></math></span><span aria-hidden=true>x</span>'
         "</span>", "x"),
    ],
)
def test_formulas_of_every_kind_become_text(html, text):
    page = parse_page(f"<p>As {html} says.</p>")
    assert page.paragraphs == (("", f"As {text} says."),) and not page.figures
    assert len(page.skipped) == html.count("<img")


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        '<sup id="cite_ref-1"><a href="#cite_note-1">[1]</a></sup>',
        '<a href="#cite_note-1">[1]</a>',
        '<sup><a href="./Page#cite_note-Smith-1">[note 1]</a></sup>',
        '<sup><a href="#cite_note-a">[a]</a></sup>',
        '<sup>[<a href="#cite_note-1">1</a>]</sup>',
        '[<a href="#cite_note-1">1</a>]',
        '<span id="cite_ref-1"><a href="#cite_note-1">[1]</a></span>',
        '<sup id="_ref-0"><a href="#_note-0" title="">[1]</a></sup>',
        '<sup><a href="#fn1">1</a></sup>',
        '<sup><a href="#ftn1">*</a></sup>',
        '<a href="#ref12">[12]</a>',
        '<sup><a href="#endnote_x">[b]</a></sup>',
        '<b><sup><a href="#cite_note-৩">[৩]</a></sup></b>',
        '<sup class="noprint">[<a href="/wiki/W">citation needed</a>]</sup>',
        "<sup>[1]</sup>", "<sup>[note 2]</sup>", "<sup><b>[১]</b></sup><sup>[3]</sup>",
    ],
)
def test_references_without_a_class_are_removed(mark):
    assert texts(f"<p>Born in 1930.{mark} Died.</p>") == ["Born in 1930. Died."]


@pytest.mark.parametrize(
    "text",
    [
        "He said [sic] so.", "The array a[1] and x[i].", "In [1], see.", '<a href="#History">[more below]</a> x',
        '<a href="Page">[1]</a> of a page', 'See <a href="#cite_note-x">the note by Smith</a>.',
        '<a href="#History">History</a> 1', "Pronounced [a].", '(<a href="#CITEREFSmith2005">Smith 2005</a>)',
        "m<sup>2</sup> [2]", "p<sup>[h]</sup> is", '<a href="#note-taking">note-taking</a> apps',
    ],
)  # fmt: skip
def test_brackets_that_are_text_are_kept(text):
    expected = re.sub(r"<sup>2</sup>", "²", text)
    assert texts(f"<p>{text}</p>") == [re.sub(r"<[^>]*>", "", expected)]


def test_lists_of_notes_without_a_class_are_removed():
    html = ('<p>a</p><ol><li id="cite_note-1"><a href="#cite_ref-1">↑</a> A book.</li><li id="_note-0">Another.</li>'
            "</ol><p>b</p>")
    assert texts(html) == ["a", "b"]


# --- furniture of many years --------------------------------------------------------------------


@pytest.mark.parametrize(
    "footer",
    [
        '<div><div style="clear:both">This article is issued from <a class="external text" href="https://en.wikipedia.'
        'org/?oldid=5">Wikipedia</a>. The text is licensed under <a href="http://creativecommons.org/licenses/by-sa/4.0'
        '/">Creative Commons</a>. Additional terms may apply for the media files.</div></div>',
        "<p>This article is issued from Wikipedia - version of the 11/2/2016. The text is available under the Creative "
        "Commons Attribution/Share Alike but additional terms may apply for the media files.</p>",
        '<div>Dieser Artikel stammt aus der <a href="https://de.wikipedia.org/?title=X&oldid=5">Wikipedia</a>.</div>',
        '<div><small>本文采用 <a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA</a></small></div>',
        "<div>Wikipédia, Creative Commons Attribution - partage, conditions diverses.</div>",
        "<div>Last edited on 3 May 2016</div><div>Content is available under CC BY-SA 3.0</div>",
        '<div>Categories: <a href="x">Rivers</a> | <a href="y">Lakes</a></div>',
        '<div><a href="/wiki/Special:Categories">Kategorier</a>: <a href="x">Elver</a></div>',
        "<ul><li>This page was last modified on 3 May 2016.</li></ul><!-- saved -->",
        "<footer>no</footer>", '<div id="catlinks">no</div>', '<div role="contentinfo">no</div>',
    ],
)  # fmt: skip
def test_footers_of_old_builds_are_removed(footer):
    article = "<p>The river is long.</p><p>It was last edited by rain.</p>"
    assert texts(f"<body><div id=content>{article}{footer}</div></body>") == [
        "The river is long.", "It was last edited by rain."]


@pytest.mark.parametrize(
    "end",
    ["The text is old.", "The licence is Creative Commons, and the wiki agrees.", "Categories of rivers are many.",
     "This article of the treaty was issued from Rome."],
)
def test_the_end_of_an_article_is_no_footer(end):
    assert texts(f"<div><p>Start.</p><p>{end}</p></div>") == ["Start.", end]


@pytest.mark.parametrize(
    "noise",
    [
        '<span class="editsection">[<a href="x">edit</a>]</span>',
        '[<a href="/w/index.php?title=X&action=edit">edit</a>]',
        '<div style="DISPLAY : none">no</div>', "<span style='visibility:hidden'>no</span>", "<div role=note>no</div>",
        "<span aria-hidden=true>no</span>", "<button>no</button>", "<select><option>no</select>", "<dialog>no</dialog>",
        "<iframe src=x>no</iframe>", "<noscript><p>no</p></noscript>", '<div role="search">no</div>',
    ],
)  # fmt: skip
def test_more_page_furniture_is_removed(noise):
    assert texts(f"<body><p>before</p>{noise}<p>after</p></body>") == ["before", "after"]


def test_several_top_level_headings_are_chapters():
    page = parse_page("<h1>One</h1><p>a</p><h2>Part</h2><p>b</p><h1>Two</h1><p>c</p>")
    assert page.paragraphs == (("One", "a"), ("One / Part", "b"), ("Two", "c")) and page.title == "One"
    assert parse_page("<h1>One</h1><p>a</p>").paragraphs == (("", "a"),)


# --- addresses of images ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("srcset", "found"),
    [
        ("a.png", [("a.png", 1.0, False)]),
        ("a.png 1x, b.png 2x", [("a.png", 1.0, False), ("b.png", 2.0, False)]),
        ("a.png 1.5x,b.png 2x", [("a.png", 1.5, False), ("b.png", 2.0, False)]),
        ("a,b.png 100w, c.png  20w ", [("a,b.png", 100.0, True), ("c.png", 20.0, True)]),
        ("a.png, b.png", [("a.png", 1.0, False), ("b.png", 1.0, False)]),
        ("\n a.png 2x,\n\t b.png 3x,", [("a.png", 2.0, False), ("b.png", 3.0, False)]),
        ("data:image/png;base64,xy== 2x, a.png", [("data:image/png;base64,xy==", 2.0, False), ("a.png", 1.0, False)]),
        ("a.png 100w 50h", [("a.png", 100.0, True)]),
        ("a.png big", [("a.png", 1.0, False)]),
        ("", []), (" , ,", []),
    ],
)  # fmt: skip
def test_sets_of_addresses_are_parsed_by_the_html_standard(srcset, found):
    assert list(parse_srcset(srcset)) == found


def test_the_widest_address_comes_first():
    figure = single_figure('<picture><source srcset="m.webp 600w, l.webp 1200w"><img src="s.jpg" data-src="t.jpg" '
                           'srcset="m.jpg 2x" alt="x"></picture>')
    assert (figure.source, *figure.others) == ("l.webp", "m.webp", "m.jpg", "t.jpg", "s.jpg")


def test_the_base_of_addresses_is_returned():
    assert parse_page('<head><base href="../x/"></head><p>a</p>').base == "../x/"


def test_icons_are_recognised_by_their_style():
    page = parse_page('<p><img src=a.png style="width:16px"><img src=b.png style="width:100%;max-height:20px"></p>')
    assert [skipped.item for skipped in page.skipped] == ["a.png"]


# --- hostile pages ------------------------------------------------------------------------------

_MUCH = "word " * 100_000
_NESTED = 3900


@pytest.mark.parametrize(
    "html",
    [
        "<ruby>" * _NESTED + _MUCH,
        "<ruby><span><div><b>" * (_NESTED // 4) + _MUCH,
        "<math><mrow>" * (_NESTED // 2) + _MUCH,
        "<div class=mwe-math-element>" * _NESTED + _MUCH,
        "<pre><div>" * (_NESTED // 2) + _MUCH,
        "<div style='white-space:pre'>" * _NESTED + _MUCH,
        "<b>" * _NESTED + _MUCH + "</b><sup>1</sup>" * _NESTED,
        "<span>" + "<a href='#x'>1</a> " * 50_000,
        "[<a href='#cite_note'>1</a>]" * 50_000,
        "<picture>" + "<source srcset=a>" * 3000 + "<img src=x>" * 3000,
        "<p>Categories: x</p>" * 20_000,
        "<noscript><div>" * (_NESTED // 2) + "<img src=a>" * 2000,
        ("<img srcset='" + ",," * 9000 + "x'>") * 20,
        ("<img srcset='x" + ",," * 9000 + "y'>") * 20,
        "<div>" * _NESTED + "</div><!-- x -->" * _NESTED,
    ],
    ids=lambda html: html[:24],
)
def test_no_construct_takes_quadratic_time(html):
    assert not exceeds_max_depth(html)
    began = time.process_time()
    parse_page(html)
    assert time.process_time() - began < 2
