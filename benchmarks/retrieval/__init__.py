"""The corpus of the retrieval benchmark, and the engines that search it."""
