"""Supervised recipes: one method a file."""

from baton.supervised.classification import Classification as Classification
