"""usearch with a byte for each dimension."""

from __future__ import annotations

from loop import main
from usearch_worker import Usearch


class UsearchBytes(Usearch):
    """A quarter of the memory of single precision."""

    dtype = "i8"
    name = "usearch i8"


if __name__ == "__main__":
    main(UsearchBytes)
