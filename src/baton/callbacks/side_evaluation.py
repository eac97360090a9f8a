"""How good are the features? Two evaluations on the side, for any task over labelled data."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from baton.random_state import fixed_randomness
from baton.task import Task


class SideEvaluation(Callback):
    """Base: collect the backbone's pooled features of plain labelled images, score them, log the accuracy.

    Runs after a validation epoch, on its own loaders, without touching gradients, mode or random state, so the run
    is bit-identical with and without it.

    Args:
        every_n_epochs: how often.
        bank: use at most this many labelled training images, spread evenly over the data.
    """

    metric: str

    def __init__(self, every_n_epochs: int = 1, bank: int = 5000) -> None:
        self.every_n_epochs, self.bank = every_n_epochs, bank

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the features."""
        if trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs or trainer.sanity_checking:
            return
        loaders = trainer.datamodule.labelled_loaders(self.bank)  # type: ignore[attr-defined]
        if loaders is None or not isinstance(pl_module, Task):
            return
        classes = trainer.datamodule.num_classes  # type: ignore[attr-defined]
        with fixed_randomness(0), torch.no_grad():
            bank, labels = collect_features(trainer, pl_module, loaders[0])
            queries, targets = collect_features(trainer, pl_module, loaders[1])
        # Lightning validates in inference mode, whose tensors can never take part in a gradient.
        with fixed_randomness(0), torch.inference_mode(False), torch.enable_grad():
            predicted = self.classify(bank.clone(), labels.clone(), queries.clone(), classes)
        pl_module.record({self.metric: (predicted == targets).float().mean().item()})

    @abstractmethod
    def classify(
        self, bank: Float[Tensor, "n f"], labels: Int[Tensor, " n"], queries: Float[Tensor, "q f"], classes: int
    ) -> Int[Tensor, " q"]:
        """Predict the class of every query from labelled features."""


def collect_features(trainer: Trainer, task: Task, loader: Any) -> tuple[Float[Tensor, "n f"], Int[Tensor, " n"]]:
    """Return pooled features and labels of a loader's images, from all processes.

    Args:
        trainer: of the run.
        task: whose backbone is looked at, in evaluation mode.
        loader: yields (uint8 images, targets).
    """
    training = task.training
    task.eval()
    features, labels = [], []
    for batch in loader:
        images, targets = trainer.datamodule.transfer_batch_to_device(batch, task.device, 0)  # type: ignore[attr-defined]
        features.append(task.features(trainer.datamodule.to_float(images)).float())  # type: ignore[attr-defined]
        labels.append(targets)
    task.train(training)
    both = torch.cat(features), torch.cat(labels)
    if trainer.world_size == 1:
        return both
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, tuple(part.cpu() for part in both))
    return tuple(torch.cat(column).to(task.device) for column in zip(*parts, strict=True))  # type: ignore[return-value]


class OnlineKNN(SideEvaluation):
    """Weighted k-nearest-neighbour accuracy by cosine similarity (Wu et al., "Instance discrimination", 2018).

    Args:
        k: neighbours.
        temperature: of the votes, exp(similarity / temperature).
        every_n_epochs: how often.
        bank: use at most this many labelled training images, spread evenly over the data.
    """

    metric = "val/knn_accuracy"

    def __init__(self, k: int = 20, temperature: float = 0.07, every_n_epochs: int = 1, bank: int = 5000) -> None:
        super().__init__(every_n_epochs, bank)
        self.k, self.temperature = k, temperature

    def classify(
        self, bank: Float[Tensor, "n f"], labels: Int[Tensor, " n"], queries: Float[Tensor, "q f"], classes: int
    ) -> Int[Tensor, " q"]:
        """Let the k most similar samples of the bank vote."""
        bank, queries = F.normalize(bank), F.normalize(queries)
        similarity, nearest = (queries @ bank.T).topk(min(self.k, len(bank)), dim=1)
        votes = torch.zeros(len(queries), classes, device=queries.device)
        votes.scatter_add_(1, labels[nearest], (similarity / self.temperature).exp())
        return votes.argmax(1)


class OnlineLinearProbe(SideEvaluation):
    """Accuracy of a linear classifier on standardised, frozen features: logistic regression solved by L-BFGS.

    Args:
        weight_decay: L2 penalty on the weights.
        iterations: of L-BFGS.
        every_n_epochs: how often.
        bank: use at most this many labelled training images, spread evenly over the data.
    """

    metric = "val/linear_probe_accuracy"

    def __init__(
        self, weight_decay: float = 1e-3, iterations: int = 50, every_n_epochs: int = 1, bank: int = 5000
    ) -> None:
        super().__init__(every_n_epochs, bank)
        self.weight_decay, self.iterations = weight_decay, iterations

    def classify(
        self, bank: Float[Tensor, "n f"], labels: Int[Tensor, " n"], queries: Float[Tensor, "q f"], classes: int
    ) -> Int[Tensor, " q"]:
        """Fit the classifier on the bank and apply it to the queries."""
        mean, std = bank.mean(0), bank.std(0).clamp_min(1e-6)
        bank, queries = (bank - mean) / std, (queries - mean) / std
        weight = torch.zeros(bank.shape[1], classes, device=bank.device, requires_grad=True)
        bias = torch.zeros(classes, device=bank.device, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=self.iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(bank @ weight + bias, labels) + self.weight_decay * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return (queries @ weight + bias).detach().argmax(1)
