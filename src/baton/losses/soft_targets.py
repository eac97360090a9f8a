"""Knowledge distillation: a student learns the softened class probabilities of its teacher."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def knowledge_distillation(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float,
    form: Literal["kl", "legacy"] = "kl",
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(t / T) || softmax(s / T)): what is lost by taking the student's probabilities for the teacher's.

    T^2 keeps the size of its gradient beside the labels' cross-entropy, whatever the temperature. Two forms:

        kl       summed over the classes, mean over the batch
        legacy   2 T^2 times the mean over batch and classes: what the public code of attention transfer had from
                 January 2017 to July 2018, when its published numbers were made; with C classes, 2 / C of `kl`

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2; Zagoruyko's
    thesis, section 6.4.1 (T = 4, and the weights 0.9 for this and 0.1 for the cross-entropy).

    Args:
        student_logits: class scores s.
        teacher_logits: class scores t.
        temperature: T, above 0.
        form: see above.

    Raises:
        ValueError: for a temperature of 0 or less, or an unknown form.
    """
    if not temperature > 0 or form not in ("kl", "legacy"):
        raise ValueError(
            f"Expected a temperature above 0 and the form 'kl' or 'legacy', but got {temperature!r} and {form!r}."
        )
    student, teacher = (
        F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
        for logits in (student_logits, teacher_logits)
    )
    divergence = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence if form == "kl" else 2 * divergence / student.shape[1]
