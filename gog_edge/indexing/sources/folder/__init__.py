"""Folders of pictures that are described by tables and text files."""

from gog_edge.indexing.sources.folder.source import CHUNK_FILES, FolderSource

__all__ = ["CHUNK_FILES", "FolderSource"]
