"""The version, stated once: read by the build and by `rawmerge.__version__`."""

__version__ = "0.1.0"
