"""What kind of snapshot a path is, by its name and its first bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.base import UNKNOWN, Source, wikipedia_text
from gog_edge.indexing.sources.encyclopedic_vqa import LICENCE as EVQA_LICENCE
from gog_edge.indexing.sources.encyclopedic_vqa import EncyclopedicVqaSource
from gog_edge.indexing.sources.files import ImageFolder, PackedFile
from gog_edge.indexing.sources.folder import FolderSource
from gog_edge.indexing.sources.images import RULES, ThumbnailRules
from gog_edge.indexing.sources.mediawiki import MediaWikiSource
from gog_edge.indexing.sources.wiki6m import TAKEN, Wiki6mSource, is_wiki6m
from gog_edge.indexing.sources.wit import LICENCE as WIT_LICENCE
from gog_edge.indexing.sources.wit import WitSource, is_wit
from gog_edge.indexing.sources.zim import ZimSource

Kind: TypeAlias = Literal["zim", "wit", "encyclopedic-vqa", "wiki6m", "mediawiki", "folder"]
KINDS: dict[Kind, str] = {
    "zim": "a Kiwix .zim file",
    "wit": "Google's WIT, a .tsv.gz file or a folder of them, with a folder of images",
    "encyclopedic-vqa": "Encyclopedic VQA's knowledge base, .json or .zip, with a folder of images",
    "wiki6m": "InfoSeek's and OVEN's Wiki6M, .jsonl or .jsonl.gz, with a folder of images",
    "mediawiki": "a MediaWiki XML dump, .xml, .xml.bz2 or .xml.gz",
    "folder": "a folder of pictures",
}
_ZIM_MAGIC = b"ZIM\x04"
_HEAD_BYTES = 2**16


def open_source(
    path: Path,
    *,
    kind: Kind | None = None,
    images: Path | None = None,
    language: str = "en",
    licence: str | None = None,
    rules: ThumbnailRules = RULES,
) -> Source:
    """The reader of a snapshot; nothing of it is read yet but its first bytes.

    Args:
        path: a file or folder of one of KINDS.
        kind: which of them it is; told by its name and its first bytes where left out.
        images: the folder of images, for those that hold addresses alone; see `image_folder` for their names.
        language: of WIT's rows; empty for all.
        licence: of texts, and of a folder's pictures, where the snapshot names none.
        rules: for thumbnails.

    Raises:
        SourceError: there is nothing there, or nothing that is read.
    """
    folder = ImageFolder(images, rules)
    makers: dict[Kind, Callable[[], Source]] = {
        "zim": lambda: ZimSource(path, rules, licence),
        "wit": lambda: WitSource(path, folder, language, licence or WIT_LICENCE),
        "encyclopedic-vqa": lambda: EncyclopedicVqaSource(path, folder, licence or EVQA_LICENCE),
        "wiki6m": lambda: Wiki6mSource(path, folder, licence or wikipedia_text(TAKEN)),
        "mediawiki": lambda: MediaWikiSource(path, licence),
        "folder": lambda: FolderSource(path, rules, licence or UNKNOWN),
    }
    if kind is not None and kind not in get_args(Kind):
        raise SourceError(f"there is no kind of snapshot '{kind}'; choose one of {', '.join(KINDS)}")
    return makers[kind or kind_of(path)]()


def kind_of(path: Path) -> Kind:
    """The kind of what lies at a path; SourceError when it is none."""
    if not path.exists():
        raise SourceError(f"there is nothing at '{path}'; is this the right path?")
    found = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    if found is None:
        known = "".join(f"\n  {kind}: {what}" for kind, what in KINDS.items())
        raise SourceError(f"'{path}' is no snapshot that is read; those are:{known}")
    return found


def _kind_of_folder(path: Path) -> Kind | None:
    names = sorted(path.glob("*.tsv*"))
    if any(_kind_of_file(name) == "wit" for name in names[:3]):
        return "wit"
    return "folder" if next(path.iterdir(), None) is not None else None


def _kind_of_file(path: Path) -> Kind | None:
    with PackedFile(path) as file:
        head = file.read(_HEAD_BYTES)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(_ZIM_MAGIC):
        return "zim"
    if start.startswith((b"<mediawiki", b"<?xml")) and b"<mediawiki" in head:
        return "mediawiki"
    first, _, _ = head.partition(b"\n")
    if is_wit(first.decode("utf-8", "replace")):
        return "wit"
    if is_wiki6m(first) or b'"wikipedia_title"' in first:
        return "wiki6m"
    return "encyclopedic-vqa" if start.startswith(b"{") and b'"section_texts"' in head else None
