"""Templates of numbers, dates and words as Wikipedia displays them; conversions are rounded as by Template:Convert."""

import pytest

from gog_edge.indexing.sources.mediawiki import parse_wikitext
from gog_edge.indexing.sources.mediawiki.site import Site
from gog_edge.indexing.sources.mediawiki.templates.units import unit


def shown(template, language="en"):
    """Return the text of a template within a sentence; empty if the sentence is left out."""
    texts = [text for _, text in parse_wikitext(f"(x) {template} y", Site(language, date="2026-06-01"))]
    return texts[0].removeprefix("(x) ").removesuffix(" y") if texts else ""


# Values and rounding of the examples in https://en.wikipedia.org/wiki/Template:Convert/doc and Help:Convert; units are
# written by their symbols, as with abbr=on.
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("120|km|mi", "120 km (75 mi)"), ("2|km|mi", "2 km (1.2 mi)"), ("1|lb|kg", "1 lb (0.45 kg)"),
        ("7|mi|km", "7 mi (11 km)"),
        ("100|mi|km", "100 mi (160 km)"), ("3.21|kg|lb", "3.21 kg (7.1 lb)"), ("10|m|ft", "10 m (33 ft)"),
        ("11|m|ft", "11 m (36 ft)"),
        ("4.5|mi|km", "4.5 mi (7.2 km)"), ("8848|m|ft", "8,848 m (29,029 ft)"), ("30000|ft|m", "30,000 ft (9,100 m)"),
        ("0|C|F", "0 °C (32 °F)"), ("10|C|F", "10 °C (50 °F)"), ("37|°C|°F", "37 °C (99 °F)"),
        ("-40|F|C", "−40 °F (−40 °C)"),
        ("60|and|170|kg|lb", "60 and 170 kg (130 and 370 lb)"), ("60|-|170|kg|lb", "60–170 kg (130–370 lb)"),
        ("41|to|50|F|C", "41 to 50 °F (5 to 10 °C)"), ("6|by|12|km|mi", "6 by 12 km (3.7 by 7.5 mi)"),
        ("2|x|4|m|ft", "2 m × 4 m (6.6 ft × 13.1 ft)"), ("5|ft|6|in|m", "5 ft 6 in (1.68 m)"),
        ("5|ft|10|in|cm", "5 ft 10 in (178 cm)"),
        ("11|st|4|lb|kg", "11 st 4 lb (72 kg)"), ("180|cm|ftin", "180 cm (5 ft 11 in)"),
        ("55|nmi|km mi", "55 nmi (102 km; 63 mi)"),
        ("100|km2|sqmi", "100 km² (39 sq mi)"), ("640|acre|km2", "640 acres (2.6 km²)"),
        ("641|acre|ha sqmi|2", "641 acres (259.40 ha; 1.00 sq mi)"),
        ("100|mph", "100 mph (160 km/h)"), ("20|kn", "20 kn (37 km/h; 23 mph)"), ("1200|hp|kW", "1,200 hp (890 kW)"),
        ("12|km|mi|order=flip", "7.5 mi (12 km)"), ("500|m|ft|disp=or", "500 m or 1,600 ft"),
        ("10|km|mi|disp=out", "6.2 mi"),
        ("10|km|mi|disp=output number only", "6.2"), ("10|km|mi|2", "10 km (6.21 mi)"),
        ("1234|km|mi|sigfig=2", "1,234 km (770 mi)"),
        ("1234|km|mi|-2", "1,234 km (800 mi)"), ("23|ft|m|round=5", "23 ft (5 m)"),
        ("1,250|sqft|m2", "1,250 sq ft (116 m²)"),
        ("9+1/2|in|cm", "9 1⁄2 in (24 cm)"), ("1.5e3|m|km", "1.5×10³ m (1.5 km)"),
        ("30|mpgus|L/100km", "30 mpg‑US (7.8 L/100 km)"),
        ("5|e6acre|km2", "5 million acres (20,000 km²)"), ("800|koilbbl/d", "800 thousand bbl/d (130,000 m³/d)"),
        ("100|PD/km2|PD/sqmi", "100/km² (260/sq mi)"), ("5|C-change|F-change|0", "5 °C (9 °F)"),
        ("10|ft|m|adj=mid|-long", "10 ft long (3.0 m)"),
        ("300|miles|km|adj=on|sp=us|abbr=off", "300 mi (480 km)"), ("12|km|parsnips", "12 km"),
        ("1|acre|ha", "1 acre (0.40 ha)"), ("0.5|acre|ha", "0.5 acres (0.20 ha)"),
        ("1/2|acre|ha", "1⁄2 acre (0.20 ha)"), ("1|LT|t", "1 long ton (1.0 t)"),
        ("201|m|furlong|0", "201 m (1 furlong)"), ("1|-|2|fathom|m", "1–2 fathoms (1.8–3.7 m)"),
        ("1|e6acre|km2", "1 million acres (4,000 km²)"), ("1|ft/s|m/s", "1 ft/s (0.30 m/s)"),
        ("12|km|kg", "12 km"),
        ("12|parsnips|km", ""), ("{{unknown}}|km|mi", ""), ("12", ""), ("1/0|in|cm", ""),
    ],
)  # fmt: skip
def test_conversions(arguments, text):
    assert shown(f"{{{{convert|{arguments}}}}}") == text


