"""Renders the templates of foreign words, readings, names and links to other languages."""

from __future__ import annotations

import re

from gog_edge.indexing.sources.mediawiki.templates.arguments import GONE, Arguments, Renderer, by_name
from gog_edge.indexing.sources.mediawiki.vocabulary import words

# By language of the wiki: code and name of other languages, as its templates write them.
_NAMES = {
    "en": """
        af Afrikaans| am Amharic| ang Old English| ar Arabic| arc Aramaic| az Azerbaijani| be Belarusian| ber Berber|
        bg Bulgarian| bn Bengali| bo Tibetan| br Breton| bs Bosnian| ca Catalan| ckb Central Kurdish| co Corsican|
        cs Czech| cy Welsh| da Danish| de German| el Greek| en English| eo Esperanto| es Spanish| et Estonian|
        eu Basque| fa Persian| fi Finnish| fil Filipino| fo Faroese| fr French| fy West Frisian| ga Irish|
        gd Scottish Gaelic| gl Galician| grc Ancient Greek| gsw Swiss German| gu Gujarati| ha Hausa| haw Hawaiian|
        he Hebrew| hi Hindi| hr Croatian| hu Hungarian| hy Armenian| id Indonesian| is Icelandic| it Italian|
        ja Japanese| jv Javanese| ka Georgian| kk Kazakh| km Khmer| kn Kannada| ko Korean| ku Kurdish| ky Kyrgyz|
        la Latin| lb Luxembourgish| lo Lao| lt Lithuanian| lv Latvian| mi Māori| mk Macedonian| ml Malayalam|
        mn Mongolian| mr Marathi| ms Malay| mt Maltese| my Burmese| nah Nahuatl| nds Low German| ne Nepali| nl Dutch|
        no Norwegian| nb Norwegian Bokmål| nn Norwegian Nynorsk| non Old Norse| oc Occitan| os Ossetian|
        ota Ottoman Turkish| pa Punjabi| pl Polish| ps Pashto| pt Portuguese| qu Quechua| rm Romansh| ro Romanian|
        rom Romani| ru Russian| sa Sanskrit| sco Scots| sd Sindhi| sh Serbo-Croatian| si Sinhala| sk Slovak|
        sl Slovene| so Somali| sq Albanian| sr Serbian| sv Swedish| sw Swahili| syr Syriac| ta Tamil| te Telugu|
        tg Tajik| th Thai| tk Turkmen| tl Tagalog| tr Turkish| tt Tatar| ug Uyghur| uk Ukrainian| ur Urdu| uz Uzbek|
        vi Vietnamese| xh Xhosa| yi Yiddish| yo Yoruba| zh Chinese| zu Zulu
        """,
    "de": """
        ar arabisch| bg bulgarisch| cs tschechisch| da dänisch| el griechisch| en englisch| es spanisch| fa persisch|
        fi finnisch| fr französisch| grc altgriechisch| he hebräisch| hr kroatisch| hu ungarisch| it italienisch|
        ja japanisch| ko koreanisch| la lateinisch| nl niederländisch| no norwegisch| pl polnisch| pt portugiesisch|
        ro rumänisch| ru russisch| sk slowakisch| sl slowenisch| sr serbisch| sv schwedisch| tr türkisch|
        uk ukrainisch| zh chinesisch
        """,
    "ru": """
        ar араб.| be белор.| bg болг.| cs чеш.| de нем.| el греч.| en англ.| es исп.| fa перс.| fi фин.| fr фр.|
        grc др.-греч.| he ивр.| hu венг.| hy арм.| it итал.| ja яп.| ka груз.| ko кор.| la лат.| nl нидерл.| no норв.|
        pl польск.| pt порт.| ro рум.| sr серб.| sv швед.| tr тур.| uk укр.| zh кит.
        """,
    "uk": """
        ar араб.| be біл.| bg болг.| cs чеськ.| de нім.| el грец.| en англ.| es ісп.| fr фр.| grc дав.-гр.| he івр.|
        hu угор.| it італ.| ja яп.| la лат.| nl нід.| pl пол.| pt порт.| ro рум.| ru рос.| sv швед.| tr тур.| zh кит.
        """,
    "fr": """
        ar en arabe| de en allemand| el en grec| en en anglais| es en espagnol| it en italien| ja en japonais|
        la en latin| nl en néerlandais| pl en polonais| pt en portugais| ru en russe| zh en chinois
        """,
    "es": """
        ar en árabe| ca en catalán| de en alemán| el en griego| en en inglés| eu en euskera| fr en francés|
        gl en gallego| it en italiano| ja en japonés| la en latín| nl en neerlandés| pt en portugués| ru en ruso|
        zh en chino
        """,
    "pt": """
        ar em árabe| de em alemão| el em grego| en em inglês| es em espanhol| fr em francês| it em italiano|
        ja em japonês| la em latim| ru em russo
        """,
    "it": """
        ar in arabo| de in tedesco| el in greco| en in inglese| es in spagnolo| fr in francese| ja in giapponese|
        la in latino| ru in russo
        """,
    "ja": """
        ar アラビア語| de ドイツ語| el ギリシア語| en 英語| es スペイン語| fr フランス語| it イタリア語| ko 朝鮮語|
        la ラテン語| ru ロシア語| zh 中国語
        """,
    "zh": """
        ar 阿拉伯语| de 德语| el 希腊语| en 英语| es 西班牙语| fr 法语| it 意大利语| ja 日语| ko 韩语| la 拉丁语|
        pt 葡萄牙语| ru 俄语| vi 越南语
        """,
    "ar": """
        de بالألمانية| en بالإنجليزية| es بالإسبانية| fr بالفرنسية| it بالإيطالية| la باللاتينية| ru بالروسية|
        tr بالتركية
        """,
}
_LANGUAGES = {
    wiki: dict((entry.split()[0], " ".join(entry.split()[1:])) for entry in text.split("|"))
    for wiki, text in _NAMES.items()
}
_COLON = {"de": " ", "ru": " ", "uk": " ", "fr": " ", "es": " ", "pt": " ", "it": " ", "zh": "："}
_BY_CODE = re.compile(r"(?:lang|llang|langx?|лang|мова|јез|језик)-([a-z]{2,3}(?:-[a-z]+)?)(?:-(?:short|gre|fonipa))?")
_GERMAN = re.compile(
    r"(ar|bg|cs|da|de|el|en|es|fa|fi|fr|grc|he|hr|hu|it|ja|ko|la|nl|no|pl|pt|ro|ru|sk|sl|sr|sv|tr|uk|zh)s"
)
_NAMED = {"إنج": "en", "إنجليزية": "en", "فرن": "fr", "ألمانية": "de", "لغة-أل": "de", "إسبانية": "es",
          "إيطالية": "it", "روسية": "ru", "אנגלית": "en", "آلمانی": "de", "انگلیسی": "en", "فرانسوی": "fr",
          "i̇ng": "en", "alm": "de", "fra": "fr"}  # fmt: skip
