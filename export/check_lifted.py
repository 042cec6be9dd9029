"""The former name of `export.check_conversion`."""

from __future__ import annotations

from export.check_conversion import main

if __name__ == "__main__":
    raise SystemExit(main())
