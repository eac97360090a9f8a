"""Max-pooling with switches and its two inverses, against loops over windows and pixels."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from baton.layers import SwitchedMaxPool2d, SwitchedUnpool2d, Switches

MODES = ["known", "fixed"]
#: (height, width), kernel, stride, padding, ceil_mode
APART = [
    ((8, 8), 2, None, 0, False),
    ((7, 9), 2, None, 0, False),  # the last row and column are left out
    ((7, 9), 2, None, 0, True),  # … or seen by windows that hang over the edge
    ((2, 2), 2, None, 0, False),
    ((1, 1), 2, None, 0, True),
    ((8, 11), 3, None, 0, True),
    ((9, 10), 2, 3, 0, False),  # pixels between windows
    ((10, 10), 2, 3, 1, True),
    ((7, 8), (2, 3), None, 0, True),
    ((8, 9), (3, 2), (3, 4), (1, 0), False),
    ((7, 6), 2, None, 1, False),
    ((9, 9), 3, None, 1, True),
    ((5, 6), 1, None, 0, False),
    ((5, 6), (1, 2), (2, 2), 0, True),
]
OVERLAPPING = [
    ((13, 13), 3, 2, 0, False),  # AlexNet
    ((12, 15), 3, 2, 0, True),
    ((8, 8), 3, 2, 1, False),  # ResNet
    ((7, 8), 3, 2, 1, True),
    ((6, 5), 3, 1, 1, False),
    ((5, 5), 4, 1, 2, False),  # fixed places of the last two windows meet at the edge
    ((6, 7), (4, 3), (1, 2), (2, 1), True),
    ((7, 9), (2, 3), (2, 1), (0, 1), False),  # overlap in one axis only
    ((6, 6), 5, 2, 2, True),
    ((9, 8), 5, 3, 0, True),
]


def made(size, *, batch=2, channels=3, dtype=torch.float64, seed=0):
    """A map with negative values and with equal ones."""
    torch.manual_seed(seed)
    x = torch.randn(batch, channels, *size, dtype=dtype)
    x[:, 1:] = x[:, 1:].round()
    return x - 1


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def windows(size, kernel, stride, padding, ceil_mode):
    """For each window (its place in the pooled map, its corner, its pixels inside the map), in reading order."""
    kernel, padding = pair(kernel), pair(padding)
    stride = kernel if stride is None else pair(stride)
    corners = []
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        # a window of the ceil mode must begin in the map or in the padding before it
        last = n - 1 if ceil_mode else n + p - k
        corners.append([c for c in range(-p, last + 1, s) if c - s + k < n + p])
    for i, top in enumerate(corners[0]):
        for j, left in enumerate(corners[1]):
            rows = [r for r in range(top, top + kernel[0]) if 0 <= r < size[0]]
            columns = [c for c in range(left, left + kernel[1]) if 0 <= c < size[1]]
            yield (i, j), (top, left), [(r, c) for r in rows for c in columns]


def naive_places(x, mode, window):
    """For each value of the pooled map: its index and the pixel it goes to."""
    _, _, height, width = x.shape
    kernel = pair(window[0])
    found = []
    for b in range(len(x)):
        for c in range(x.shape[1]):
            for (i, j), (top, left), pixels in windows((height, width), *window):
                if mode == "known":
                    pixel = max(pixels, key=lambda p: x[b, c, *p].item())  # the first, if several
                else:
                    pixel = (min(top + kernel[0] // 2, height - 1), min(left + kernel[1] // 2, width - 1))
                found.append(((b, c, i, j), (b, c, *pixel)))
    return found


def naive_unpool(pooled, x, mode, window):
    sums = [[] for _ in range(x.numel())]
    strides = torch.empty(x.shape).stride()
    for source, pixel in naive_places(x, mode, window):
        sums[sum(s * p for s, p in zip(strides, pixel, strict=True))].append(pooled[source])
    return torch.stack([sum(v) / len(v) if v else pooled.new_zeros(()) for v in sums]).view(x.shape)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), APART + OVERLAPPING)
def test_pooling_is_that_of_torch_and_its_switches_are_where_the_maxima_are(size, kernel, stride, padding, ceil):
    x = made(size).requires_grad_()
    same = x.detach().clone().requires_grad_()
    pooled, switches = SwitchedMaxPool2d(kernel, stride, padding, ceil)(x)
    expected = F.max_pool2d(same, kernel, stride, padding, ceil_mode=ceil)
    assert torch.equal(pooled, expected)
    weights = torch.randn_like(pooled)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(x.grad, same.grad)

    assert isinstance(switches, tuple)
    assert switches.indices.dtype == torch.int64
    assert (switches.height, switches.width) == size
    assert (switches.kernel, switches.padding) == (pair(kernel), pair(padding))
    assert switches.stride == (pair(kernel) if stride is None else pair(stride))
    found = naive_places(x, "known", (kernel, stride, padding, ceil))
    assert len(found) == pooled.numel()  # the naive windows are all windows
    for source, (_, _, row, column) in found:
        assert switches.indices[source] == row * size[1] + column


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), APART + OVERLAPPING)
def test_unpooling_equals_loops_and_so_does_its_gradient(size, kernel, stride, padding, ceil, mode):
    x = made(size)
    pooled, switches = SwitchedMaxPool2d(kernel, stride, padding, ceil)(x)
    values = torch.randn_like(pooled).requires_grad_()
    back = SwitchedUnpool2d(mode)(values, switches)
    expected = naive_unpool(values, x, mode, (kernel, stride, padding, ceil))
    assert back.shape == x.shape
    assert torch.allclose(back, expected, rtol=0, atol=1e-12)
    assert torch.equal(back == 0, expected == 0)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((back * weights).sum(), values)
    (of_loops,) = torch.autograd.grad((expected * weights).sum(), values)
    assert torch.allclose(gradient, of_loops, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "window", [((5, 5), 2, None, 0, True), ((7, 7), 3, 2, 0, False), ((5, 5), 4, 1, 2, False)], ids=str
)
def test_gradients_agree_with_differences(mode, window):
    size, *rest = window
    pooled, switches = SwitchedMaxPool2d(*rest)(made(size, channels=2))
    values = torch.randn_like(pooled).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: SwitchedUnpool2d(mode)(v, switches), values)
    assert torch.autograd.gradgradcheck(lambda v: SwitchedUnpool2d(mode)(v, switches).pow(2), values)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_goes_through_the_switches(mode):
    x = made((6, 6)).requires_grad_()
    pooled, switches = SwitchedMaxPool2d(2)(x)
    assert not switches.indices.requires_grad
    values = torch.randn_like(pooled).requires_grad_()
    SwitchedUnpool2d(mode)(values, switches).square().sum().backward()
    assert x.grad is None
    assert values.grad is not None


def test_fixed_is_the_lower_right_pixel_of_two_by_two_and_the_middle_of_three_by_three():
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    _, switches = SwitchedMaxPool2d(2)(torch.zeros(1, 1, 4, 4))
    expected = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]])
    assert torch.equal(SwitchedUnpool2d("fixed")(values, switches)[0, 0], expected)
    _, switches = SwitchedMaxPool2d(3, 2)(torch.zeros(1, 1, 5, 5))
    expected = torch.zeros(5, 5)
    expected[1::2, 1::2] = values[0, 0]
    assert torch.equal(SwitchedUnpool2d("fixed")(values, switches)[0, 0], expected)


def test_of_equal_values_the_first_is_the_maximum():
    _, switches = SwitchedMaxPool2d(2)(torch.ones(1, 1, 4, 4))
    assert switches.indices.flatten().tolist() == [0, 2, 8, 10]


def test_padding_is_never_a_maximum():
    x = torch.full((1, 1, 4, 4), -5.0)
    pooled, switches = SwitchedMaxPool2d(3, 2, 1)(x)
    assert (pooled == -5).all()
    back = SwitchedUnpool2d("known")(pooled, switches)
    assert set(back.flatten().tolist()) == {-5.0, 0.0}


def test_values_that_meet_are_averaged():
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 2] = 1  # the maximum of both windows
    pooled, switches = SwitchedMaxPool2d(3, 2)(x)
    back = SwitchedUnpool2d("known")(torch.tensor([[[[2.0, 6.0]]]]), switches)
    assert torch.equal(back, x * 4)
    assert torch.equal(SwitchedUnpool2d("known")(pooled, switches), x)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), APART)
def test_pooling_what_was_unpooled_gives_it_back(size, kernel, stride, padding, ceil):
    """Of values that are not negative, and windows that do not overlap."""
    pool = SwitchedMaxPool2d(kernel, stride, padding, ceil)
    pooled, switches = pool(made(size).relu())
    for mode in MODES:
        values = torch.rand_like(pooled)
        assert torch.equal(pool(SwitchedUnpool2d(mode)(values, switches))[0], values)
    x = made(size).abs()
    back = SwitchedUnpool2d("known")(*pool(x))  # every pooled value is back where it was
    assert torch.equal(back[back != 0], x[back != 0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [(2, None, 0, True), (3, 2, 1, False)])
@pytest.mark.parametrize("size", [(7, 9), (2, 2)])
def test_channels_last_stays(mode, window, size):
    x = made(size, channels=4, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    pool, unpool = SwitchedMaxPool2d(*window), SwitchedUnpool2d(mode)
    (pooled, switches), (pooled_last, switches_last) = pool(x), pool(last)
    back, back_last = unpool(pooled, switches), unpool(pooled_last, switches_last)
    assert back_last.stride() == last.stride()
    assert back.is_contiguous()
    assert torch.equal(back, back_last)
    assert torch.equal(unpool(pooled_last, switches), back)  # formats may be mixed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [(2, None), (3, 1)])
def test_keeps_the_type_and_sums_half_precision_in_float32(mode, dtype, window):
    pooled, switches = SwitchedMaxPool2d(*window)(made((9, 9)).to(dtype))
    values = torch.randn(pooled.shape, dtype=torch.float64).to(dtype).requires_grad_()
    back = SwitchedUnpool2d(mode)(values, switches)
    exact = SwitchedUnpool2d(mode)(values.detach().double(), switches)
    assert back.dtype == pooled.dtype == dtype
    # the error of one rounding to the type, and that of a few in float32
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((back.double() - exact).abs() <= allowed).all()
    back.sum().backward()
    assert values.grad.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_between_convolutions(mode):
    convolution = nn.Conv2d(3, 3, 3, padding=1)
    x = made((9, 9), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, switches = SwitchedMaxPool2d(3, 2)(convolution(x))
        back = SwitchedUnpool2d(mode)(convolution(pooled), switches)
    assert back.dtype == torch.bfloat16
    back.float().sum().backward()
    assert convolution.weight.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [(2, None), (3, 2)])
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_one_and_of_none(mode, window, batch):
    x = made((7, 7))
    _, of_all = SwitchedMaxPool2d(*window)(x)
    pooled, switches = SwitchedMaxPool2d(*window)(x[:batch])
    whole = SwitchedUnpool2d(mode)(SwitchedMaxPool2d(*window)(x)[0], of_all)
    assert torch.equal(SwitchedUnpool2d(mode)(pooled, switches), whole[:batch])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [(2, None), (3, 2)])
def test_switches_of_one_image_or_channel_serve_all(mode, window):
    _, switches = SwitchedMaxPool2d(*window)(made((7, 7), batch=1, channels=2)[:, :1])
    repeated = Switches(switches.indices.expand(4, 5, -1, -1).contiguous(), *switches[1:])
    values = torch.randn(repeated.indices.shape)
    assert torch.equal(SwitchedUnpool2d(mode)(values, switches), SwitchedUnpool2d(mode)(values, repeated))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [(2, None), (3, 2)])
def test_nothing_needs_an_indeterministic_algorithm(mode, window):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        values = made((7, 7)).requires_grad_()
        pooled, switches = SwitchedMaxPool2d(*window)(values)
        SwitchedUnpool2d(mode)(pooled, switches).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [(2, None, 0, True), (3, 2, 1, False)])
def test_shapes_are_known_without_data(mode, window):
    """What reads a value of the data, and so waits for a device, cannot run on the meta device."""
    x = torch.empty(2, 3, 7, 9, device="meta", requires_grad=True)
    pooled, switches = SwitchedMaxPool2d(*window)(x)
    back = SwitchedUnpool2d(mode)(pooled, switches)
    assert back.shape == x.shape
    back.sum().backward()


def test_backward_keeps_no_more_than_indices_and_a_number_a_value():
    pooled, switches = SwitchedMaxPool2d(3, 2)(made((15, 15)))
    values = pooled.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        SwitchedUnpool2d("known")(values, switches)
    assert {tensor.numel() for tensor in kept} == {pooled.numel()}
    assert {t.data_ptr() for t in kept if t.dtype == torch.int64} == {switches.indices.data_ptr()}


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), (2, 1), ceil_mode=True),
        nn.MaxPool2d(3, stride=2, return_indices=True),
        timm.create_model("resnet18", pretrained=False).maxpool,
    ],
    ids=str,
)
def test_like_a_module_bit_for_bit(pool):
    x = made((12, 11)).requires_grad_()
    same = x.detach().clone().requires_grad_()
    expected = pool(same)
    expected = expected[0] if isinstance(expected, tuple) else expected
    pooled, _ = SwitchedMaxPool2d.like(pool)(x)
    assert torch.equal(pooled, expected)
    pooled.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, same.grad)


def test_like_refuses_what_it_could_not_be_like():
    with pytest.raises(
        ValueError, match=r"Expected a max-pooling of dilation 1, but got dilation=2: .* use an encoder"
    ):
        SwitchedMaxPool2d.like(nn.MaxPool2d(3, dilation=2))
    with pytest.raises(ValueError, match=r"but MaxPool2dSame computes its own forward: replace it"):
        SwitchedMaxPool2d.like(MaxPool2dSame(3, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (3, 4, 3, 3), (2, 4, 4, 3), (2, 4, 1, 3), (2, 1, 3, 3), (1, 4, 3, 3)])
def test_a_map_that_the_switches_are_not_of_is_refused(mode, shape):
    _, switches = SwitchedMaxPool2d(2)(torch.zeros(2, 4, 6, 6))
    got = "×".join(map(str, shape))
    with pytest.raises(ValueError, match=f"Expected a map of 2×4×3×3, .* but got {got}: unpool a map as large"):
        SwitchedUnpool2d(mode)(torch.zeros(shape), switches)


def test_switches_of_one_pixel_do_not_serve_a_map():
    _, switches = SwitchedMaxPool2d(2)(torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match="Expected a map of 2×4×1×1"):
        SwitchedUnpool2d()(torch.zeros(2, 4, 3, 3), switches)


def test_unknown_mode():
    with pytest.raises(ValueError, match="Expected mode 'known' or 'fixed', but got 'nearest'"):
        SwitchedUnpool2d("nearest")


def test_prints_what_it_is():
    windows = "kernel=(3, 3), stride=(2, 2), padding=(0, 0), ceil_mode=False"
    assert repr(SwitchedMaxPool2d(3, 2)) == f"SwitchedMaxPool2d({windows})"
    assert repr(SwitchedUnpool2d("fixed")) == "SwitchedUnpool2d(mode='fixed')"


COMPILE = """
import torch
from baton.layers import SwitchedMaxPool2d, SwitchedUnpool2d

