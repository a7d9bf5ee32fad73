"""What the U-Net and the DiT have in common: the signature, shapes, conditioning, dtypes, errors."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels.diffusion import EDMPrecond
from fastdiff_kernels.nn import DiT, UNet, axial_rope

UNET = {"channels": 8, "num_groups": 4, "num_classes": 3}
DIT = {"dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
SIZES = {
    "unet": (UNet, UNET),
    "unet_attention": (UNet, {**UNET, "multipliers": (1, 1, 2), "blocks": 2, "attention_levels": (0, 2), "qk_norm": "rms"}),
    "dit": (DiT, DIT),
    "dit_rope": (DiT, {**DIT, "patch_size": 1, "positions": "none", "rope": True, "qk_norm": "rms"}),
    "dit_learned": (DiT, {**DIT, "patch_size": 4, "positions": "learned", "image_size": (8, 12)}),
}
NETWORKS = {name: lambda network=network, sizes=sizes, **o: network(2, **{**sizes, **o}) for name, (network, sizes) in SIZES.items()}
every_network = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in NETWORKS.items()])


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch=3, height=8, width=12, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(batch) % 4
    return torch.randn(batch, 2, height, width, generator=rng).to(dtype), torch.linspace(-1.5, 1, batch), labels


@every_network
def test_output_starts_at_zero(make):
    assert not make()(*inputs()).any()


@every_network
@pytest.mark.parametrize("out_channels", [None, 4])
def test_output_shape(make, out_channels):
    assert make(out_channels=out_channels)(*inputs()).shape == (3, out_channels or 2, 8, 12)


@pytest.mark.parametrize("make", [NETWORKS["unet"], NETWORKS["unet_attention"], NETWORKS["dit"], NETWORKS["dit_rope"]])
@pytest.mark.parametrize("size", [(4, 4), (8, 4), (16, 20)])
def test_any_divisible_size(make, size):
    assert randomised(make())(*inputs(2, *size)).shape == (2, 2, *size)


@every_network
def test_gradients_reach_every_parameter_and_the_input(make):
    network = randomised(make())
    x, level, labels = inputs()
    network(x.requires_grad_(), level, labels).square().sum().backward()
    assert x.grad.abs().max() > 0
    dead = [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not dead


@every_network
def test_input_gradient_matches_finite_differences(make):
    network = randomised(make()).double()
    x, level, labels = inputs(2, dtype=torch.float64)
    direction, cotangent = torch.randn_like(x), torch.randn(2, 2, 8, 12, dtype=torch.float64)
    (found,) = torch.autograd.grad((network(x.requires_grad_(), level, labels) * cotangent).sum(), x)
    with torch.no_grad():
        change = (network(x + 1e-5 * direction, level, labels) - network(x - 1e-5 * direction, level, labels)) / 2e-5
    torch.testing.assert_close((found * direction).sum(), (change * cotangent).sum(), rtol=1e-5, atol=1e-6)


@every_network
def test_noise_level_and_labels_matter(make):
    network = randomised(make())
    x, level, labels = inputs()
    base = network(x, level, labels)
    assert (network(x, level + 0.3, labels) - base).abs().max() > 1e-3
    assert (network(x, level, (labels + 1) % 4) - base).abs().max() > 1e-3
    assert torch.equal(network(x, level), network(x, level, torch.full((3,), 3)))


@every_network
def test_a_sample_does_not_depend_on_its_batch(make):
    network = randomised(make()).double()
    x, level, labels = inputs(4, dtype=torch.float64)
    torch.testing.assert_close(network(x[1:2], level[1:2], labels[1:2]), network(x, level, labels)[1:2])


@every_network
def test_empty_batch(make):
    assert make()(*inputs(0)).shape == (0, 2, 8, 12)


@every_network
def test_runs_under_autocast_with_a_full_precision_head(make):
    network = randomised(make())
    expected = network(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = network(*inputs())
        found.square().mean().backward()
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    rounded = found.to(torch.bfloat16).float()
    assert not torch.equal(found, rounded)


@every_network
def test_runs_in_bfloat16(make):
    network = randomised(make())
    expected = network(*inputs())
    found = network.to(torch.bfloat16)(*inputs(dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.2 * expected.norm()


@every_network
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_parameters_run_under_any_autocast(make, autocast):
    network = randomised(make())
    expected = network(*inputs())
    with torch.autocast("cpu", autocast):
        found = network.to(torch.bfloat16)(*inputs())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.2 * expected.norm()


@every_network
def test_an_input_of_another_dtype_than_the_parameters_is_named(make):
    with pytest.raises(TypeError, match=r"x must be torch\.float32, the dtype of the parameters, got torch\.bfloat16"):
        make()(*inputs(dtype=torch.bfloat16))


@every_network
def test_works_as_a_denoiser(make):
    x, level, labels = inputs()
    denoiser = EDMPrecond(randomised(make()), 0.5)
    assert denoiser(x, (4 * level).exp(), class_labels=labels).shape == x.shape


def test_channels_last_computes_the_same():
    network = randomised(NETWORKS["unet_attention"]())
    x, level, labels = inputs()
    expected = network(x, level, labels)
    found = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), level, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dit_is_its_blocks_one_after_another():
    """In one pass from a block to the next, but no other sum."""
    network = randomised(NETWORKS["dit_rope"]()).double()
    x, level, labels = inputs(dtype=torch.float64)
    condition, rope = network.embedding(level, labels), axial_rope(8, 12, 8)
    h = network.patch_in(network._patches(x, 8, 12))
    for block in network.blocks:
        h = block(h, condition, rope)
    shift, scale = network.modulation(torch.nn.functional.silu(condition))[:, None].chunk(2, dim=2)
    h = torch.nn.functional.layer_norm(h, (16,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(network(x, level, labels), network._image(network.patch_out(h), 8, 12))


def test_default_unet_is_small():
    size = sum(parameter.numel() for parameter in UNet(1, num_classes=10).parameters())
    assert 400_000 < size < 700_000


def test_dropout_acts_in_training_alone():
    network = randomised(NETWORKS["unet"](dropout=0.5))
    assert not torch.equal(network(*inputs()), network(*inputs()))
    network.eval()
    assert torch.equal(network(*inputs()), network(*inputs()))


@every_network
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, n, y: (x[:, :1], n, y), ValueError, r"x must have shape \[B, 2, H, W\], got \(3, 1, 8, 12\)"),
        (lambda x, n, y: (x[0], n, y), ValueError, r"x must have shape \[B, 2, H, W\]"),
        (lambda x, n, y: (x, n[:2], y), ValueError, r"noise_level must have shape \[3\], got \(2,\)"),
        (lambda x, n, y: (x, n.long(), y), TypeError, "noise_level must be floating point, got torch.int64"),
        (lambda x, n, y: (x, n, y[:2]), ValueError, r"class_labels must have shape \[3\]"),
        (lambda x, n, y: (x, n, y + 5), ValueError, r"class_labels must lie in \[0, 3\]"),
    ],
)
def test_bad_input(make, change, error, message):
    with pytest.raises(error, match=message):
        make()(*change(*inputs()))


@pytest.mark.parametrize(("name", "multiple"), [("unet", 2), ("unet_attention", 4), ("dit", 2)])
def test_sizes_that_do_not_divide(name, multiple):
    with pytest.raises(ValueError, match=f"x must have a height and width divisible by {multiple}, got 9x12"):
        NETWORKS[name]()(*inputs(height=9))


def test_learned_positions_fit_one_size():
    with pytest.raises(ValueError, match="2x3 patches that positions were learned for, got 2x2"):
        NETWORKS["dit_learned"]()(*inputs(width=8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UNet(0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: UNet(1.0), TypeError, "in_channels must be an int"),
        (lambda: UNet(1, channels=30), ValueError, "channels must be divisible by num_groups, got channels=30 and num_groups=8"),
        (lambda: UNet(1, multipliers=()), ValueError, "multipliers must name at least one level"),
        (lambda: UNet(1, multipliers=(1, 0)), ValueError, "multipliers must be at least 1, got 0"),
        (lambda: UNet(1, attention_levels=(2,)), ValueError, r"attention_levels must lie in \[0, 1\], got \(2,\)"),
        (lambda: UNet(1, num_heads=5), ValueError, "channels must be divisible by num_heads"),
        (lambda: UNet(1, blocks=0), ValueError, "blocks must be at least 1, got 0"),
        (lambda: UNet(1, num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        (lambda: UNet(1, condition_dim=7), ValueError, "condition_dim must be divisible by 2, got condition_dim=7"),
        (lambda: UNet(1, condition_dim=0), ValueError, "condition_dim must be at least 2, got 0"),
        (lambda: UNet(1, out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (lambda: UNet(1, dropout=1.5), ValueError, "dropout"),
        (lambda: DiT(1, mlp_ratio="a"), TypeError, "mlp_ratio must be a number, got str"),
        (lambda: DiT(1, mlp_ratio=-1.0), ValueError, "mlp_ratio must be positive and finite, got -1.0"),
        (lambda: DiT(1, out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (lambda: DiT(1, dim=10, num_heads=4), ValueError, "dim must be divisible by num_heads"),
        (lambda: DiT(1, dim=6, num_heads=2), ValueError, "dim must be divisible by 4"),
        (lambda: DiT(1, dim=24, num_heads=4, rope=True), ValueError, "dim / num_heads must be divisible by 4"),
        (lambda: DiT(1, positions="fourier"), ValueError, "positions must be"),
        (lambda: DiT(1, positions="learned"), ValueError, "image_size must be given exactly when"),
        (lambda: DiT(1, image_size=8), ValueError, "image_size must be given exactly when"),
        (lambda: DiT(1, positions="learned", image_size=7), ValueError, "image_size must be divisible by patch_size"),
        (lambda: DiT(1, depth=0), ValueError, "depth must be at least 1, got 0"),
    ],
)
def test_bad_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ["dit", "dit_rope", "dit_learned"])
def test_patches_are_row_major_squares_and_reassemble(name):
    network, (x, _, _) = NETWORKS[name](), inputs()
    side = network.patch_size
    patches = network._patches(x, 8 // side, 12 // side)
    torch.testing.assert_close(patches, torch.nn.functional.unfold(x, side, stride=side).transpose(1, 2))
    assert torch.equal(network._image(patches, 8 // side, 12 // side), x)
