"""expertgrid: a laboratory for ablations of image networks. Importing it imports no torch."""

from importlib.metadata import version

__version__ = version("expertgrid")
