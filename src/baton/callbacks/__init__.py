"""Callbacks: looking at a run from outside. None of them knows a task."""

from baton.callbacks.dirac_scales import DiracScales as DiracScales
from baton.callbacks.further_tests import TestOnTrainingImages as TestOnTrainingImages
from baton.callbacks.further_tests import TestOnWholeImages as TestOnWholeImages
from baton.callbacks.njet_filters import NJetFilters as NJetFilters
from baton.callbacks.njet_scales import NJetScales as NJetScales
from baton.callbacks.pictures import Pictures as Pictures
from baton.callbacks.progress import ProgressBar as ProgressBar
from baton.callbacks.receptive_field import ReceptiveField as ReceptiveField
from baton.callbacks.side_evaluation import OnlineKNN as OnlineKNN
from baton.callbacks.side_evaluation import OnlineLinearProbe as OnlineLinearProbe
from baton.callbacks.training_time import TrainingTime as TrainingTime
