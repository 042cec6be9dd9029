"""More than one machine: embed with Ray Data, export Parquet, load Milvus."""
