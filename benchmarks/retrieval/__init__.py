"""What the retrieval benchmark searches, and the engines that search it."""