_CODES = words(
    """
    ar bg ca cs da de el en es et eu fa fi fr gl grc he hi hr hu it ja ko la lt lv nl pl pt ro ru sk sl sr sv tr uk zh
    """
)
_LINK_BY_CODE = re.compile(r"link-[a-z]{2,3}(?:-[a-z]+)?|le|ilh|internal link helper|internal link helper/[a-z-]+")
_CHINESE = (("s", "simplified Chinese: "), ("t", "traditional Chinese: "), ("c", "Chinese: "), ("p", "pinyin: "),
    ("hp", "pinyin: "),
            ("w", "Wade–Giles: "), ("j", "Jyutping: "), ("cy", "Yale: "), ("poj", "Pe̍h-ōe-jī: "), ("l",
            "lit. "))  # fmt: skip
_KOREAN = (("hangul", "Korean: "), ("hanja", "Hanja: "), ("rr", "RR: "), ("mr", "MR: "), ("lit", "lit. "))


def language_name(code: str, wiki: str) -> str:
    """Return the name of a language in the language of a wiki, as its templates write it; empty if not known."""
    names = _LANGUAGES.get(wiki, {})
    return names.get(code) or names.get(code.split("-")[0], "")


def _labelled(code: str, text: str, wiki: str) -> str:
    name = language_name(code, wiki)
    return f"{name}{_COLON.get(wiki, ': ')}{text}" if name else text


def foreign_text(name: str, args: Arguments) -> str | None:
    """Render a template whose name has a language code, such as `{{lang-de|Fluss}}`; None for other templates."""
    wiki = args.site.format_language
    found = _BY_CODE.fullmatch(name) or (_GERMAN.fullmatch(name) if wiki == "de" else None)
    code = found[1] if found else _NAMED.get(name)
    text = args.get(1, "text")
    if code is not None:
        label = args.get("label")
        return text if not text or label in ("none", "no") else _labelled(code, text, wiki)
    if name in _CODES:  # in some wikis with the text, in others a sign after a link
        return text or GONE
    if _LINK_BY_CODE.fullmatch(name):
        return args.get(3, 1) if name == "le" else args.get("d", 1)
    return None


def _langx(args: Arguments) -> str | None:
    text = args.get(2, "text")
    return text if args.get("label") in ("none", "no") else _labelled(args.get(1), text, args.site.format_language)


def _nihongo(args: Arguments) -> str | None:
    """`{{nihongo|text|kanji|romaji|more|after}}`: text (kanji, romaji, more) after."""
    inner = [text for text in (args.get(2), args.get(3), args.get(4, "extra")) if text]
    text = args.get(1) or (inner.pop(1) if len(inner) > 1 else inner.pop() if inner else "")
    remark = f" ({', '.join(inner)})" if inner else ""
    return f"{text}{remark} {args.get(5, 'extra2')}".strip() or None


def _nihongo3(args: Arguments) -> str | None:
    inner = [text for text in (args.get(2), args.get(1)) if text]
    return f"{args.get(3)} ({', '.join(inner)})" if args.get(3) and inner else args.get(3, 2, 1) or None


