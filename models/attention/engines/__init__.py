"""Arithmetic that several mechanisms share."""
