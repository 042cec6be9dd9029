"""What a dump's `<siteinfo>` says of a wiki, and the keywords of MediaWiki's languages that it does not contain.

A dump lists the namespaces by their local names only. Their aliases and the words for `#REDIRECT` are built in for the
large languages (https://www.mediawiki.org/wiki/Help:Namespaces, Help:Magic_words). Behaviour switches and files are
also recognised by their form, in any language.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote
from xml.etree import ElementTree

from gog_edge.indexing.sources.mediawiki.vocabulary import words

HIDDEN_LINKS = words(
    """
    file image media category archivo imagen ficheiro imagem arquivo fichier fitxer imatge fitxategi irudi immagine
    bestand afbeelding datei bild fil billede bilde mynd tiedosto kuva fail pilt attēls vaizdas plik grafika soubor
    obrázok súbor slika datoteka fájl kép fișier fişier imagine skeda dosiero berkas gambar imej dosya resim fayl
    şəkil tasvir tập_tin hình talaksan larawan restr delwedd íomhá comhad faidhle bestân ofbyld lêer beeld fasciculus
    imago imaxe ficheru figura imachen tugna файл изображение зображення выява датотека слика фотографија податотека
    картинка сурет рәсем ресим зураг акс сурат αρχείο εικόνα պատկեր ფაილი სურათი קובץ תמונה טעקע בילד ملف صورة پرونده
    تصویر فایل وێنە پەڕگە دوتنه انځور فائل चित्र सञ्चिका चित्रम् ছবি চিত্র চিত্ৰ ਤਸਵੀਰ ચિત્ર ଚିତ୍ର ଫାଇଲ படிமம் దస్త్రం ఫైలు బొమ్మ
    ಚಿತ್ರ പ്രമാണം ചിത്രം ගොනුව රූපය ไฟล์ ภาพ ຮູບ ဖိုင် ឯកសារ រូបភាព ፋይል ስዕል ファイル 画像 文件 档案 檔案 图像 圖像 图片
    圖片 파일 그림 categoría categoria catégorie categorie kategoria kategorie kategori kategória kategorija kategorio
    kategoriya kateqoriya luokka kategooria flokkur turkum catagóir categori thể_loại kaurian jamii kategorya kategory
    kat cat категория категорія катэгорыя категорија санат төркем ангилал гурӯҳ κατηγορία կատեգորիա კატეგორია קטגוריה
    קאַטעגאָריע к кт קט sanat fotografija wêne kategorî faili picha sary sokajy fichièr stampa wobraz फाइल चित्रं
    ofbeelding 文檔 تصنيف رده پۆل زمرہ زمرو وېشنيزه श्रेणी वर्ग वर्गः বিষয়শ্রেণী শ্রেণী ਸ਼੍ਰੇਣੀ શ્રેણી ଶ୍ରେଣୀ பகுப்பு వర్గం ವರ್ಗ
    വർഗ്ഗം വിഭാഗം ප්‍රවර්ගය หมวดหมู่ ໝວດ ကဏ္ဍ ចំណាត់ថ្នាក់ក្រុម መደብ カテゴリ 分类 分類 분류
    """
)  # namespaces whose links display no text, in lower case, with underscores
_MEDIA = re.compile(
    r"\.(?:jpe?g|png|gif|svg|webp|tiff?|bmp|xcf|pdf|djvu|og[gva]|oga|opus|webm|mp[34]|wav|flac|midi?|stl)$"
)
_REDIRECT_WORDS = words(
    """
    redirect redirección redireccion redirecció redireccio redirecionamento redirection redirèccion rinvia rinvio
    weiterleitung doorverwijzing omdirigering omdiriger ohjaus uudelleenohjaus suuna suunamine tilvísun patrz
    przekieruj przekierowanie tam ancaminar adkas presmeruj presmerovat přesměruj preusmeri preusmjeri preusmeritev
    átirányítás redirecteaza ridrejto alidirektu alidirekti al alih lencong yönlendir yönlendirme istiqamətləndirmə
    istiqamətləndir yönləndirmə aýdaw yoʻnaltirish đổi birzuzendu ail-cyfeirio ailgyfeirio athsheoladh aanstuur
    trochferwizing wiederleiden virleedung viruleedung перенаправление перенапр перенаправлення перанакіраваньне
    перанакіраванне преусмери преусмјери пренасочување пренасочване виж види редирект айдау юнәлтү ανακατευθυνση
    ανακατεύθυνση վերահղում გადამისამართება הפניה ווייטערפירן تحويل تغییرمسیر رجوعمکرر ڕەوانەکەر چوريو अनुप्रेषित
    पुनर्प्रेषित पुनर्निर्देशन अनुप्रेषितम् পুনঃনির্দেশ পুনর্নির্দেশ ਰੀਡਿਰੈਕਟ ਰੀਡਾਇਰੈਕਟ રીડાયરેક્ટ ଲେଉଟାଣି வழிமாற்று దారిమార్పు
    ಪುನರ್ನಿರ್ದೇಶನ തിരിച്ചുവിടുക යළියොමුව เปลี่ยนทาง ប្ដូរទីតាំង ប្តូរទីតាំងទៅ បញ្ជូនបន្ត 転送 リダイレクト 重定向 重新導向
    넘겨주기
    """
)
_REDIRECT = re.compile(
    r"(?:\s|\ufeff|<!--(?>.*?-->))*+[#＃](?P<space>\s*)"
    r"(?P<word>[^\s:：#\[\]{}|]{1,40}(?:[ _][^\s:：#\[\]{}|]{1,40}){0,2}?)"
    r"\s*[:：]?\s*\[\[(?P<target>[^\[\]|\n]+)(?:\|[^\[\]\n]*)?\]\](?P<rest>.*)",
    re.DOTALL,
)
_BARE_REDIRECT = re.compile(r"\s*[#＃]\s*(?P<word>[^\s:：#\[\]{}|]{1,40})\s*[:：]?\s*(?:\[\[\s*\]\]\s*)?")
_WITHOUT_TEXT = re.compile(
    r"(?:\s|<!--(?>.*?-->)|\{\{[^{}]*\}\}|\[\[[^\[\]|:]+:[^\[\]]*\]\])*+", re.DOTALL
)
# Words between double underscores are behaviour switches if they are in capitals or in a script without case. Macros
# of C, Perl and PHP look the same, and are text.
_LETTERS = r"[^\s_＿!-&(-,./:-@\[-^`{-~]"  # and marks; anything but white space and ASCII punctuation
_SWITCH = re.compile(rf"(?<![^\W_])(?:__|＿＿)({_LETTERS}+(?:_{_LETTERS}+)*)_?(?:__|＿＿)(?![^\W_])")
_MACROS = words(
    """
    FILE LINE DATE TIME FUNCTION FUNC CLASS DIR METHOD NAMESPACE TRAIT PACKAGE SUB END DATA COUNTER GNUC STDC
    STDC_VERSION VA_ARGS VA_OPT TIMESTAMP
    """
)
# Prefixes of links to the same article in other languages. Such links are shown beside a page, not in it.
LANGUAGES = words(
    """
    aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar
    bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca cbk-zam cdo ce
    ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz ee egl el eml en eo es et
    eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gsw gu guc gur
    guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig igl ii ik ilo inh io is it iu ja jam jbo jv
    ka kaa kab kaj kbd kbp kcg kg kge ki kj kk kl km kn knc ko koi kr krc ks ksh ku kus kv kw ky la lad lb lbe lez lfn
    lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mo mnw mos mr mrj ms
    mt mus mwl my myv mzn na nah nan nap nb nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny oc olo om
    or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ppl ps pt pwn qu rki rm rmy rn ro roa-rup roa-tara rsk
    ru rue rup rw sa sah sat sc scn sco sd se sg sgs sh shi shn shy si simple sk skr sl sm smn sn so sq sr srn ss st
    stq su sv sw syl szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tok tpi tr trv ts tt tum tw ty tyv udm
    ug uk ur uz ve vec vep vi vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical zh-cn
    zh-min-nan zh-tw zh-yue zu
    """
)
_SISTERS = words(
    """
    w wikt s q b n v voy c d m mw wiktionary wikisource wikiquote wikibooks wikinews wikiversity wikivoyage wikidata
    species wikispecies commons meta
    """
)  # fmt: skip
_LANGUAGE_OF_HOST = re.compile(r"//([a-z]{2,3}(?:-[a-z]+)*|simple)\.(?:m\.)?wik[a-z]+\.org/")
_LANGUAGE_OF_DATABASE = re.compile(r"([a-z]{2,3}(?:_[a-z_]+)?|simple)wik(?:i|tionary)[a-z]*")
_FILES, _CATEGORIES, _MEDIA_FILES, _TEMPLATES = "6", "14", "-2", "10"


@dataclass(frozen=True, slots=True)
class Site:
    """A wiki, as far as its pages depend on it."""

    language: str = "en"
    variant: str = ""  # of a language with several scripts, such as zh-hant; empty for the first one
    date: str = ""  # ISO 8601, of the dump
    name: str = ""
    namespaces: dict[str, str] = field(default_factory=dict)  # key to local name; empty for articles
    hidden: frozenset[str] = HIDDEN_LINKS
    capital_titles: bool = True  # the first letter of a title is always a capital

    @property
    def format_language(self) -> str:
        """Return the language whose style numbers and dates have."""
        return {"simple": "en", "nb": "no", "be-tarask": "be", "be-x-old": "be"}.get(self.language, self.language)

    @property
    def template_prefixes(self) -> frozenset[str]:
        """Return the names of the namespace of templates, in lower case."""
        return frozenset(("template", self.namespaces.get(_TEMPLATES, "").lower())) - {""}

    def namespace_of(self, title: str) -> str:
        """Return the prefix of a title if it is a namespace, a language or a sister project; else an empty text."""
        prefix, colon, _ = title.lstrip(":").partition(":")
        prefix = prefix.strip().replace(" ", "_").lower()
        known = prefix in self.hidden or prefix in LANGUAGES or prefix in _SISTERS or prefix in self._spaces
        return prefix if colon and known else ""

    def namespace_key(self, title: str) -> str:
        """Return the key of the namespace that a title names; "0" for articles."""
        prefix, colon, _ = title.partition(":")
        keys = {name.lower(): key for key, name in self.namespaces.items() if name}
        return keys.get(prefix.strip().lower(), "0") if colon else "0"

    @property
    def _spaces(self) -> set[str]:
        return {name.replace(" ", "_").lower() for name in self.namespaces.values() if name}


def read_site(siteinfo: ElementTree.Element, language: str = "", date: str = "", variant: str = "") -> Site:
    """Return the wiki of a `<siteinfo>` element.

    Args:
        siteinfo: the element.
        language: `xml:lang` of the dump, used if neither address nor name of the wiki tells its language.
        date: of the dump.
        variant: the wanted variant of the language, ignored if the wiki has another language.
    """
    spaces = {space.get("key", ""): (space.text or "").strip() for space in siteinfo.iterfind("namespaces/namespace")}
    found = (_LANGUAGE_OF_HOST.search(siteinfo.findtext("base") or "")
             or _LANGUAGE_OF_DATABASE.fullmatch(siteinfo.findtext("dbname") or ""))  # fmt: skip
    code = found[1].replace("_", "-") if found else language.lower() or "en"
    hidden = {spaces[key].replace(" ", "_").lower() for key in (_FILES, _CATEGORIES, _MEDIA_FILES) if spaces.get(key)}
    return Site(
        language=code,
        variant=variant.lower() if variant.lower().split("-")[0] == code.split("-")[0] else "",
        date=date,
        name=siteinfo.findtext("sitename") or "",
        namespaces=spaces,
        hidden=HIDDEN_LINKS | hidden,
        capital_titles=(siteinfo.findtext("case") or "first-letter") == "first-letter",
    )


LinkKind = Literal["hidden", "sound", "shown"]


def link_kind(title: str, site: Site) -> LinkKind:
    """Return whether a link displays a text where it stands, which is "listen" or the like for one to a sound."""
    prefix, colon, rest = title.partition(":")
    prefix = prefix.strip().replace(" ", "_").lower()
    if not colon or not prefix or not rest.strip():
        return "shown"
    if prefix in ("media", site.namespaces.get(_MEDIA_FILES, "").replace(" ", "_").lower()):
        return "sound"
    if prefix in site.hidden or (prefix in LANGUAGES and prefix != site.language):
        return "hidden"
    return "hidden" if _MEDIA.search(rest.strip().lower()) else "shown"


def shown_title(title: str) -> str:
    """Return the text of a link without a label."""
    title = title.strip().lstrip(":").strip()
    prefix, colon, rest = title.partition(":")
    return rest.strip() if colon and prefix.strip().lower() in _SISTERS and rest.strip() else title.removeprefix("#")


def remove_switches(text: str) -> str:
    """Remove the behaviour switches of any language, such as `__NOTOC__` or `__目次非表示__`."""
    return _SWITCH.sub(_switch, text) if "__" in text or "＿＿" in text else text


def _switch(found: re.Match[str]) -> str:
    word = found[1]
    small = any(letter != letter.title() for letter in word)
    return found[0] if word in _MACROS or (small and word.lower() not in _LOWER_SWITCHES) else ""


_LOWER_SWITCHES = words(
    """
    notoc toc forcetoc noeditsection nogallery hiddencat index noindex notitleconvert notc nocc nocontentconvert
    newsectionlink nonewsectionlink staticredirect disambig
    """
)  # fmt: skip


def redirect_target(text: str) -> str | None:
    """Return the title that a page redirects to, with its section; None if the page is no redirect, an empty text
    if its target is missing.

    The keyword is known for the large languages. Any other word before a link counts if the page has no other text.
    """
    if (bare := _BARE_REDIRECT.fullmatch(text[:400])) and _redirect_word(bare["word"]) in _REDIRECT_WORDS:
        return ""
    if "[[" not in text[:400] or not (found := _REDIRECT.match(text)):
        return None
    word = _redirect_word(found["word"])
    alone = not found["space"] and _WITHOUT_TEXT.fullmatch(found["rest"][:20000]) is not None
    return found["target"].strip() if word in _REDIRECT_WORDS or alone else None


def _redirect_word(word: str) -> str:
    return re.sub(r"[ _\u200c\u0307]", "", word.casefold())


def clean_title(title: str, site: Site) -> str:
    """Return a title as its page has it: without a section, with spaces, its first letter a capital."""
    title = html.unescape(unquote(title)).partition("#")[0].replace("_", " ").strip().lstrip(":").strip()
    title = " ".join(title.split())
    return title[:1].upper() + title[1:] if site.capital_titles else title
