"""Networks, files and loops of OpenAI's own code, where it is installed."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_deploy import cosine, denoise
from ddpm_deploy.model import load_network
from ddpm_deploy.model.openai import RELEASES, Release
from ddpm_deploy.model.openai_unet import UNetShape
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.respacing import respaced
from ddpm_deploy.schedule import named_schedule
from tests.peers.openai import diffusion_of, peer, peer_run

pytest.importorskip("guided_diffusion", reason="clone openai/guided-diffusion into PYTHONPATH")
pytest.importorskip("improved_diffusion", reason="clone openai/improved-diffusion into PYTHONPATH")
pytestmark = pytest.mark.peers


def draw_network(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """Makes a random network of either project, and what its user types."""
    improved = rng.random() < 0.4
    levels = rng.choice([1, 2, 2, 3])
    mult: tuple[float, ...] = (1, *(rng.choice([1, 2, 3]) for _ in range(levels - 1)))
    settings: dict[str, Any] = {"num_heads": rng.choice([1, 2, 4])}
    if rng.random() < 0.3:
        settings["num_heads_upsample"] = rng.choice([1, 2])
    built = dict(settings)
    width = 32
    if improved:
        settings["project"] = "improved"
    else:
        built["image_size"] = 8
        built["conv_resample"] = rng.random() < 0.8
        built["resblock_updown"] = rng.random() < 0.4
        if rng.random() < 0.4:
            built["num_head_channels"] = settings["num_head_channels"] = rng.choice([8, 16, 32])
        new = rng.random() < 0.5
        built["use_new_attention_order"] = settings["use_new_attention_order"] = new
        if rng.random() < 0.2:
            width, mult = 64, (0.5, *mult[1:])
    made = (
        peer("improved" if improved else "guided", "unet")
        .UNetModel(
            in_channels=3,
            model_channels=width,
            out_channels=rng.choice([3, 6]),
            num_res_blocks=rng.choice([1, 1, 2]),
            attention_resolutions=tuple(2**i for i in range(levels) if rng.random() < 0.5),
            channel_mult=mult,
            num_classes=rng.choice([None, None, 1, 5]),
            use_scale_shift_norm=rng.random() < 0.6,
            **built,
        )
        .eval()
    )
    with torch.no_grad():
        for value in made.parameters():  # the last layer of each block begins as zeros
            value.add_(0.1 * torch.randn_like(value))
    return made, settings


def saved(network: Any, path: Path) -> Path:
    """Writes a network as the projects' TrainLoop.save does."""
    state = [(k, torch.nn.Parameter(v)) for k, v in network.state_dict().items()]
    torch.save(OrderedDict(state), path)
    return path


@pytest.mark.parametrize("part", range(6))
def test_random_networks_give_what_the_projects_give(tmp_path: Path, part: int) -> None:
    torch.manual_seed(part)
    rng = random.Random(part)
    for _ in range(12):
        network, settings = draw_network(rng)
        steps = rng.choice([1000, 4000])
        rescale = rng.random() < 0.5
        loaded = load_network(
            saved(network, tmp_path / "ema_0.9999_000010.pt"),
            settings={**settings, "rescale_timesteps": rescale},
            image_size=8,
            schedule=cosine(steps),
        )
        x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, steps - 1])
        seen = t.float() * (1000.0 / steps) if rescale else t
        y = (torch.tensor([0, network.num_classes - 1, 0]),) if network.num_classes else ()
        with torch.no_grad():
            wanted = network(x, seen, *y)
            given = loaded.network(x, t, *y)
        assert relative_error(given.numpy(), wanted.numpy()) <= TOLERANCE
        assert loaded.spec.output_shape == tuple(wanted.shape[1:])


def draw_diffusion(rng: random.Random) -> dict[str, Any]:
    steps = rng.choice([40, 300, 1000, 4000])
    count = rng.randint(2, 9)
    # A single step is more than the projects can do.
    parts = [str(rng.randint(1, 4)) for _ in range(rng.randint(2, 4))]
    return {
        "steps": steps,
        "noise_schedule": rng.choice(["linear", "cosine"]),
        "learn_sigma": rng.random() < 0.5,
        "sigma_small": rng.random() < 0.5,
        "predict_xstart": rng.random() < 0.4,
        "rescale_timesteps": rng.random() < 0.5,
        "timestep_respacing": rng.choice(
            [str(count), "5,3,2", ",".join(parts), f"ddim{rng.choice([2, 4, 5, 10])}"]
        ),
    }


