"""How one graph runs: numpy in, numpy out."""
