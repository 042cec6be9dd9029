"""`python -m gog_edge.cli` is `gog-edge`."""

from gog_edge.cli import main

if __name__ == "__main__":
    main()
