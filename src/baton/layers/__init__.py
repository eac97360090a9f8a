"""Layers: plain modules without Lightning."""
