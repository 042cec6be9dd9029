"""The names of templates by what a reader sees of them. Names are in lower case, with spaces.

A template that is neither here nor in `templates` leaves a hole in its sentence, unless it stands on lines of its own.
"""

from __future__ import annotations

import re

from gog_edge.indexing.sources.mediawiki.vocabulary import phrases

# Notes, maintenance tags, hatnotes, boxes, navigation, metadata: nothing of the sentence is missing without them.
_INVISIBLE = phrases(
    """
    cn, fact, cb, cbignore, rp, r, ref, refn, efn, note, notes, note tag, ref label, footnote, fn, fnote, ref-en,
    refbegin, refend, reflist, notelist, sfn, sfnp, sfnm, sfnref, harvid, harv, harvnb, harvtxt, harvp, harvcol,
    wikicite, clarify, clarification needed, clarify span, when, who, whom, by whom, which, where, why, how, what,
    dubious, disputed inline, disputed-inline, disputed, dead link, deadlink, dead, webarchive, wayback, page needed,
    pn, pp, failed verification, better source, better source needed, unreliable source?, unreliable source,
    unreliable source inline, verify source, verification needed, verify credibility, full citation needed, full,
    specify, vague, weasel inline, peacock inline, according to whom, attribution needed, original research inline,
    or, synthesis inline, syn, undue weight inline, pov inline, pov-inline, pov statement, opinion, relevance inline,
    importance inline, importance example, update inline, update after, update needed, needs update,
    contradict inline, contradiction inline, neologism inline, jargon inline, time fragment, vanity press,
    self-published inline, self-published source, primary source inline, primary source-inline,
    additional citation needed, medical citation needed, citation needed lead, excessive citations inline,
    definition needed, example needed, inconsistent, cite quote, irrelevant citation, non-primary source needed,
    tone inline, disambiguation needed, dn, bare url inline, date missing, year needed, anchor, anchors, anker, ancre,
    ancla, clear, clr, -, clear left, clear right, defaultsort, displaytitle, noteta, short description, italic title,
    lowercase title, lowercase, coord missing, authority control, persondata, good article, featured article, main,
    main article, see, see also, further, further information, about, redirect, redirect2, for, for multi, other uses,
    otheruses, other people, other places, distinguish, hatnote, self-reference, dablink, rellink, details,
    hatnote group, portal, portal bar, sister project links, commons, commons category, commonscat, wiktionary,
    wikiquote, wikisource, wikt-inline, flagicon, flag icon, flagdeco, flagicon image, icon, increase, decrease,
    steady, gain, loss, nochange, up, down, audio, listen, pronunciation, speaker icon, speakerlink, speaker link,
    ipa audio link, image, multiple image, double image, wide image, location map, maplink, osm location map,
    external media, external music video, toc, toc limit, toc right, toc left, compact toc, col-begin, col-end,
    col-break, col-2, col-3, col-4, col div, div col, div col end, colbegin, colend, columns-start, column,
    column-count, end, multicol, multicol-break, multicol-end, refimprove, stack, stack begin, stack end, quote box,
    quotebox, nomobile, use dmy dates, use mdy dates, use british english, use american english, engvarb,
    no more links, spoken wikipedia, inuse, under construction, in use, sources, lead too short,
    subscription required, registration required, closed access, open access, inflation-fn, inflation/fn,
    inflation-year, gutenberg author, internet archive author, librivox author, dmoz, imdb name, imdb title,
    official website, find a grave, commonscat-inline, wikivoyage-inline, worldcat id, ol author, in lang,
    ref supports2, r-phrase, internetquelle, literatur, belege fehlen, belege, hauptartikel, siehe auch,
    begriffsklärung, normdaten, personendaten, absatz, weiterleitungshinweis, dieser artikel, toter link, quelle,
    nur liste, lückenhaft, überarbeiten, veraltet, zukunft, veraltet nach jahr, lien web, ouvrage, article, chapitre,
    article détaillé, article connexe, lien brisé, référence nécessaire (bandeau), refsou, refins, quand, qui, lequel,
    laquelle, où, pourquoi, comment, interprétation personnelle, source secondaire, source à lier, infobox v2,
    ébauche, voir homonymes, homonymie, autorité, portail, palette, références, drapeau, prononciation,
    précision nécessaire, c'est-à-dire, combien, redirect confusion, à vérifier, date exacte, passage promotionnel,
    en-tête label, lire en ligne, plume, légende, colonnes, cita requerida, cr, demostrar, refn-es, ap, vt,
    enlace roto, listaref, bandera, bandera icono, aclarar, quién, cuándo, dónde, wikidata, desambiguación,
    otros usos, control de autoridades, web oficial, cita web, cita libro, cita publicación, cita noticia,
    obra citada, carece de fontes, ver desambiguação, artigo principal, citar web, citar livro, quando, quem, onde,
    esclarecer, controle de autoridade, falta fonte, sem fonte, referências, ligação inativa, flagicon2,
    carece de fontes2, nota de rodapé, nota, senza fonte, chiarire, vedi anche, nota disambigua, dipi,
    controllo di autorità, portale, citazione necessaria, quando?, bron?, feit, zie hoofdartikel, zie ook, zie dp,
    dode link, appendix, citeer web, citeer boek, bronvermelding, wie?, wanneer?, refs, нет аи, нет источника,
    нет аи 2, источник?, достоверность, проверить, уточнить, прояснить, когда, кто, где, какой, чей, стиль,
    неавторитетный источник, неавторитетный источник?, нейтральность?, проверить авторитетность, нет в источнике,
    якорь, флаг, книга, статья, примечания, другие значения, значения, основная статья, см. также, см. ниже, переход,
    сноска, недоступная ссылка, обновить, что, значимость факта, значимость?, аноним, подст:аи, к удалению,
    викифицировать, прапорець, джерело, чиє, не вказано джерело, автор, коли, хто?, джерело?, факт, прапор, прояснити,
    див. також, основна стаття, флагче, неуточнено, основна, fakt, potrzebne źródło, odn, u, flaga, osobny artykuł,
    cytuj, cytuj książkę, cytuj stronę, zobacz też, kto?, kiedy?, kontrola autorytatywna, doplňte zdroj, kdo?, kdy?,
    jaký?, kde?, viz též, rozcestník, autoritní data, wikislovník, kým?, zdroj?, nejasné, fakt/dne, källa behövs, kb,
    när, vem, huvudartikel, se även, webbref, bokref, tidningsref, flaggbild, fotnot, vilken, förtydliga,
    auktoritetsdata, trenger referanse, tr, når, hvem, flagg, utdypende, byline, kilde www, kilde bok, uddybende,
    kilde mangler, flertydig, dokumentasjon, lähde, lähde?, kenen mukaan, milloin, lippu, kirjaviite, verkkoviite,
    viitteet, pääartikkeli, kuka, mikä, kaynak belirt, olgu, fact-now, kim, ne zaman, ana madde, bayraksimge,
    web kaynağı, kaynakça, ölü bağlantı, otorite kontrolü, doğrula, butuh rujukan, fakta, kapan, siapa, utama,
    pranala mati, cần chú thích, cần dẫn nguồn, cước chú, chính, chú thích web, ai nói, khi nào, hivatkozás, forrás,
    mikor?, ki?, fő, bővebben, zászló, jegyzet, jegyzetek, halott link, forr, hol?, források, nincs forrás,
    necesită citare, când, cine, articol principal, drapel, fapt, τεκμηρίωση, πηγή, παραπομπή, κύριο, σημ, πότε,
    ποιος, εκκρεμεί παραπομπή, 要出典, 要検証, 要説明, 要追加記述, いつ, いつ範囲end, 誰, 誰範囲end, 独自研究?,
    信頼性要検証, 要ページ番号, 要文献特定詳細情報, 出典無効, refnest, 脚注ヘルプ, 脚注, リンク切れ, 複数の問題,
    出典の明記, enlink, 要曖昧さ回避, 精度, 要高次出典, 名無し, 暧昧さ回避, デフォルトソート, 特筆性, 要非一次資料,
    大言壮語範囲end, 要改訳, 要出典範囲end, gensai, 來源請求, 来源请求, 何时, 何時, 誰?, 谁, 地区用词, 需要解释,
    需要解釋, 查证请求, 來源, 需要引用, 注, 參見, 参见, 主条目, 主條目, 另见, 失效链接, 原创研究内文, 消歧义,
    国旗图标, 可疑, 출처, 출처 필요, 각주, 주석, 본문, 다른 뜻, 언제, 누가, 설명, 같이 보기, 확인 필요, 깨진 링크,
    웹 인용, 서적 인용, 전거 통제, بحاجة لمصدر, مصدر, حقيقة, مفصلة, بحاجة لتوضيح, متى, من, وصلة مكسورة, مراجع,
    استشهاد ويب, استشهاد بكتاب, وضح, انظر أيضا, ضبط استنادي, مرجع, قفم, مدرک, نیازمند منبع, پرچمک, اصلی, یادکرد وب,
    یادکرد کتاب, چه کسی, کی, روشن‌سازی, پانویس, یادکرد, پک, یاد, مدرک بهتر, گفتاورد ناقص, הערה, מקור, דרוש מקור,
    הבהרה, הפניה לערך מורחב, ערך מורחב, פירוש נוסף, הערות שוליים, מיזמים, קישור כללי, אנ, גר, רו, צר, חלקי, דגל,
    حوالہ درکار, اصل مقالہ, حوالہ جات, پرچم تصویر, उद्धरण आवश्यक, तथ्य, मुख्य, विस्तार, टिप्पणीसूची, তথ্যসূত্র প্রয়োজন,
    মূল নিবন্ধ, সত্যতা, ต้องการอ้างอิง, บทความหลัก, чињеница, чинj, зас, посебан чланак, семарх, знамеикона,
    citat potreban, izvor, cal citació, ff, polisèmia, enllaç no actiu, citar ref, kam?, mankas fonto,
    erreferentzia behar, vajab viidet, reikia šaltinio, atsauce, fakts, citat nødvendig, hvornår,
    der er behov for kilde, 국기그림, flagg, citation
    """
)
_INVISIBLE_START = re.compile(
    r"(?:infobox|infoboks|infotaula|infocaja|taxobox|speciesbox|automatic taxobox|geobox|navbox|sidebar|"
    r"series box|campaignbox|cite |cita |citar |citer |cytuj |cit[eé]r |cite-|vcite|use |pp-|r from |r to |sfn|"
    r"harv|efn|refn?-|wikisource|wikiquote|wikibooks|wikinews|wikiversity|wikivoyage|commons|wiktionary|portal|s-|"
    r"flagicon|флаг |прапор |drapeau |bandera |position|weather box|bar |chart|graph|clade|family ?tree|"
    r"chess diagram|election box|fb |succession|start box|end box|historical populations?|climate|more |"
    r"multiple issues|refimprove|unreferenced|cleanup|expand |copy ?edit|lead |blp |stub|toc |col-|div col|"
    r"location map|metadaten|formatierung|ficha |info/|inf[oó]caja|tabelle|imagemap|quote ?box|соседн|навигация|"
    r"клімат|климат|карточка|картка|картка:|اسم |صندوق |خانہ معلومات|جعبه |基礎情報|ユーザー|人物信息|信息框)"
)
_INVISIBLE_END = re.compile(
    r"(?:[ -]stub| icon| ikon| inline|-inline| needed|/fn|-fn| топик|-заглушка|のスタブ|小作品|小條目|토막글|"
    r" infobox| bilgi kutusu|-klass|[ -]geo-stub| stubs)$"
)
# What is dropped within parentheses, and leaves a hole elsewhere: "(pronounced ...)", "is pronounced ...".
_PRONUNCIATION = re.compile(
    r"(?:ipac?(?:-[\w-]+)?|ipa[- ].*|api|phonemic|respell|respelling|pron-?en|pronunciation.*|mfa.*|мфа.*|"
    r"lautschrift|audio-ipa|pronúncia|pronuncia|prononciation|aussprache|uitspraak|wymowa|výslovnost|lausunta|"
    r"発音|발음|국제음성기호|ipa2|h:ipa|grapheme|usdict|lang-.*-ipa|ipalink|ipa link|ipablink|ipa block link|"
    r"ipaslink)"
)

