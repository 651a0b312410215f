"""``python -m qimg``."""

from qimg.cli.main import entry

entry()
