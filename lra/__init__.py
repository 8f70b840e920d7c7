"""Long Range Arena: train attention mechanisms on its tasks and compare them in one table."""

__version__ = "0.1.0"
