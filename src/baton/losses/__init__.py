"""Losses: pure functions of tensors."""

from baton.losses.attention import attention_map as attention_map
from baton.losses.attention import attention_transfer as attention_transfer
from baton.losses.hints import hint_loss as hint_loss
from baton.losses.input_gradients import gradient_attention_transfer as gradient_attention_transfer
from baton.losses.input_gradients import gradient_penalty as gradient_penalty
from baton.losses.input_gradients import gradient_symmetry as gradient_symmetry
from baton.losses.input_gradients import input_gradient as input_gradient
from baton.losses.soft_targets import knowledge_distillation as knowledge_distillation