@pytest.mark.parametrize(
    ("language", "text"),
    [("de", "1.200,5 km (746,0 mi)"), ("fr", "1 200,5 km (746,0 mi)"), ("zh", "1,200.5 km (746.0 mi)"),
    ("pl", "1200,5 km (746,0 mi)"),
     ("xx", "1200.5 km (746.0 mi)")],
)  # fmt: skip
def test_conversions_have_the_separators_of_the_language(language, text):
    assert shown("{{convert|1200.5|km|mi}}", language) == text


def test_factors_are_those_of_the_standards():
    """NIST SP 811, appendix B.8."""
    factors = {
        "mi": 1609.344, "acre": 4046.856, "USgal": 3.785412e-3, "impgal": 4.54609e-3, "lb": 0.45359237, "LT": 1016.047,
        "ST": 907.1847, "nmi": 1852, "kn": 0.5144444, "hp": 745.6999, "psi": 6894.757, "lbf": 4.448222,
        "oz": 0.02834952,
        "cuft": 0.02831685, "USfloz": 2.957353e-5, "impfloz": 2.841306e-5, "oilbbl": 0.1589873, "st": 6.350293,
        "sqmi": 2589988, "inHg": 3386.389, "kcal": 4184, "lbft": 1.355818, "ftlbf": 1.355818,
    }  # fmt: skip
    for code, factor in factors.items():
        assert unit(code).scale == pytest.approx(factor, rel=1e-6), code


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{val|1.5|0.2|e=6|u=km}}", "1.5±0.2×10⁶ km"), ("{{val|12345|ul=m/s}}", "12,345 m/s"),
        ("{{frac|1|2}}", "1⁄2"), ("{{frac|3|1|2}}", "3 1⁄2"),
        ("{{sfrac|7}}", "1⁄7"), ("{{e|-9}}", "×10⁻⁹"), ("{{chem|H|2|SO|4}}", "H2SO4"), ("{{chem|SO|4|2-}}", "SO4²⁻"),
        ("{{sup|2}}", "²"),
        ("{{US$|5|m}}", "US$5 million"), ("{{USD|1234567}}", "US$1,234,567"), ("{{GBP|5.50}}", "£5.50"),
        ("{{EUR|20}}", "€20"), ("{{INR|500|c}}", "₹500 crore"),
        ("{{INRConvert|5|l}}", "₹5 lakh"), ("{{JPY|300}}", "¥300"), ("{{currency|50|CAD}}", "C$50"),
        ("{{ordinal|21}}", "21st"), ("{{ordinal|112}}", "112th"),
        ("{{height|ft=6|in=1}}", "6 ft 1 in (1.85 m)"), ("{{height|m=1.85}}", "1.85 m (6 ft 1 in)"),
        ("{{RailGauge|1435mm}}", "1,435 mm"),
        ("{{snd}}", "–"), ("a{{nbsp}}b", "a b"), ("a{{spaces|3}}b", "a b"), ("a{{ndash}}b", "a–b"), ("{{'}}", "'"),
        ("{{!}}", "|"), ("{{roman|14}}", "XIV"),
        ("{{gaps|1|234|567}}", "1234567"), ("{{percentage|1|3|1}}", "33.3%"), ("{{number|1234}}", "1,234"),
        ("{{no.|5}}", "No. 5"), ("{{music|flat}}", "♭"),
        ("{{coord|51|30|26|N|0|7|39|W}}", "51°30′26″N 0°7′39″W"), ("{{coord|51.5|-0.12|type:city}}", "51.5°N 0.12°W"),
        ("{{ISBN|0-123}}", "ISBN 0-123"), ("{{inflation|US|5|1920}}", ""), ("{{val|x}}", ""), ("{{deg|5}}", ""),
    ],
)  # fmt: skip
def test_numbers(template, text):
    assert shown(template) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{circa|1450}}", "c. 1450"), ("{{circa|1450|1500}}", "c. 1450 – c. 1500"),
        ("{{floruit|1420}}", "fl. 1420"), ("{{reign|1901|1910}}", "r. 1901–1910"),
        ("{{birth date|1950|2|3}}", "February 3, 1950"), ("{{birth date|1950|02|03|df=y}}", "3 February 1950"),
        ("{{birth date|1950}}", "1950"),
        ("{{birth date and age|1950|2|3}}", "February 3, 1950 (age 76)"),
        ("{{birth date and age|1950|8|3|df=yes}}", "3 August 1950 (age 75)"),
        ("{{death date and age|2007|1|3|1930|2|1}}", "January 3, 2007 (aged 76)"),
        ("{{birth year and age|1950}}", "1950 (age 75–76)"),
        ("{{start date|2005|11}}", "November 2005"), ("{{start date and age|2005|11|2|df=y}}", "2 November 2005"),
        ("{{dts|1999|May|2}}", "May 2, 1999"),
        ("{{date|2010-05-03}}", "May 3, 2010"), ("{{as of|2015|5}}", "As of May 2015"),
        ("{{as of|2015|lc=y}}", "as of 2015"),
        ("{{as of|2015|5|3|since=y}}", "Since 3 May 2015"), ("{{as of|2015|alt=by then}}", "by then"),
        ("{{age|1950|2|3}}", "76"),
        ("{{age|1950|2|3|1960|2|2}}", "9"),
        ("{{OldStyleDate|February 2|1905|January 20}}", "February 2 [O.S. January 20] 1905"),
        ("{{birth date|x|y|z}}", ""),
    ],
)  # fmt: skip
def test_dates(template, text):
    assert shown(template) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{lang|fr|Rivière}}", "Rivière"), ("{{lang-de|Fluss}}", "German: Fluss"),
        ("{{langx|ru|Москва}}", "Russian: Москва"),
        ("{{lang-grc-gre|λόγος}}", "Ancient Greek: λόγος"), ("{{lang-xyz|abc}}", "abc"),
        ("{{transl|ru|Moskva}}", "Moskva"), ("{{transl|ar|DIN|ʿAlī}}", "ʿAlī"),
        ("{{nowrap|5 km}}", "5 km"), ("{{small|[[a|b]]}}", "b"), ("{{abbr|km|kilometre}}", "km"),
        ("{{ill|Name|de|Titel}}", "Name"),
        ("{{ill|Name|de|lt=text}}", "text"), ("{{nihongo|Tokyo|東京|Tōkyō}}", "Tokyo (東京, Tōkyō)"),
        ("{{nihongo|'''Tokyo'''|東京}}", "Tokyo (東京)"),
        ("{{zh|s=汉字|t=漢字|p=hànzì}}", "simplified Chinese: 汉字; traditional Chinese: 漢字; pinyin: hànzì"),
        ("{{USS|Nimitz|CVN-68}}", "USS Nimitz (CVN-68)"),
        ("{{HMS|Victory}}", "HMS Victory"), ("{{sclass|Nimitz|carrier}}", "Nimitz-class carrier"),
        ("{{sic|recieve}}", "recieve [sic]"), ("{{flag|Germany}}", "Germany"),
        ("{{flag|GER}}", ""), ("{{flagicon|GER}} Berlin", "Berlin"), ("{{angbr|a}}", "⟨a⟩"),
        ("{{hlist|a|b}}", "a · b"), ("{{color|red|word}}", "word"),
        ("{{nowrap|{{unknown}}}}", ""), ("{{Nowrap| {{convert|1|km|mi}} }}", "1 km (0.62 mi)"),
        ("{{nobr|4,4|millions}}", ""),
    ],
)  # fmt: skip
def test_words(template, text):
    assert shown(template) == text


