"""Distillation recipes: one idea a file."""

from baton.distill.distillation import Distillation as Distillation
