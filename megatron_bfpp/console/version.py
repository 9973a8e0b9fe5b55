"""The version of the package, for lines in logs and files."""

__version__ = "0.1.0"
