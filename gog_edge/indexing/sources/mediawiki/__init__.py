"""Reads MediaWiki XML dumps: the articles of the main namespace as paragraphs of prose and lists, and redirects."""

from gog_edge.indexing.sources.mediawiki.dump import MediaWikiSource
from gog_edge.indexing.sources.mediawiki.wikitext import parse_wikitext

__all__ = ["MediaWikiSource", "parse_wikitext"]