def _listed(fields: tuple[tuple[str, str], ...]) -> Renderer:
    def render(args: Arguments) -> str | None:
        unlabelled = args.get("labels") == "no" or args.site.format_language != "en"
        parts = []
        for name, label in fields:
            if text := args.get(name):
                quoted = f"'{text}'" if label == "lit. " else text
                parts.append(quoted if unlabelled and label != "lit. " else label + quoted)
        return "; ".join(parts) or args.get(1) or None

    return render


def _reading(args: Arguments) -> str | None:
    """`{{読み仮名|漢字|かな}}`: the word with its reading."""
    word, reading = args.get(1), args.get(2)
    more = args.get(3)
    return f"{word}（{reading}{'、' + more if more else ''}）" if reading else word or None


def _ruby(args: Arguments) -> str | None:
    word, reading = args.get(1), args.get(2)
    return f"{word}({reading})" if word and reading else word or None


def _interwiki(args: Arguments) -> str | None:
    """`{{ill|Title|de|Titel|lt=text}}`: a link to an article that only another language has."""
    return args.get("lt", "texte", "label", "fr", 1) or None


def _missing_article(args: Arguments) -> str | None:
    """`{{нп5|Title|text|lang|foreign title}}`."""
    return args.get("текст", "text", 2, "есть", 1) or None


def _long_interwiki(args: Arguments) -> str | None:
    """`{{tsl|en|Title|標題|text}}`."""
    return args.get(4, 3, 2) or None


def _portuguese_link(args: Arguments) -> str | None:
    """`{{link|en|Title|text}}`."""
    return args.get(3, 2) or None


def _ship(prefix: str) -> Renderer:
    """Return the renderer of `{{USS|Nimitz|CVN-68}}`: USS Nimitz (CVN-68)."""

    def render(args: Arguments) -> str | None:
        name, number, style = args.get(1), args.get(2), args.get(3)
        if style == "3":
            return name or None
        return f"{prefix} {name}" + (f" ({number})" if number and style != "2" else "") if name else None

    return render


def _any_ship(args: Arguments) -> str | None:
    prefix, name, number = args.get(1), args.get(2), args.get(3)
    if args.get(4) not in ("", "2", "3"):
        return None
    full = name if args.get(4) == "3" else f"{prefix} {name}".strip()
    return (full + (f" ({number})" if number and not args.get(4) else "")) if name else None


def _ship_class(args: Arguments) -> str | None:
    return f"{args.get(1)}-class {args.get(2)}".strip() if args.get(1) else None


def _linked_text(args: Arguments) -> str | None:
    return " ".join(text for text in args.positional() if text) or None


def _identifier(label: str) -> Renderer:
    return lambda args: f"{label} {args.get(1, 'id')}" if args.get(1, "id") else None


def _sic(args: Arguments) -> str | None:
    text = " ".join(filter(None, (args.get(1), args.get(2))))
    return text + ("" if args.get("hide") in ("y",
        "yes") or args.get("nolink") == "h" else " [sic]" if text else "[sic]")


def _country(args: Arguments) -> str | None:
    """`{{flag|Germany}}`. Codes such as GER are displayed as names, which are not known here."""
    text = args.get("name", 1)
    return None if not text or (text.isupper() and len(text) <= 3 and text.isascii()) else text


def _url(args: Arguments) -> str | None:
    return args.get(2, "name", 1) or GONE


_SHIPS = "USS HMS HMAS HMCS HMNZS HMIS INS SS MV RMS MS SMS RFA USNS USCGC USAT ORP ROKS BAP ARA KRI TCG ST PS TS"
RENDERERS = {name.lower(): _ship(name) for name in _SHIPS.split()} | by_name(
    (_langx, "langx"),
    (_nihongo, "nihongo, japonais, nihongo-s, 日本語"),
    (_nihongo3, "nihongo3"),
    (_listed(_CHINESE), "zh, chinese, zh-full"),
    (_listed(_KOREAN), "korean, ko-hhrm"),
    (_reading, "読み仮名, 読み仮名 ruby不使用, 読み, よみがな, ふりがな"),
    (_ruby, "ruby, ruby-ja, ルビ, rubi, zy"),
    (lambda args: args.get(1) or None, "nihongo2"),
    (_interwiki, "ill, interlanguage link, ill2, illm, ill-wd, lien, 仮リンク, link-wd, interlanguage link multi"),
    (
        _missing_article,
        "нп5, нп3, нп4, нп2, нп1, нп, нп6, iw, не переведено, не переведено 5, не переведено 3, не перекладено",
    ),
    (_long_interwiki, "tsl, translink"),
    (_portuguese_link, "link"),
    (_any_ship, "ship"),
    (_ship_class, "sclass, sclass2, sclass-"),
    (_linked_text, "linktext, keypress, key press"),
    (_identifier("ISBN"), "isbn"),
    (_identifier("ISSN"), "issn"),
    (_identifier("OCLC"), "oclc"),
    (_identifier("doi:"), "doi"),
    (_identifier("arXiv:"), "arxiv"),
    (_sic, "sic"),
    (_country, "flag, flagcountry, flagu, флагификация, bandera2, państwo, پرچم, علم, 国旗リンク, 국기, 국기나라"),
    (_url, "url, official url"),
)
