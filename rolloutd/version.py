"""The package's version, in one place: pyproject.toml and the wire read it."""

__version__ = "0.1.0"
