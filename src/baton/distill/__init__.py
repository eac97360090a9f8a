"""Distillation recipes: one idea a file."""
