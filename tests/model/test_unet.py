"""The UNet is the original's, and its widths are read off its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_deploy.model import UNet, UNetWidths, load_network
from ddpm_deploy.model.unet import _Attention
from tests import golden
from tests.support import TINY_WIDTHS, tiny_network


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_network_gives_what_the_original_code_gave(case: int, original: UNet) -> None:
    recorded = np.load(golden.DOME272 / "io.npz")
    x, t = (torch.from_numpy(recorded[f"{name}{case}"]) for name in ("x", "t"))
    with torch.inference_mode():
        out = original(x, t).numpy()
    wanted = recorded[f"out{case}"]
    # The original differs from itself by 2e-6 with another batch or without oneDNN; the smallest
    # structural mistake, GELU by tanh, by 7e-5.
    assert np.abs(out - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def original() -> UNet:
    network = UNet()
    state = {key: torch.from_numpy(value) for key, value in golden.weights().items()}
    network.load_state_dict(state, strict=True)
    return network.eval()


def test_the_original_has_23_332_739_parameters_and_256_more_a_class() -> None:
    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(UNet()) == 23_332_739
    assert count(UNet(classes=10)) == 23_335_299


def test_attention_is_torch_s_multi_head_attention() -> None:
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(peer.in_proj_bias)
    nn.init.normal_(peer.out_proj.bias)
    ours = _Attention(16, 4).eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    tokens = torch.randn(3, 25, 16)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), peer(tokens, tokens, tokens)[0])


def test_attention_never_holds_the_matrix_of_all_pairs_of_pixels() -> None:
    network = tiny_network()
    x, t = torch.zeros(1, 1, 64, 64), torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        network(x, t)
    largest = max(event.cpu_memory_usage for event in profile.events())
    matrix = 4 * (64 * 64) ** 2 * 4  # heads · tokens² · bytes of float32
    assert 0 < largest < matrix / 10


def test_no_label_adds_nothing() -> None:
    network = tiny_network(classes=3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    with torch.inference_mode():
        torch.testing.assert_close(
            network(x, t, torch.tensor([3, 3])), network(x, t), rtol=0, atol=0
        )
        assert not torch.allclose(network(x, t, torch.tensor([0, 1])), network(x, t))


def test_a_label_changes_its_own_image_alone() -> None:
    network = tiny_network(classes=3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    with torch.inference_mode():
        one, other = (network(x, t, torch.tensor([y, 1])) for y in (0, 2))
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (40, 8)])
def test_any_size_that_8_divides_works(size: tuple[int, int]) -> None:
    x = torch.zeros(2, 1, *size)
    with torch.inference_mode():
        assert tiny_network()(x, torch.tensor([0, 1])).shape == x.shape


def test_a_base_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width is 6; it must be a positive multiple of 4"):
        UNetWidths.scaled(6)


_width = st.sampled_from([4, 8, 12, 16])


@settings(max_examples=25, deadline=None)
@given(
    widths=st.builds(
        UNetWidths,
        inc=_width,
        down=st.tuples(_width, _width, _width),
        bottom=st.lists(_width, min_size=2, max_size=3).map(tuple),
        up=st.tuples(_width, _width, _width),
        up_middle=st.tuples(_width, _width, _width),
        time=st.sampled_from([8, 32]),
    ),
    channels=st.integers(1, 4),
    classes=st.sampled_from([0, 1, 7]),
)
def test_widths_channels_and_classes_are_read_off_the_weights(
    tmp_path_factory: pytest.TempPathFactory, widths: UNetWidths, channels: int, classes: int
) -> None:
    network = UNet(channels, classes=classes, widths=widths)
    path = tmp_path_factory.mktemp("random") / "ckpt.pt"
    torch.save(network.state_dict(), path)
    loaded = load_network(path, image_size=8)
    assert isinstance(loaded.network, UNet)
    assert loaded.network.widths == widths
    assert loaded.spec.sample_shape == (channels, 8, 8)
    assert (loaded.spec.label is None) == (classes == 0)
    if loaded.spec.label is not None:
        assert (loaded.spec.label.classes, loaded.spec.label.null) == (classes, classes)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_wrapping_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    network = UNet(widths=TINY_WIDTHS)
    path = tmp_path / "ckpt.pt"
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, path)
    assert load_network(path).spec.family == "dome272"


def test_the_family_s_own_conventions_are_in_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(UNet(widths=TINY_WIDTHS).state_dict(), path)
    spec = load_network(path).spec
    assert spec.sample_shape == (3, 64, 64)
    assert (spec.schedule.T, spec.schedule.beta[0], spec.schedule.beta[-1]) == (1000, 1e-4, 0.02)
    assert (spec.sampler, spec.variance, spec.clip) == ("dome272", "fixed_large", None)
    assert (spec.rounding, spec.first_timestep) == ("truncate", 1)
