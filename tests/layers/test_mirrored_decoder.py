"""Mirrored decoders: which layers an encoder's row gives, against decoders written out by hand, in float64."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.layers import NJetConv2d, SafeSubsample, fold
from baton.layers.gaussian_jet import orders
from baton.layers.mirrored_decoder import MirroredDecoder, PlainRow
from baton.layers.subsampling import SubsampledNJet

PLAIN = {
    "vgg16": (5, 32, {"mlp_ratio": 0.01}),  # of the classifier
    "vgg16_bn": (5, 32, {"mlp_ratio": 0.01}),
    "vgg16_small": (5, 32, {"width": 0.1}),
    "vgg19_small": (5, 32, {"width": 0.1}),
    "nin": (3, 32, {"width": 0.1}),
    "allcnn": (3, 32, {"width": 0.1}),
    "alexnet_bn": (3, 67, {"width": 0.1}),
    "njet_nin": (4, 32, {"width": 0.1}),
    "njet_allcnn": (8, 32, {"width": 0.1}),
    "converted": (5, 32, {"base": "vgg16_small", "base_kwargs": {"width": 0.1}}),
}


class Row(nn.Module):
    """Any layers as an encoder."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward_features(self, x):
        return self.layers(x)


def images(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(decoder):
    """Give the biases values, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return decoder


def encoder():
    torch.manual_seed(0)
    return Row(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2, 2),
    ).double().eval()  # fmt: skip


def naive_unpool(x, taken, mode, kernel=2):
    """Write every value where the maximum of its window was, or at its lower right pixel, in loops."""
    out = torch.zeros_like(taken[:, : x.shape[1]])
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            for y in range(x.shape[2]):
                for z in range(x.shape[3]):
                    window = taken[b, c, kernel * y : kernel * (y + 1), kernel * z : kernel * (z + 1)]
                    place = int(window.argmax()) if mode == "known" else kernel * kernel - 1
                    out[b, c, kernel * y + place // kernel, kernel * z + place % kernel] = x[b, c, y, z]
    return out


@pytest.mark.parametrize("mode", ["known", "fixed"])
def test_top_down_and_layerwise_equal_decoders_written_out(mode):
    network = encoder()
    row = PlainRow(network, 16)
    decoder = drawn(MirroredDecoder(row, mode))
    x = images(2, 3, 13, 11)
    layers = network.layers
    before1 = layers[:5](x)
    pool1 = layers[5](before1)
    before2 = layers[6:9](pool1)
    pool2 = layers[9](before2)
    taps = row(x)
    assert [len(segment) for segment in row.segments] == [6, 4]
    assert torch.equal(taps[0].map, pool1)
    assert torch.equal(taps[1].map, pool2)
    weights = dict(decoder.named_parameters())
    assert list(weights) == [
        "stages.0.steps.1.weight", "stages.0.steps.1.bias", "stages.0.steps.3.weight", "stages.0.steps.3.bias",
        "stages.1.steps.1.weight", "stages.1.steps.1.bias",
    ]  # fmt: skip
    w = list(weights.values())

    def stage2(map_):
        return F.relu(F.conv2d(naive_unpool(map_, before2, mode), w[4], w[5], padding=2))

    def stage1(map_):
        hidden = F.relu(F.conv2d(naive_unpool(map_, before1, mode), w[0], w[1], padding=1))
        return F.conv2d(hidden, w[2], w[3], padding=1)

    back = stage2(pool2)
    expected = {"top_down": [stage1(back), back], "layerwise": [stage1(pool1), stage2(pool2)]}
    for name, outputs in expected.items():
        found = getattr(decoder, name)(taps)
        torch.testing.assert_close(found, outputs)
        grads = torch.autograd.grad(sum(o.square().sum() for o in found), w, retain_graph=True)
        naive = torch.autograd.grad(sum(o.square().sum() for o in outputs), w, retain_graph=True)
        torch.testing.assert_close(grads, naive)


def test_strided_convolutions_become_transposed_ones():
    torch.manual_seed(0)
    network = Row(
        nn.Conv2d(3, 4, 5, stride=3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(),
    ).double().eval()  # fmt: skip
    row = PlainRow(network, 16)
    decoder = drawn(MirroredDecoder(row, "fixed"))
    assert [len(segment) for segment in row.segments] == [2, 4]
    x = images(2, 3, 17, 14)
    taps = row(x)
    middle = network.layers[:2](x)
    w = list(decoder.parameters())
    up = F.relu(F.conv_transpose2d(taps[1].map, w[2], w[3], stride=2, padding=1, output_padding=_rest(middle, 2),
                                   groups=2))  # fmt: skip
    back = F.relu(F.conv2d(up, w[4], w[5], padding=1))
    picture = F.conv_transpose2d(back, w[0], w[1], stride=3, padding=1, output_padding=((17 - 3) % 3, (14 - 3) % 3))
    torch.testing.assert_close(decoder.top_down(taps), [picture, back])


def _rest(x, stride):
    return tuple((side - 1) % stride for side in x.shape[2:])


def test_average_poolings_are_repeated():
    network = Row(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(2)).double().eval()
    row = PlainRow(network, 8)
    decoder = drawn(MirroredDecoder(row, "known"))
    taps = row(images(1, 3, 8, 6))
    w = list(decoder.parameters())
    spread = taps[0].map.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(decoder.top_down(taps)[0], F.conv2d(spread, w[0], w[1]))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mode", ["known", "fixed"])
def test_every_plain_network_has_one_and_is_not_touched(name, mode):
    poolings, side, kwargs = PLAIN[name]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **kwargs)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    row = PlainRow(network, side)
    assert network.training
    decoder = MirroredDecoder(row, mode)
    assert len(row.segments) == len(decoder.stages) == poolings
    network.eval()
    x = torch.randn(2, 3, side + 3, side + 1)
    taps = row(x)
    assert torch.equal(taps[-1].map, network.forward_features(x))
    for outputs in (decoder.top_down(taps), decoder.layerwise(taps)):
        assert [o.shape for o in outputs] == [x.shape, *(tap.map.shape for tap in taps[:-1])]
        assert (outputs[0] < 0).any()  # an image has no ReLU
        assert all((o >= 0).all() for o in outputs[1:])
    sum(o.sum() for o in decoder.top_down(taps)).backward()
    assert all(p.grad is not None for p in decoder.parameters())
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_vgg_has_the_published_decoder():
    with torch.no_grad():
        decoder = MirroredDecoder(PlainRow(timm.create_model("vgg16", num_classes=0, mlp_ratio=0.01), 32), "known")
    assert sum(p.numel() for p in decoder.parameters()) == 14_714_179
    widths = [m.out_channels for stage in reversed(decoder.stages) for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 3]


def test_depth_takes_the_lower_part():
    row = PlainRow(encoder(), 16)
    decoder = drawn(MirroredDecoder(row, "known", depth=1))
    x = images(1, 3, 12, 12)
    assert len(row(x, 1)) == 1
    torch.testing.assert_close(decoder.top_down(row(x, 1)), decoder.layerwise(row(x))[:1])
    for depth in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and 2, the encoder's poolings, but got {depth}"):
            MirroredDecoder(row, "known", depth=depth)


def test_what_is_no_row_is_refused():
    with pytest.raises(ValueError, match="ResNet has branches"):
        PlainRow(timm.create_model("resnet10t"), 32)
    with pytest.raises(ValueError, match="has a Sigmoid: use a plain network"):
        PlainRow(Row(nn.Conv2d(3, 3, 1), nn.Sigmoid()), 8)

    class Scaled(Row):
        def forward_features(self, x):
            return 2 * self.layers(x)

    with pytest.raises(ValueError, match="Scaled has branches or computes something between"):
        PlainRow(Scaled(nn.Conv2d(3, 3, 1)), 8)


# ------------------------------------------------------------------------------------------------------- N-Jet layers


def jets(rule="paper", r=2.0):
    """N-Jet layers that subsample, that do not, and that have a stride."""
    torch.manual_seed(0)
    options = {"order": 2, "sigma": 1.3}
    return Row(
        SubsampledNJet(NJetConv2d(3, 4, **options), SafeSubsample(r, rule)), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 1), nn.ReLU(), NJetConv2d(6, 4, bias=False, **options), nn.ReLU(),
        NJetConv2d(4, 8, stride=2, groups=2, **options), nn.ReLU(),
        nn.Conv2d(8, 5, 1), nn.ReLU(),
    ).double().eval()  # fmt: skip


def naive_nearest(x, size):
    """Copy the cell that a place lies in, counted in whole numbers."""
    rows, columns = (
        torch.tensor([place * side // wanted for place in range(wanted)])
        for side, wanted in zip(x.shape[2:], size, strict=True)
    )
    return x[:, :, rows][:, :, :, columns]


def naive_jet(x, layer):
    filters = layer.filters()
    return F.conv2d(x, filters, layer.bias, padding=filters.shape[-1] // 2, groups=layer.groups)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_njet_layers_are_mirrored_by_njet_layers_while_sides_change(rule):
    network = jets(rule)
    row = PlainRow(network, 16)
    decoder = MirroredDecoder(row, "known").double()
    assert [len(segment) for segment in row.segments] == [3, 6, 2]
    assert not row.has_switches
    up, strided, jet, conv, last = (
        decoder.stages[stage].steps[step] for stage, step in ((0, 0), (1, 0), (1, 2), (1, 4), (2, 0))
    )
    drawn(decoder)
    x, sides = images(2, 3, 17, 14), []
    for encoders, decoders in ((1.3, 1.3), (3.1, 0.7), (0.4, 2.2)):
        with torch.no_grad():
            network.layers[0].conv.log2_sigma.fill_(encoders).log2_()
            up.conv.log2_sigma.fill_(decoders).log2_()
        taps = row(x)
        small = taps[0].map.shape[2:]
        sides.append(tuple(small))
        assert torch.equal(taps[-1].map, network.forward_features(x))
        first = F.relu(F.conv2d(taps[2].map, last.weight, last.bias))
        second = F.relu(naive_jet(naive_nearest(first, small), strided.conv))
        second = F.relu(naive_jet(second, jet.conv))
        second = F.relu(F.conv2d(second, conv.weight, conv.bias))
        picture = naive_jet(naive_nearest(second, (17, 14)), up.conv)
        if rule == "code":
            picture = naive_nearest(naive_jet(second, up.conv), (17, 14))
        outputs = decoder.top_down(taps)
        torch.testing.assert_close(outputs, [picture, second, first])
        assert [o.shape for o in decoder.layerwise(taps)] == [o.shape for o in outputs]
    assert len(set(sides)) == 3


def test_a_mirrored_njet_layer_is_like_the_encoders_and_can_be_its_adjoint():
    torch.manual_seed(0)
    layer = NJetConv2d(4, 6, 3, 1.7, extent=2.5, groups=2, size_rule="code", learn_sigma=False, bias=False).double()
    with torch.no_grad():
        layer.log2_sigma += 0.5
    decoder = MirroredDecoder(PlainRow(Row(nn.Conv2d(3, 4, 1).double(), layer), 16), "fixed")
    back = decoder.stages[0].steps[0].conv
    assert (back.in_channels, back.out_channels, back.order, back.extent, back.groups) == (6, 4, 3, 2.5, 2)
    assert back.size_rule == "code"
    assert not back.log2_sigma.requires_grad
    torch.testing.assert_close(back.sigma, layer.sigma)
    assert back.weight.dtype == torch.float64
    signs = torch.tensor([(-1.0) ** (i + j) for i, j in orders(3)], dtype=torch.float64)
    with torch.no_grad():  # within each group, channels change places
        back.weight.copy_((layer.weight * signs).view(2, 3, 2, -1).transpose(1, 2).reshape(back.weight.shape))
    x, y = images(2, 4, 12, 9), images(2, 6, 12, 9) ** 2
    torch.testing.assert_close((layer(x) * y).sum(), (x * decoder.stages[0].steps[0](y, (12, 9))).sum())


@pytest.mark.parametrize(
    ("subsample", "segments", "switches"), [("safe", 4, False), ("pool", 3, True), ("none", 1, False)]
)
def test_switches_are_those_of_max_poolings(subsample, segments, switches):
    row = PlainRow(timm.create_model("njet_nin", width=0.1, subsample=subsample).eval(), 32)
    assert (len(row.segments), row.has_switches) == (segments, switches)
    taps = row(torch.randn(2, 3, 21, 34))
    one, other = MirroredDecoder(row, "known"), MirroredDecoder(row, "fixed")
    other.load_state_dict(one.state_dict())
    pictures = [decoder.top_down(taps)[0] for decoder in (one, other)]
    assert pictures[0].shape == (2, 3, 21, 34)
    assert torch.equal(*pictures) == (not switches)


def test_njet_layers_without_a_mirror_are_refused():
    with pytest.raises(ValueError, match="has a NJetConv2d without padding: use a plain network"):
        PlainRow(Row(NJetConv2d(3, 3, padding="valid")), 16)
    with pytest.raises(ValueError, match="has a SafeSubsample: use a plain network"):
        PlainRow(fold(jets()), 16)
    with pytest.raises(ValueError, match="NJetResNet has a ResizedShortcut: use a plain network"):
        PlainRow(timm.create_model("njet_resnet32"), 32)
