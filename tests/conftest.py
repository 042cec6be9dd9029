"""Being here puts this folder on the path: tests of all folders may import its helper modules."""
