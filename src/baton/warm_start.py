"""Imported once by the process that a chain's stages are forked from: everything a stage needs before it computes.

It parses one command, since the first parse of a process takes seconds (signatures and type stubs are read and
cached), and computes nothing: a process that has run a parallel region cannot be forked safely.
"""

import matplotlib.pyplot  # noqa: F401
import wandb.sdk.launch  # noqa: F401 (two seconds that every run would pay when it starts)

from baton.stage import check

check(["fit", "--model=Classification", "--model.backbone=wrn_16_1", "--data=Shapes"])
