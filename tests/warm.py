"""Imported by the server that children of test_resume are forked from: each would else draw the textures anew."""

import baton.stage  # noqa: F401
from baton.data.shapes_rendering import texture_bank

texture_bank(16)
