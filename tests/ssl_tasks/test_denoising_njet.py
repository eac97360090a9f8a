"""Denoising with N-Jet networks, whose maps change their side while scales are learned."""

import math

import pytest
import torch

from baton.layers.njet import njet_layers
from baton.ssl_tasks import Denoising
from baton.supervised import Classification, Segmentation
from tiny import Arrays, MaskArrays, fit, same, state, trainer


@pytest.mark.parametrize("decoder", ["resize", "transposed"])
def test_scales_may_change_the_side_of_the_map_from_step_to_step(decoder):
    """Before training, after scales that shrink the map to its least side, and after scales that leave it whole."""
    torch.manual_seed(0)
    task = Denoising(backbone="njet_nin", backbone_kwargs={"width": 0.1}, decoder=decoder, loss="mse").double()
    clean = 0.25 + 0.5 * torch.rand(3, 3, 33, 35).double()
    optimizer, sides = torch.optim.SGD(task.parameters(), 0.01), []
    for sigma in (1.0, 9.0, 0.01):
        with torch.no_grad():
            for _, layer in njet_layers(task.backbone):
                layer.log2_sigma.fill_(math.log2(sigma))
        features = task.feature_map(clean)
        sides.append(tuple(features.shape[2:]))
        assert task.reconstruct(clean).shape == clean.shape
        optimizer.zero_grad()
        loss = task.losses((clean, torch.zeros(3, dtype=torch.long)))["loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
        optimizer.step()
    assert sides == [(20, 20), (4, 4), (33, 35)]


def test_a_backbone_whose_scales_were_learned_is_handed_on(tmp_path):
    options = {"backbone": "njet_nin", "backbone_kwargs": {"width": 0.1}}
    task = Denoising(**options)
    with torch.no_grad():
        for _, layer in njet_layers(task.backbone):
            layer.log2_sigma.fill_(math.log2(3.0))
    runner = trainer(1)
    runner.fit(task, datamodule=Arrays(16, val=8, size=(33, 35)), weights_only=True)
    runner.save_checkpoint(path := tmp_path / "last.ckpt")
    for made in (Classification, Segmentation, Denoising):
        following = made(init_from=str(path))
        assert same(state(task.backbone), state(following.backbone))
        data = MaskArrays(8, val=8, size=(33, 35)) if made is Segmentation else Arrays(8, val=8, size=(33, 35))
        fit(following, data, 1)
        assert all(
            not torch.equal(a, b)
            for (_, a), (_, b) in zip(
                following.backbone.named_parameters(),
                task.backbone.named_parameters(),
                strict=False,  # either has the classifier that it needs
            )
        )