@pytest.mark.parametrize(
    ("language", "template", "text"),
    [
        ("de", "{{Höhe|1234|DE-NHN}}", "1.234 m"), ("de", "{{enS|river}}", "englisch river"),
        ("de", "{{lang|en|river}}", "river"), ("de", "{{Datum|3|5|2010}}", "3. Mai 2010"),
        ("de", "{{FormatNum|12345}}", "12.345"), ("de", "{{\"|Wort}}", "„Wort“"),
        ("fr", "{{unité|1234.5|km|2}}", "1 234,5 km²"), ("fr", "{{unité|5|m|s|-1}}", "5 m s⁻¹"),
        ("fr", "{{unité|75|à=80|kg}}", "75 à 80 kg"), ("fr", "{{unité|75|±=5|kg}}", ""),
        ("fr", "{{nombre|1234|habitants}}", "1 234 habitants"),
        ("fr", "{{date|1|janvier|2000}}", "1er janvier 2000"), ("fr", "{{date-|14 juillet 1789}}", "14 juillet 1789"),
        ("fr", "{{s|XX}}", "XXe siècle"), ("fr", "{{s-|XIII}}", "XIIIe"),
        ("fr", "{{s2|XIX|XX}}", "XIXe et XXe siècles"), ("fr", "{{-s|V}}", "Ve siècle av. J.-C."),
        ("fr", "{{XIXe siècle}}", "XIXe siècle"), ("fr", "{{1er}}", "1er"), ("fr", "{{langue|en|river}}", "river"),
        ("fr", "{{citation|mot}}", "« mot »"),
        ("fr", "{{heure|12|30}}", "12 h 30 min"), ("fr", "{{lien|langue=en|trad=River|texte=rivière}}", "rivière"),
        ("fr", "{{Mme|Curie}}", "Mme Curie"),
        ("es", "{{unidad|12345,6|km}}", "12 345,6 km"), ("es", "{{siglo|XX||s}}", "siglo XX"),
        ("es", "{{fecha|3|5|2010}}", "3 de mayo de 2010"), ("es", "{{esd|5 km}}", "5 km"),
        ("pt", "{{fmtn|12345|km}}", "12 345 km"), ("pt", "{{séc|XX}}", "século XX"),
        ("it", "{{M|10|ul=km}}", "10 km"), ("ca", "{{segle|XX}}", "segle XX"),
        ("ru", "{{число|12345}}", "12 345"), ("ru", "{{lang-en|river}}", "англ. river"),
        ("ru", "{{s|5 км}}", "5 км"), ("ru", "{{дата|3|5|2010}}", "3 мая 2010"),
        ("ru", "{{нп5|Река|реку|en|River}}", "реку"), ("uk", "{{lang-de|Fluss}}", "нім. Fluss"),
        ("ja", "{{読み仮名|東京|とうきょう}}", "東京（とうきょう）"),
        ("ja", "{{ルビ|東京|とうきょう}}", "東京(とうきょう)"), ("ja", "{{仮リンク|川|en|River|label=河}}", "河"),
        ("ja", "{{生年月日と年齢|1950|2|3}}", "1950年2月3日（76歳）"),
        ("ja", "{{lang-en|river}}", "英語: river"), ("zh", "{{lang-en|river}}", "英语：river"),
        ("zh", "{{bd|1950年|2月3日|2000年|4月5日}}", "1950年2月3日－2000年4月5日"),
        ("zh", "{{link-en|河|River}}", "河"), ("zh", "{{tsl|en|River|河}}", "河"),
        ("ko", "{{llang|en|river}}", "river"), ("ar", "{{إنج|river}}", "بالإنجليزية: river"),
        ("pl", "{{s|XX}}", ""), ("lt", "{{de|Fluss}}", "Fluss"), ("es", "a{{de}} b", "a b"),
        ("ro", "{{conversie|10|km|mi}}", "10 km (6,2 mi)"),
    ],
)  # fmt: skip
def test_templates_of_other_languages(language, template, text):
    assert shown(template, language).replace("\u00a0", " ") == text


def test_quotations_are_paragraphs():
    texts = [text for _, text in parse_wikitext("He said:\n{{quote|To be {{lang|fr|ou}} not.|Author}}\nAnd left.")]
    assert texts == ["He said:", "To be ou not.", "And left."]
