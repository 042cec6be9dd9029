"""Language-variant markup. Expected texts follow https://www.mediawiki.org/wiki/Writing_systems/Syntax."""

import pytest

from gog_edge.indexing.sources.mediawiki.variants import resolve_variants


@pytest.mark.parametrize(
    ("text", "simplified", "taiwan"),
    [
        ("在-{zh-hans:联邦州; zh-hant:邦}-的-{塔}-", "在联邦州的塔", "在邦的塔"),
        ("-{zh-cn:电脑;zh-tw:電腦;zh-hk:電子計算機;}-", "电脑", "電腦"),
        ("-{A|zh-hans:甲;zh-hant:乙}-", "甲", "乙"), ("a-{H|zh-hans:甲;zh-hant:乙}-b", "ab", "ab"),
        ("a-{T|zh:题}-b", "ab", "ab"),
        ("a-{-|zh-cn:x;zh-tw:y}-b", "ab", "ab"), ("-{R|x;y:z}-", "x;y:z", "x;y:z"),
        ("-{zh-hans;zh-hant|汉字}-", "汉字", "汉字"),
        ("-{zh-hans:-{内}-外;zh-hant:b}-", "内外", "b"), ("-{zh-hant:只}-", "只", "只"),
        ("-{zh:China;zh-tw:Taiwan}-", "China", "Taiwan"),
        ("-{zh-hans:[[A|甲]];zh-hant:{{lang|zh|x;zh-tw:y}}}-", "[[A|甲]]", "{{lang|zh|x;zh-tw:y}}"),
        ("-{https://a.b/c}-", "https://a.b/c", "https://a.b/c"), ("-{zh-Hans-CN:甲;zh-Hant-TW:乙}-", "甲", "乙"),
        ("a-{{lang|zh|x}}-b", "a-{{lang|zh|x}}-b", "a-{{lang|zh|x}}-b"), ("a -{open", "a -{open", "a -{open"),
        ("-{}-", "", ""), ("-{zh-hans:甲&nbsp;乙;zh-hant:丙}-", "甲&nbsp;乙", "丙"),
        ("-{zh-tw:a -{zh-cn:b;zh-tw:c}- d;zh-cn:e}-", "e", "a c d"),
    ],
)  # fmt: skip
def test_one_variant_is_chosen(text, simplified, taiwan):
    assert resolve_variants(text, "zh") == simplified
    assert resolve_variants(text, "zh", "zh-tw") == taiwan


def test_the_nearest_variant_stands_in_for_a_missing_one():
    text = "-{zh-cn:甲;zh-hant:乙;zh-hk:丙}-"
    found = [resolve_variants(text, "zh", variant) for variant in ("zh-sg", "zh-mo", "zh-tw", "zh-hans")]
    assert found == ["甲", "乙", "乙", "甲"]


def test_serbian_has_two_scripts():
    text = "-{sr-ec:река; sr-el:reka}- -{NATO}-"
    assert resolve_variants(text, "sr") == "река NATO" and resolve_variants(text, "sr", "sr-el") == "reka NATO"
    assert resolve_variants(text, "sr", "sr-latn") == "reka NATO"


def test_other_languages_keep_braces_but_not_rules():
    assert resolve_variants("5-{3-[4-x]-y}-2-z", "en") == "5-{3-[4-x]-y}-2-z"
    assert resolve_variants("-{zh-hans:甲; zh-hant:乙}-", "en") == "甲"
