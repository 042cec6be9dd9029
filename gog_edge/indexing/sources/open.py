"""Detects the format of a snapshot from its name and first bytes, and opens its reader."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from gog_edge.errors import InputError, SourceError
from gog_edge.indexing.sources.base import UNKNOWN_LICENCE, Source, wikipedia_text_licence
from gog_edge.indexing.sources.encyclopedic_vqa import LICENCE as EVQA_LICENCE
from gog_edge.indexing.sources.encyclopedic_vqa import EncyclopedicVqaSource
from gog_edge.indexing.sources.files import CompressedFile
from gog_edge.indexing.sources.folder import FolderSource
from gog_edge.indexing.sources.folder.columns import parse_columns
from gog_edge.indexing.sources.folder.decoding import is_encoding
from gog_edge.indexing.sources.images import DEFAULT_THUMBNAILS, ImageFolder, ThumbnailOptions
from gog_edge.indexing.sources.kiwix.parts import MAGIC, find_parts
from gog_edge.indexing.sources.mediawiki import MediaWikiSource
from gog_edge.indexing.sources.wiki6m import WIKIPEDIA_DATE, Wiki6mSource, is_wiki6m
from gog_edge.indexing.sources.wit import LICENCE as WIT_LICENCE
from gog_edge.indexing.sources.wit import WitSource, is_wit
from gog_edge.indexing.sources.zim import ZimSource

Kind: TypeAlias = Literal["zim", "wit", "encyclopedic-vqa", "wiki6m", "mediawiki", "folder"]
KINDS: dict[Kind, str] = {
    "zim": "a Kiwix .zim file, or its parts .zimaa, .zimab and so on",
    "wit": "Google's WIT, a .tsv.gz file or a folder of them, with a folder of images",
    "encyclopedic-vqa": "Encyclopedic VQA's knowledge base, .json or .zip, with a folder of images",
    "wiki6m": "InfoSeek's and OVEN's Wiki6M, .jsonl or .jsonl.gz, with a folder of images",
    "mediawiki": "a MediaWiki XML dump, .xml, .xml.bz2, .xml.gz or .xml.xz",
    "folder": "a folder of pictures, with tables (CSV, JSON) or text files",
}
_HEAD_BYTES = 2**16


def open_source(
    path: Path,
    *,
    kind: Kind | None = None,
    images: Path | None = None,
    language: str = "en",
    licence: str | None = None,
    columns: Sequence[str] = (),
    encoding: str = "",
    thumbnails: ThumbnailOptions = DEFAULT_THUMBNAILS,
) -> Source:
    """Return the reader of a snapshot. Only the first bytes of the file are read here.

    Args:
        path: a file or folder of one of KINDS.
        kind: its format; detected from name and content by default.
        images: the folder of images, for formats that contain image addresses only; `ImageFolder` lists the accepted
            file names.
        language: language code of the WIT rows to read; empty for all languages. For a dump, the variant of its
            language to choose, such as zh-hant.
        licence: licence of texts, and of a folder's pictures, where the snapshot does not state one.
        columns: names of columns in the tables of a folder, each as FIELD=NAME; common names are recognised.
        encoding: name of the codec of a folder's tables and texts that are not in UTF-8; Windows-1252 by default.
        thumbnails: how images are resized and encoded.

    Raises:
        SourceError: the path does not exist, or its format is not supported.
        InputError: `columns` names another field, `encoding` is unknown, or one of them is given for another format
            than a folder.
    """
    folder = ImageFolder(images, thumbnails)
    readers: dict[Kind, Callable[[], Source]] = {
        "zim": lambda: ZimSource(path, thumbnails, licence),
        "wit": lambda: WitSource(path, folder, language, licence or WIT_LICENCE),
        "encyclopedic-vqa": lambda: EncyclopedicVqaSource(path, folder, licence or EVQA_LICENCE),
        "wiki6m": lambda: Wiki6mSource(path, folder, licence or wikipedia_text_licence(WIKIPEDIA_DATE)),
        "mediawiki": lambda: MediaWikiSource(path, licence, language),
        "folder": lambda: FolderSource(path, thumbnails, licence or UNKNOWN_LICENCE, parse_columns(columns),
                                       encoding),
    }
    if kind is not None and kind not in get_args(Kind):
        raise SourceError(f"the kind of a snapshot must be one of {', '.join(KINDS)}, got '{kind}'")
    kind = kind or detect_kind(path)
    if columns and kind != "folder":
        raise InputError(f"columns are given for the tables of a folder of pictures, and '{path}' is of the kind "
                         f"'{kind}'; leave out --column")
    if encoding and kind != "folder":
        raise InputError(f"an encoding is given for the tables of a folder of pictures, and '{path}' is of the kind "
                         f"'{kind}'; leave out --encoding")
    if encoding and not is_encoding(encoding):
        raise InputError(f"the encoding '{encoding}' is unknown; give one such as cp1251, shift_jis or gb18030")
    return readers[kind]()


def detect_kind(path: Path) -> Kind:
    """Return the format of a snapshot.

    Raises:
        SourceError: the path does not exist, or its format is not supported.
    """
    if find_parts(path):
        return "zim"
    if not path.exists():
        raise SourceError(f"'{path}' does not exist; check the path of the snapshot")
    found = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    if found is None:
        supported = "".join(f"\n  {kind}: {what}" for kind, what in KINDS.items())
        raise SourceError(f"the format of '{path}' is not supported; supported are:{supported}")
    return found


def _kind_of_folder(path: Path) -> Kind | None:
    names = sorted(name for name in path.glob("*.tsv*") if name.is_file())
    if any(_kind_of_file(name) == "wit" for name in names[:3]):
        return "wit"
    return "folder" if next(path.iterdir(), None) is not None else None


def _kind_of_file(path: Path) -> Kind | None:
    with CompressedFile(path) as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        head = head.decode("utf-16", "replace").encode("utf-8", "replace")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(MAGIC) or path.suffix.lower() == ".zim":
        return "zim"
    if start.startswith((b"<mediawiki", b"<?xml")) and b"<mediawiki" in head:
        return "mediawiki"
    first, _, _ = head.partition(b"\n")
    if is_wit(first.decode("utf-8", "replace")):
        return "wit"
    if is_wiki6m(first) or b'"wikipedia_title"' in first:
        return "wiki6m"
    return "encyclopedic-vqa" if start.startswith(b"{") and b'"section_texts"' in head else None
