"""Writes a new pack from drafts at hand: small collections, made in one go. `build` reads snapshots of any size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from gog_edge.errors import PackError
from gog_edge.indexing.commit import writing
from gog_edge.indexing.drafts import ArticleDraft, ImageDraft
from gog_edge.indexing.generation import NextGeneration, PackOptions
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, Manifest, Snapshot

__all__ = ["ArticleDraft", "ImageDraft", "PackOptions", "PackWriter", "Snapshot"]


class PackWriter:
    """Writes one pack into an empty or new folder. Use as a context manager; nothing is a pack before `commit`.

    The same drafts, encoder and settings give the same store, vectors and index.
    """

    def __init__(self, folder: Path, *, name: str, snapshot: Snapshot, encoder: Encoder | None,
                 options: PackOptions | None = None) -> None:
        """Without an encoder, the pack is searched by words alone.

        Raises:
            PackError: the folder is not empty, or the name does not fit into an address.
        """
        if folder.exists() and any(folder.iterdir()):
            raise PackError(f"'{folder}' is not empty; a pack is never overwritten, choose another folder or remove it")
        self.folder = folder
        self._generation = NextGeneration(folder, name=name, snapshot=snapshot, encoder=encoder,
                                          options=options or PackOptions(), parent=None)
        self._lock = writing(folder)
        self._lock.__enter__()
        self._store = self._generation.open_store()

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()
        self._generation.close()
        self._lock.__exit__(kind, value, trace)

    def add_article(self, draft: ArticleDraft) -> int:
        """Write an article and return its id; PackError when its title is empty or its key is taken."""
        return self._store.add_article(draft)

    def add_image(self, draft: ImageDraft) -> None:
        """Write an image of articles that were added before.

        The same file given twice is stored once and belongs to the articles of both.

        Raises:
            PackError: an article is not there, or the file is of a kind that is not stored.
            PictureError: the file cannot be decoded.
        """
        decode_picture(draft.data)
        self._store.add_image(draft)

    def add(self, articles: Iterable[ArticleDraft], images: Iterable[ImageDraft]) -> None:
        """Write articles, then images."""
        for article in articles:
            self.add_article(article)
        for image in images:
            self.add_image(image)

    def commit(self) -> Manifest:
        """Embed, index, and write the manifest.

        Raises:
            PackError: there is no article, or no image finds itself.
        """
        if not self._store.counts.articles:
            raise PackError(f"'{self.folder}': there is no article; add one, or remove '{self.folder / BUILD}'")
        self._generation.finish_store(self._store)
        return self._generation.finish()
