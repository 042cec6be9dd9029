"""Parts of the parser of HTML pages (`gog_edge.indexing.sources.html`)."""
