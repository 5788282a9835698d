"""Bytes and JSON to frozen values and back; every check of a file format lives here, torch does not."""
