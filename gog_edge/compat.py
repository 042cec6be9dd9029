"""What Python 3.10 lacks, the only one that JetPack 6 builds its TensorRT for; later ones have it of their own."""

import sys

__all__ = ["StrEnum", "Traversable", "tomllib"]

if sys.version_info >= (3, 11):
    from enum import StrEnum
    from importlib.resources.abc import Traversable

    import tomllib
else:
    from enum import Enum
    from importlib.abc import Traversable

    import tomli as tomllib

    class StrEnum(str, Enum):
        """Members are their values, when they are shown, too."""

        __str__ = str.__str__