# Templates that display one of their arguments: name to the arguments of which the first given one counts.
_FIRST = phrases(
    """
    nowrap, nobr, no wrap, no break, small, smaller, smalldiv, small2, big, bigger, larger, large, huge, center,
    centre, nobold, noitalic, nobold-inline, normal, strong, em, strong with bold, mono, monospace, code, tt, kbd,
    key, samp, var, varserif, mvar, sc, smallcaps, smallcaps2, sc2, allcaps, underline, u-line, underlined, overline,
    abbr, abbrlink, abbreviation, tooltip, tt-tip, hover, visible anchor, vanchor, vanc, anchored text, polytonic,
    unicode, unicodechar, hebrew, arabic, script, serif, sans-serif, sans serif, not a typo, typo, as written,
    proper name, iast, iso 15919, link-interwiki, longitem, native name-inline, nopr, nobreak, bold, b, italic,
    italics, i, title-i, nihongo title, nihongo krt, angbr ia, music notation, semantics, math-text, color text,
    verse translation-inline, plainlinks, nastaliq, nq, text, block indent, blockindent, poem quote, poemquote,
    ribbon, mathrm, mathbf, mathit, strikethrough, ntsh-visible, sort visible, esd, ta, smn, dmg, bild, formatiert,
    umschrift, textfarbe, farbe, linktext1, nb, nobr2, souverain-, souverain, souverain2, refnec,
    référence nécessaire, référence souhaitée, passage non neutre, passage à actualiser, citation nécessaire,
    terme défini, surligner, petit, gras, italique, pas de coupure, exp-text, cita requerida texto, non neutre,
    indice-text, senza fonte testo, citazione necessaria testo, нобр, comment, имя, не опечатка, так, выделение,
    мелко, нп текст, нет источника в тексте, nieprzenoszalne, pismo, nowrap begin, nieskróć, j2, 要出典範囲, いつ範囲,
    誰範囲, 要検証範囲, 独自研究範囲, 補助漢字フォント, jis2004フォント, cp932フォント, jisx0212フォント,
    jis90フォント, 拡張漢字, unicode フォント, 色, 太字, 下線, 独自研究の範囲, 信頼性要検証範囲, 名前, 僻字, cjk, 補,
    cjk-new-char, 專名, 书名, 專名號, 不轉換, 國家, 색, 작은 글씨, 굵게, 줄바꿈 없음, نص صغير, لون, خط عربي, צבע,
    הדגשה, קטן, مختصر, رنگ, کوچک, text transcluded, highlight round, wikitext, nihongo foot
    """
)
_SECOND = phrases(
    """
    lang, langue, idioma, idioma2, язык, lang2, rtl-lang, ltr-lang, script-lang, hover title, htitle, resize,
    font-size, fontsize, font color, font colour, fontcolor, font, color, colour, textcolor, color box text, sprache,
    taal, språk, 言語, 語言, 언어, lang1, lang-nl2, bibleref2, lang list, lang-zh-tw2, 字体, nihongo core, style,
    llang
    """
)
_THIRD = phrases("tsl, translink, link, tlsp, le3, lnk")
_LAST = phrases("transl, transliteration, translit, transliterasi, транслит, xlit")
# Characters and short texts.
_TEXTS = {
    "!": "|", "pipe": "|", "=": "=", "'": "'", "' \"": "'\"", "\" '": "\"'", "'s": "'s", "(": "[", ")": "]",
    "!(": "[", ")!": "]", "lbrace": "{", "rbrace": "}", "*": "*", "hash": "#", "colon": ":", ",": ",", ";": ";",
    "·": " · ", "•": " • ", "dot": " · ", "middot": " · ", "bull": " • ", "bullet": " • ", "–": "–", "ndash": "–",
    "endash": "–", "en dash": "–", "—": "—", "mdash": "—", "emdash": "—", "em dash": "—", "mdashb": "—", "snd": " – ",
    "snds": " – ", "spnd": " – ", "sndash": " – ", "spaced ndash": " – ", "spaced en dash": " – ", "dash": " – ",
    "smd": " — ", "spaced mdash": " — ", "spaced em dash": " — ", "nbsp": " ", "space": " ", "spaces": " ",
    "thin space": " ", "thinsp": " ", "hair space": " ", "hairsp": " ", "nnbsp": " ", "0": "", "shy": "", "wbr": "",
    "zwsp": "", "zwj": "\u200d", "zwnj": "\u200c", "...": "...", "ellipsis": "...", "minus": "−", "times": "×",
    "pm": "±", "dagger": "†", "†": "†", "euro": "€", "€": "€", "ier": "Ier", "av jc": "av. J.-C.",
    "av. j.-c.": "av. J.-C.", "ap jc": "apr. J.-C.", "bc": "BC", "bce": "BCE", "ad": "AD", "ce": "CE",
    "до н. э.": "до н. э.", "н. э.": "н. э.", "mme": "Mme", "m.": "M.", "mlle": "Mlle", "dr": "Dr", "no.": "No.",
    "numero": "№", "number sign": "#", "yen": "¥", "pound": "£", "km2": "km²", "km²": "km²", "м²": "м²", "км²": "км²",
    "m2": "m²", "br": "\n", "break": "\n", "crlf": "\n", "سخ": "\n", "ש": "\n", "م": "م", "هـ": "هـ", "ق م": "ق.م",
    "ق.م": "ق.م", "apostrophe": "'", "quote mark": "\"", "okina": "ʻ", "ʻ": "ʻ", "hamza": "ʼ", "ayin": "ʿ",
    "asper": "ʽ", "sharp": "♯", "flat": "♭", "natural": "♮", "sup2": "²", "sup3": "³", "1/2": "½", "1/4": "¼",
    "degree": "°", "deg": "°", "copyright": "©", "male": "♂", "female": "♀", "tm": "™", "okay": "OK",
}  # fmt: skip
_BEFORE_NAMES = phrases("mme, m., mlle, dr, no., numero")
_ORDINALS = re.compile(
    r"(?:(?:\d+|[IVXLCDM]{2,})(?:er|re|ère|e|ème|º|ª)(?: siècle)?|[IVX]er? siècle)(?: av\. J\.-C\.)?"
)
_QUOTES = {"de": "„{}“", "fr": "« {} »", "es": "«{}»", "it": "«{}»", "ru": "«{}»", "uk": "«{}»", "pl": "„{}”",
    "nl": "„{}”"}
