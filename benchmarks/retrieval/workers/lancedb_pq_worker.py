"""LanceDB with product codes."""

from __future__ import annotations

from lancedb_worker import Lance
from loop import main


class LancePq(Lance):
    """Its default index for vectors."""

    name = "lancedb pq"
    kind = "IVF_PQ"


if __name__ == "__main__":
    main(LancePq)
