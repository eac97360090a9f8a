"""Baton trains vision networks in stages and passes verified weights from one stage to the next.

Importing it registers Baton's backbones with timm, so that `timm.create_model("wrn_16_2")` works.
"""

import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["list_backbones", "load_backbone"]

# The `baton` command must answer `--help` without waiting for torch; it imports what it needs by itself.
if Path(sys.argv[0]).stem not in ("baton", "-m"):  # `-m` while `python -m baton` starts
    from baton import backbones as backbones


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from baton.handover import load_backbone

        return load_backbone
    if name == "list_backbones":
        from baton.backbones import list_backbones

        return list_backbones
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