_QUOTATIONS = phrases(
    """
    blockquote, quote, quotation, cquote, bquote, pull quote, centered pull quote, quoteblock, zitat, zitat-en, ",
    citation bloc, citation étrangère, cita, citação, citazione, citaat, цитата, цитата2, cytat, citát, citat, sitat,
    sitaatti, lainaus, alıntı, kutipan, trích dẫn, idézet, παράθεση, 引用, quotation2, 引文, 인용문, اقتباس, گفتاورد,
    ציטוט, guil, guillemets, «, citation, bq, verse, poem, блок цитата, quote2, zitat2, cita2, bloccitaat
    """
)


def is_invisible(name: str) -> bool:
    """Return whether a template leaves nothing out of the sentence that it stands in."""
    return (name in _INVISIBLE or _INVISIBLE_START.match(name) is not None
            or _INVISIBLE_END.search(name) is not None)  # fmt: skip


def is_pronunciation(name: str) -> bool:
    """Return whether a template displays phonetic signs."""
    return _PRONUNCIATION.fullmatch(name) is not None


def fixed_text(name: str, given: str, argument: str) -> str | None:
    """Return the text of a template that is the same everywhere; None for other templates.

    Args:
        name: of the template, in lower case.
        given: the name as it is written. French ordinals are their own names, as `XIXe siècle`.
        argument: the first one. It follows a title, as in `{{Mme|Curie}}`, and does not matter to a space.
    """
    text = _TEXTS.get(name)
    if argument and text is not None and text.strip():
        return f"{text} {argument}" if name in _BEFORE_NAMES else None
    return given if text is None and _ORDINALS.fullmatch(given) else text


def displayed_argument(name: str) -> int:
    """Return the number of the argument that a template displays: -1 for the last one, 0 for other templates."""
    for number, names in ((1, _FIRST), (2, _SECOND), (3, _THIRD), (-1, _LAST)):
        if name in names:
            return number
    return 0


def is_quotation(name: str, language: str) -> bool:
    """Return whether a template displays a quotation. `{{citation}}` is a reference in English."""
    return name in _QUOTATIONS and not (name == "citation" and language not in ("fr",))


def quotation_marks(language: str) -> str:
    """Return the quotation marks of a language around `{}`."""
    return _QUOTES.get(language, "“{}”")
