"""Vector storage and search: shards on disk, FAISS indexes on CPU and GPU, and a Milvus client."""