torch.manual_seed(0)
OVERLAPPING, APART = (3, 2), (2, None, 0, True)
# tracing is quick and tried with everything; generating code is slow
TRIED = [("aot_eager", mode, window) for mode in ("known", "fixed") for window in (APART, OVERLAPPING)]
for backend, mode, window in [*TRIED, ("inductor", "known", OVERLAPPING), ("inductor", "fixed", APART)]:
    torch.compiler.reset()
    pool, unpool = SwitchedMaxPool2d(*window), SwitchedUnpool2d(mode)

    def there_and_back(x):
        pooled, switches = pool(x)
        return unpool(pooled * 2, switches), switches

    compiled = torch.compile(there_and_back, fullgraph=True, backend=backend)
    for size in ((9, 9), (7, 11))[: 1 if backend == "inductor" else 2]:
        x = torch.randn(2, 3, *size, requires_grad=True)
        same = x.detach().clone().requires_grad_()
        (back, switches), (expected, known) = compiled(x), there_and_back(same)
        assert torch.equal(switches.indices, known.indices) and switches[1:] == known[1:]
        assert torch.allclose(back, expected, rtol=0, atol=1e-6)
        back.square().sum().backward()
        expected.square().sum().backward()
        assert torch.allclose(x.grad, same.grad, rtol=0, atol=1e-5)
        print(backend, mode, window, size)
"""


@pytest.mark.slow
def test_compiles_as_one_graph():
    """In a process of its own: the compiler cannot look into the checks of shapes that tests put around functions."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * 2 + 2
