"""Supervised recipes: one method a file."""

from baton.supervised.classification import Classification as Classification
from baton.supervised.linear_probes import LinearProbes as LinearProbes
from baton.supervised.segmentation import Segmentation as Segmentation
