"""Parsing of article HTML: text, figures, and what is neither."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.indexing.sources.html import MAX_DEPTH, exceeds_max_depth, parse_page
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
    assert not exceeds_max_depth(part * 300_000 + "--" * 300_000) or part == "<a/ "
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
