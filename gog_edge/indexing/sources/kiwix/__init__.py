"""Parts of the reader of ZIM files (`gog_edge.indexing.sources.zim`)."""
