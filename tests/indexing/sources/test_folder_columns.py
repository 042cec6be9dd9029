"""Columns are recognised by common names in several languages, and in the exports of museums as they are published."""

import pytest

from gog_edge.errors import InputError
from gog_edge.indexing.sources.folder.columns import FIELD_NAMES, find_roles, parse_columns, plain_name, without_markup

# Headers as the museums publish them.
MET = ["Object Number", "Is Highlight", "Is Timeline Work", "Is Public Domain", "Object ID", "Gallery Number",
       "Department", "AccessionYear", "Object Name", "Title", "Culture", "Period", "Dynasty", "Reign", "Portfolio",
"Constituent ID", "Artist Role", "Artist Prefix", "Artist Display Name", "Artist Display Bio", "Artist Suffix",
"Artist Alpha Sort", "Artist Nationality", "Artist Begin Date", "Artist End Date", "Artist Gender", "Artist ULAN URL",
"Artist Wikidata URL", "Object Date", "Object Begin Date", "Object End Date", "Medium", "Dimensions", "Credit Line",
"Geography Type", "City", "State", "County", "Country", "Region", "Subregion", "Locale", "Locus", "Excavation",
"River", "Classification", "Rights and Reproduction", "Link Resource", "Object Wikidata URL", "Metadata Date",
"Repository", "Tags", "Tags AAT URL", "Tags Wikidata URL"]  # fmt: skip
MOMA = ["Title", "Artist", "ConstituentID", "ArtistBio", "Nationality", "BeginDate", "EndDate", "Gender", "Date",
        "Medium", "Dimensions", "CreditLine", "AccessionNumber", "Classification", "Department", "DateAcquired",
"Cataloged", "ObjectID", "URL", "ImageURL", "OnView", "Height (cm)", "Width (cm)"]  # fmt: skip
TATE = ["id", "accession_number", "artist", "artistRole", "artistId", "title", "dateText", "medium", "creditLine",
        "year", "acquisitionYear", "dimensions", "width", "height", "depth", "units", "inscription",
"thumbnailCopyright", "thumbnailUrl", "url"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plain"),
    [("Filename", "filename"), ("file_name", "file name"), ("Bild-Datei", "bild datei"), ("thumbnailUrl",
                                                                                          "thumbnail url"),
     ("ImageURL", "image url"), ("Légende ", "legende"), ("Inv.-Nr.", "inv nr"), ("\ufeffTITEL", "titel"), ("ＦＩＬＥ",
                                                                                                            "file"),
     ("Künstler", "kunstler"), ("ファイル", "ファイル"), ("dc:title", "dc title"), ("Ελλάς", "ελλασ"), ("Ёж", "еж"),
     ("パス", "パス"), ("ชื่อไฟล์", "ชื่อไฟล์")],
)  # fmt: skip
def test_plain_names(name, plain):
    assert plain_name(name) == plain_name(plain) and (plain_name(name) == plain or not plain.isascii())


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("file", ["file", "Filename", "FILE_NAME", "image", "Picture", "path", "photo", "Datei", "Dateiname", "Bild",
                  "fichier", "Archivo", "imagen", "bestand", "arquivo", "plik", "soubor", "Filnamn", "tiedosto",
        "файл", "αρχείο", "dosya", "文件名", "ファイル名", "파일명", "صورة"]),
        ("title", ["title", "Name", "Titel", "Titre", "Título", "titolo", "Tytuł", "název", "nimi", "Название",
                   "Τίτλος", "başlık", "标题", "タイトル", "제목", "العنوان", "title_en", "dc:title", "Title(English)",
        "dcterms.title"]),
        ("caption", ["caption", "Legend", "Bildunterschrift", "légende", "didascalia", "подпись", "λεζάντα",
                     "キャプション"]),
        ("text", ["text", "Description", "beschreibung", "texte", "descripción", "Descrizione", "описание",
                  "περιγραφή", "描述", "説明", "설명", "الوصف", "description_de", "LabelText"]),
        ("licence", ["licence", "License", "rights", "Lizenz", "Rechte", "licenza", "licencia", "droits", "Лицензия",
                     "άδεια", "许可", "ライセンス", "라이선스", "dc:rights", "rightsStatement", "license_title",
        "license.name", "Lizenzangabe"]),
        ("attribution", ["attribution", "credit", "Credit_Line", "creditLine", "author", "Creator", "photographer",
                         "Urheber", "Fotograf", "auteur", "autor", "автор", "φωτογράφος", "作者", "撮影者", "저자",
        "Bildnachweis", "source", "Fotograf/in", "Urheber:in", "Künstler*in"]),
    ],
)  # fmt: skip
def test_common_names_in_several_languages(field, names):
    for name in names:
        assert find_roles([name]).columns[field] == (name,), name


