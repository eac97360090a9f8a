"""Loaders: a training order that depends on (seed, epoch) alone, and evaluation that counts every sample once."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def _as_fetched(batch: Any) -> Any:
    """`__getitems__` returns whole batches already."""
    return batch


class _Order(DistributedSampler):
    """PyTorch's own distributed order (one process is the case of one replica), able to start in the middle."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        start, self.start = self.start, 0
        return iter(indices[start:])


class ResumableLoader(DataLoader):
    """Training loader whose position in the epoch is part of a checkpoint.

    The order of an epoch is a function of (seed, epoch), equal for any number of processes: rank r takes every
    r-th sample of it, so that 1 x 8 and 2 x 4 see the same samples in the same step.

    Args:
        dataset: fetched through `__getitems__`, which returns whole batches; its `set_epoch(epoch)`, if it has one,
            is called when an epoch starts.
        batch_size: samples a batch.
        num_workers: worker processes.
        drop_last: drop an incomplete last batch.
        seed: of the order.
        num_replicas: number of processes.
        rank: of this process.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        num_workers: int = 0,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        order = _Order(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=False)
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=order,
            num_workers=num_workers,
            drop_last=drop_last,
            collate_fn=_as_fetched,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: starting an epoch must not consume the global random state.
            generator=torch.Generator().manual_seed(seed),
        )
        self._order = order
        self._batches = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing here runs before the first batch is asked for, when Lightning has set the epoch.
        epoch = self._order.epoch
        resume, self._resume = self._resume, None
        self._batches = resume["batches"] % len(self) if resume is not None and resume["epoch"] == epoch else 0
        self._order.start = self._batches * self.batch_size  # type: ignore[operator]
        if hasattr(self.dataset, "set_epoch"):
            cast(Any, self.dataset).set_epoch(epoch)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it handed out so far; Lightning stores it with the fit loop."""
        return self._resume or {"epoch": self._order.epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start after the batches already seen if the next epoch is the stored one, else at the beginning.

        The epoch decides, as Lightning also stores the state of an epoch that `limit_train_batches` cut short.
        """
        self._resume = dict(state)


class _EvenBatches(DistributedSampler):
    """Batches of indices: each sample once over all ranks, and the same number of batches on every rank.

    Lightning would pad the ranks with repeated samples (metrics change), and ranks with different numbers of batches
    would wait for each other's buffers for ever. So every rank takes its share of samples and cuts it into the same
    number of batches, whose sizes differ by at most one.
    """

    def __init__(self, dataset: Any, batch_size: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        total = len(dataset)
        if total < num_replicas:
            raise ValueError(f"An evaluation split of {total} samples cannot be shared by {num_replicas} processes.")
        share = -(-total // num_replicas)
        own = torch.arange(rank, total, num_replicas)
        # Never an empty batch: where shares differ and batches are tiny, a batch grows by one instead.
        count = min(-(-share // batch_size), total // num_replicas)
        self.batches = [part.tolist() for part in own.tensor_split(count)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Whole(Dataset):
    """Lets a sampler of batches fetch from a data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Any:
        return self.dataset.__getitems__(indices)

    def __len__(self) -> int:
        return len(self.dataset)


def evaluation_loader(
    dataset: Any, batch_size: int, num_workers: int = 0, *, num_replicas: int = 1, rank: int = 0
) -> DataLoader:
    """Build a loader that yields every sample exactly once over all processes, in order.

    Args:
        dataset: fetched through `__getitems__`.
        batch_size: largest batch.
        num_workers: worker processes.
        num_replicas: number of processes.
        rank: of this process.
    """
    return DataLoader(
        _Whole(dataset),
        batch_size=None,
        collate_fn=_as_fetched,
        sampler=_EvenBatches(dataset, batch_size, num_replicas, rank),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
