"""Turns the parser's messages into one sentence with the nearest names."""

from typing import Any


def explain(message: str, parser: Any) -> str:
    """Return one sentence for a message of jsonargparse's."""
    return message