def test_no_name_is_listed_for_two_fields_but_facts():
    listed = [name for field, names in FIELD_NAMES.items() if field != "detail" for name in names]
    assert len(listed) == len(set(listed))


def test_the_header_of_the_met():
    roles = find_roles(MET)
    assert roles.naming == ("Object Number", "Object ID")
    assert roles.columns["title"] == ("Title", "Object Name")
    assert roles.columns["attribution"] == ("Credit Line", "Artist Display Name")
    assert roles.columns["licence"] == ("Rights and Reproduction",)
    assert {"Medium", "Object Date", "Culture"} <= set(roles.columns["detail"])
    assert "Gallery Number" in roles.unused and "River" in roles.unused


def test_the_header_of_moma():
    roles = find_roles(MOMA)
    assert roles.naming == ("ImageURL", "URL", "AccessionNumber", "ObjectID")
    assert roles.columns["title"] == ("Title",) and roles.columns["attribution"] == ("CreditLine", "Artist")


def test_the_header_of_tate():
    roles = find_roles(TATE)
    assert roles.naming == ("thumbnailUrl", "url", "accession_number", "id")
    assert roles.columns["attribution"] == ("creditLine", "artist")
    assert roles.columns["licence"] == ("thumbnailCopyright",)


@pytest.mark.parametrize(
    ("column", "field"),
    [("images.web.filename", "file"), ("images.web.url", "address"), ("webImage.url", "address"), ("primaryImage",
                                                                                                   "address"),
     ("objectNumber", "number"), ("principalOrFirstMaker", "attribution"), ("share_license_status", "licence"),
     ("creators.description", "attribution"), ("people.displayname", "attribution"), ("primaryimageurl", "address")],
)  # fmt: skip
def test_paths_of_json_objects(column, field):
    assert find_roles([column]).columns[field] == (column,)


def test_given_columns_replace_recognised_ones():
    roles = find_roles(["file", "Inv.-Nr.", "title", "Notiz"], dict(parse_columns(["file=Inv.-Nr.", "text=notiz"])))
    assert roles.columns["file"] == ("Inv.-Nr.",) and roles.columns["text"] == ("Notiz",)
    assert roles.columns["title"] == ("title",) and roles.unused == ("file",)


@pytest.mark.parametrize("given", [["Inv.-Nr."], ["number=x"], ["file="], ["file=a", "file=b"], ["=x"]])
def test_malformed_assignments_are_refused(given):
    with pytest.raises(InputError, match="FIELD=NAME|one column"):
        parse_columns(given)


def test_long_and_strange_names_cost_nothing():
    roles = find_roles(["[" * 1_000_000, "", " ", "(((", "file" * 1000])
    assert not roles.naming and len(roles.unused) == 5


@pytest.mark.parametrize(
    ("cell", "text"),
    [("<p>One <em>two</em></p><p>three</p>", "One two three"), ("a &amp; b &lt;c&gt; &#233;", "a & b <c> é"),
     ("a<br/>b", "a b"), ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"), ("AT&T; R&D", "AT&T; R&D"), ("<b" * 100_000,
                                                                                              "<b" * 100_000),
     ('<a href="x">link</a>', "link"), ("<unknown>kept</unknown>", "<unknown>kept</unknown>")],
)  # fmt: skip
def test_markup_of_web_pages_is_removed(cell, text):
    assert " ".join(without_markup(cell).split()) == text