class Random:
    """A network that gives random numbers, the same each time."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(1000 * float(t[0])))
        return torch.randn(len(x), self.channels, *x.shape[2:], generator=generator)


@pytest.mark.parametrize("seed", range(40))
def test_every_step_of_random_loops_is_the_projects(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    flags = draw_diffusion(rng)
    ddim = rng.random() < 0.4
    # At 1 the projects' 1 - ᾱ - σ² is rounding alone, of which the root is 2.5e-4.
    eta = rng.choice([0.0, 0.0, 0.3, 0.8]) if ddim else None
    project = rng.choice(["guided", "improved"])
    learned = flags["learn_sigma"]
    network = peer("guided", "unet").UNetModel(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=6 if learned else 3,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1,),
    )
    settings = {
        "num_heads": 1,
        "rescale_timesteps": flags["rescale_timesteps"],
        "predict_xstart": flags["predict_xstart"],
        "respacing": flags["timestep_respacing"],
        **({} if learned else {"sigma_small": flags["sigma_small"]}),
    }
    spec = load_network(
        saved(network, tmp_path / "model000010.pt"),
        settings=settings,
        image_size=8,
        schedule=named_schedule(flags["noise_schedule"], flags["steps"]),
    ).spec
    generator = np.random.default_rng(seed)
    kept = len(respaced(flags["steps"], flags["timestep_respacing"]))
    x = generator.standard_normal((2, 3, 8, 8), dtype=np.float32)
    noise = generator.standard_normal((kept, 2, 3, 8, 8), dtype=np.float32)
    theirs = peer_run(
        Random(6 if learned else 3),
        diffusion_of(project, **flags),
        x,
        noise,
        ddim=ddim,
        eta=eta,
    )
    table = spec.table("ddim" if ddim else "ddpm", spec.sampling.steps, eta=eta)
    scale = 1000 / flags["steps"] if flags["rescale_timesteps"] else 1
    np.testing.assert_allclose([row.t * scale for row in table], theirs["model_timesteps"])
    for k, row in enumerate(table):
        (step,) = denoise(
            lambda x, t, k=k: theirs["model_out"][:, k],  # type: ignore[misc]
            [row],
            lambda _, k=k: noise[k],  # type: ignore[misc]
            x=theirs["states"][:, k],
        )
        wanted = theirs["states"][:, k + 1]
        # Coefficients in float32, and in DDIM a division by √(1/ᾱ - 1).
        tolerance = (2e-4 if row.t < 0.01 * flags["steps"] else 2e-5) * (2 if ddim else 1)
        # Where x_0 is a small difference of large numbers, those have 24 bits.
        peak = max(1.0, float(np.abs(theirs["states"][:, k]).max()))
        cancelled = 2**-23 * peak * abs(row.x0_from_x) * abs(row.x_from_x0)
        error = float(np.abs(step.x - wanted).max())
        allowed = tolerance * max(1.0, float(np.abs(wanted).max())) + cancelled
        assert error <= allowed, (flags, row.t, error)


def test_respacing_keeps_what_the_projects_keep() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(2000):
        steps = rng.choice([2, 10, 50, 1000, 4000, rng.randint(2, 3000)])
        counts = [str(rng.randint(0, max(1, steps // 3))) for _ in range(rng.randint(1, 4))]
        text = rng.choice([str(rng.randint(1, steps)), ",".join(counts), f"ddim{counts[0]}"])
        for project in ("guided", "improved"):
            try:
                wanted = peer(project, "respace").space_timesteps(steps, text)
            except ValueError:
                wanted = set()
            if wanted:
                assert respaced(steps, text) == tuple(sorted(wanted, reverse=True))
                compared += 1
            else:
                with pytest.raises(ValueError, match="respacing"):
                    respaced(steps, text)
    assert compared > 2000


FLAGS = {
    # The flags in the projects' READMEs.
    "64x64_diffusion": "--attention_resolutions 32,16,8 --class_cond True --image_size 64 "
    "--learn_sigma True --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    "128x128_diffusion": "--attention_resolutions 32,16,8 --class_cond True --image_size 128 "
    "--learn_sigma True --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "256x256_diffusion": "--attention_resolutions 32,16,8 --class_cond True --image_size 256 "
    "--learn_sigma True --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "256x256_diffusion_uncond": "--attention_resolutions 32,16,8 --class_cond False "
    "--image_size 256 --learn_sigma True --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True",
    "512x512_diffusion": "--attention_resolutions 32,16,8 --class_cond True --image_size 512 "
    "--learn_sigma True --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "imagenet64_uncond_100M_1500K": "--image_size 64 --num_channels 128 --num_res_blocks 3 "
    "--learn_sigma True",
    "cifar10_uncond_50M_500K": "--image_size 32 --num_channels 128 --num_res_blocks 3 "
    "--learn_sigma True",
    "imagenet64_cond_270M_250K": "--image_size 64 --num_channels 192 --num_res_blocks 3 "
    "--learn_sigma True --class_cond True",
    "lsun_uncond_100M_1200K_bs128": "--image_size 256 --num_channels 128 --num_res_blocks 2 "
    "--num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16",
}


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.names[0])
def test_a_release_has_the_shapes_that_its_flags_give(release: Release) -> None:
    util = peer(release.project, "script_util")
    made = util.model_and_diffusion_defaults()
    words = FLAGS[release.names[0]].split()
    for name, text in zip(words[::2], words[1::2], strict=True):
        own = made[name.removeprefix("--")]
        kind = util.str2bool if isinstance(own, bool) else type(own)
        made[name.removeprefix("--")] = kind(text)
    with torch.device("meta"):
        network, _ = util.create_model_and_diffusion(**made)
    assert UNetShape.of(network.state_dict()) == release.shape
    heads = release.heads
    for module in attentions(network.middle_block):
        assert module.num_heads == heads.of(module.channels, up=False)
    up = [module for block in network.output_blocks for module in attentions(block)]
    assert up
    for module in up:
        assert module.num_heads == heads.of(module.channels, up=True)
        new = type(module.attention).__name__ == "QKVAttention" and release.project == "guided"
        assert new == heads.new_order


def attentions(block: Any) -> list[Any]:
    return [module for module in block if type(module).__name__ == "AttentionBlock"]
