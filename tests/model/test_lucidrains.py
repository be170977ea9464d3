"""Checkpoints of denoising-diffusion-pytorch: what its releases recorded, and random networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ddpm_deploy import Engine, ModelSpec, denoise, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.images import to_pixels
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.model.families import FAMILIES
from ddpm_deploy.model.lucidrains import LUCIDRAINS
from ddpm_deploy.model.lucidrains_unet import AttentionShape, LucidrainsUnet, UnetShape
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.sampling import Transition
from tests import golden
from tests.round_trip import check_round_trip

FOLDER = golden.GOLDEN / "lucidrains"
VARIANTS = {
    path.name: json.loads((path / "table.json").read_text(encoding="utf-8"))
    for path in sorted(FOLDER.iterdir())
    if path.name != "v2_default"
}
TYPED = {  # what files from before 1.9 do not say
    "v1_8_heads": {"heads": "2,3"},
    "v1_9_sequence": {"heads": "2"},
}

State = dict[str, Tensor]
Arrays = Mapping[str, NDArray[Any]]


# --- What the releases recorded ---


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = golden.make_variant("lucidrains/v2_default", tmp_path_factory.mktemp("v2_default"))
    return folder / "model-1.pt"


@pytest.fixture(scope="module")
def engine(default: Path) -> Engine:
    """Of the weights that were trained, which the recorded loops ran with."""
    loaded = load_network(default, image_size=16, weights="online")
    path = default.with_name("unet.onnx")
    export_network(loaded.network, loaded.spec, path)
    return open_engine(path, device="cpu")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_onnx_runtime_gives_what_lucidrains_network_gave(engine: Engine, case: int) -> None:
    recorded = np.load(FOLDER / "v2_default" / "io.npz")
    assert engine.spec.weights == "online"
    out = engine(recorded[f"x{case}"], recorded[f"t{case}"])
    assert relative_error(out, recorded[f"out{case}"]) <= TOLERANCE


def test_its_moving_average_is_taken_where_nothing_is_said(default: Path) -> None:
    recorded = np.load(FOLDER / "v2_default" / "io.npz")
    loaded = load_network(default, image_size=16)
    assert loaded.spec.weights == "ema"
    for case in range(3):
        out = call(loaded, recorded[f"x{case}"], recorded[f"t{case}"])
        assert relative_error(out, recorded[f"out_ema{case}"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["ddim10_eta0", "ddim10_eta0.5", "ddpm_first10", "ddpm_last10"])
def test_every_step_is_that_of_lucidrains(engine: Engine, name: str) -> None:
    run = np.load(FOLDER / "v2_default" / f"{name}.npz")
    table = engine.spec.table()
    if name.startswith("ddim"):
        table = loop(engine.spec, 10, float(name.removeprefix("ddim10_eta")))
    visited = set(run["timesteps"].tolist())
    table = [row for row in table if row.t in visited]
    assert [row.t for row in table] == run["timesteps"].tolist()
    # What it returns, its final state too, is after (x+1)/2.
    states = [*np.moveaxis(run["model_in"], 1, 0), run["final"] * 2 - 1]
    outputs = np.moveaxis(run["model_out"], 1, 0)
    for k, row in enumerate(table):
        out = outputs[k]
        assert relative_error(engine(states[k], np.full(2, row.t)), out) <= 2 * TOLERANCE
        noise = run["noise"][k] if k < len(run["noise"]) else np.zeros_like(states[0])
        check_step(row, states[k], out, noise, states[k + 1])
    if name == "ddim10_eta0":
        *_, last = denoise(engine, table, lambda _: np.zeros_like(states[0]), x=states[0])
        wanted = np.round(np.moveaxis(run["final"], 1, -1) * 255)
        pixels = to_pixels(last.x, rounding=engine.spec.rounding)
        assert np.abs(pixels - wanted).max() <= 1
        assert np.mean(pixels != wanted) <= 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_of_every_release_give_what_it_gave(name: str, tmp_path: Path) -> None:
    loaded = load_variant(name, tmp_path)
    recorded = np.load(FOLDER / name / "io.npz")
    for case in range(3):
        out = call(loaded, *inputs(recorded, case))
        assert relative_error(out, recorded[f"out{case}"]) <= TOLERANCE


ERAS = ["v2_3_selfcond", "v2_3_sequence", "v1_9_memory", "v1_8_heads", "v1_7_3", "v1_5_4"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ERAS else pytest.mark.slow) for n in VARIANTS]
)
def test_onnx_runtime_gives_what_every_release_gave(name: str, tmp_path: Path) -> None:
    loaded = load_variant(name, tmp_path)
    export_network(loaded.network, loaded.spec, tmp_path / "unet.onnx")
    engine = open_engine(tmp_path / "unet.onnx", device="cpu")
    recorded = np.load(FOLDER / name / "io.npz")
    for case in range(3):
        x, t = recorded[f"x{case}"], recorded[f"t{case}"]
        conditions = {}
        if engine.spec.self_condition:
            conditions["self_cond"] = recorded.get(f"self_cond{case}", np.zeros_like(x))
        out = engine(x, t, **conditions)
        assert relative_error(out, recorded[f"out{case}"]) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loop_of_every_release_is_its_own(name: str, tmp_path: Path) -> None:
    """Whatever the release ran: DDPM, or DDIM with its own timesteps, eta and direction."""
    spec = load_variant(name, tmp_path).spec
    run = np.load(FOLDER / name / "run.npz")
    table = spec.table()
    assert [row.t for row in table] == run["timesteps"].tolist()
    states = [state[None] for state in (*run["model_in"], run["final"] * 2 - 1)]
    noise = [run["noise"][k, None] for k in range(1, len(run["noise"]))]
    noise += [np.zeros_like(states[0])] * (len(table) - len(noise))
    for k, row in enumerate(table):
        x0 = check_step(row, states[k], run["model_out"][k, None], noise[k], states[k + 1])
        if spec.self_condition and k + 1 < len(table):
            np.testing.assert_allclose(x0[0], run["model_self_cond"][k], atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shape_and_training_are_read_off_a_diffusion_s_file(name: str, tmp_path: Path) -> None:
    table = VARIANTS[name]
    loaded = load_variant(name, tmp_path)
    facts = {fact.name: fact for fact in loaded.facts}
    unet, diffusion = table["unet_args"], table["diffusion_args"]
    assert facts["dim"].value == unet["dim"]
    assert facts["init_dim"].value == unet.get("init_dim", unet["dim"])
    assert list(facts["dim_mults"].value) == unet["dim_mults"]
    assert facts["self_condition"].value == unet.get("self_condition", False)
    assert facts["learned_variance"].value == unet.get("learned_variance", False)
    levels = len(unet["dim_mults"])
    release = tuple(map(int, table["peer"].split()[1].split(".")))
    last_alone = [False] * (levels - 1) + [release >= (1, 9) and len(loaded.spec.sample_shape) == 3]
    assert list(facts["full_attn"].value) == list(unet.get("full_attn", last_alone))
    assert diffusion["timesteps"] == loaded.spec.schedule.T
    assert facts["schedule"].source == "weights"
    sequences = len(loaded.spec.sample_shape) == 2
    kind = "cosine" if sequences or release <= (1, 0, 0) else "sigmoid"
    assert loaded.spec.schedule.name == diffusion.get("beta_schedule", kind)
    objective = "pred_noise" if sequences or release < (1, 6, 3) else "pred_v"
    said = "pred_noise" if "learned" in name else diffusion.get("objective", objective)
    named = {"pred_noise": "epsilon", "pred_v": "v_prediction", "pred_x0": "sample"}
    assert loaded.spec.prediction == named[said]
    early = "p2_loss_weight" in np.load(FOLDER / name / "buffers.npz")
    assert facts["prediction"].source == ("assumed" if early else "weights")


def test_a_bare_network_is_read_with_what_its_release_trains_by_default(tmp_path: Path) -> None:
    for name, schedule, prediction, release in [
        ("v2_3_x0", "sigmoid", "v_prediction", "2.0 or later"),
        ("v1_9_memory", "sigmoid", "v_prediction", "1.9 to 1.11"),
        ("v1_8_heads", "sigmoid", "v_prediction", "1.8"),
        ("v1_5_4", "sigmoid", "epsilon", "1.6.2"),
        ("v0_30_0", "cosine", "epsilon", "0.31.1"),
        ("v2_3_sequence", "cosine", "epsilon", "2.0 or later"),
        ("v1_9_sequence", "cosine", "epsilon", "1.11.1"),
    ]:
        diffusion = variant_state(name, tmp_path)
        unet = {k.removeprefix("model."): v for k, v in diffusion.items() if "." in k}
        torch.save(unet, tmp_path / "unet.pt")
        loaded = load_network(tmp_path / "unet.pt", image_size=16, settings={**TYPED.get(name, {})})
        facts = {fact.name: fact for fact in loaded.facts}
        assert loaded.spec.schedule.name == schedule
        assert loaded.spec.schedule.T == 1000
        assert loaded.spec.prediction == prediction
        assert facts["schedule"].source == facts["prediction"].source == "assumed"
        assert facts["release"].value == release
        shown = name.startswith(("v2", "v1_8", "v1_9_memory"))
        assert facts["release"].source == ("weights" if shown else "assumed")


def test_a_release_that_is_typed_is_computed_as_it_did(tmp_path: Path) -> None:
    """The tensors of 1.5.4 and 1.7.7 have the same names and shapes."""
    state = variant_state("v1_7_7", tmp_path)
    torch.save(state, tmp_path / "diffusion.pt")
    recorded = np.load(FOLDER / "v1_7_7" / "io.npz")
    typed = load_network(tmp_path / "diffusion.pt", image_size=8, settings={"release": "1.7.7"})
    assumed = load_network(tmp_path / "diffusion.pt", image_size=8)
    assert relative_error(call(typed, *inputs(recorded, 0)), recorded["out0"]) <= TOLERANCE
    assert relative_error(call(assumed, *inputs(recorded, 0)), recorded["out0"]) > 1e-2
    assert "release" in {fact.name for fact in assumed.assumed}


# --- Random networks ---


def random_shape(seed: int) -> tuple[UnetShape, str]:
    """Returns a shape, and the release that it is of."""
    draw = np.random.default_rng(seed)
    axes = 1 if seed % 5 == 4 else 2
    releases = ["2.3.4", "1.10.0", "1.8.4", "1.7.5", "1.7.1", "1.5.4", "0.30.0"]
    release = releases[seed % 4 if axes == 1 else seed % 7]
    numbers = tuple(map(int, release.split(".")))
    groups = 0 if numbers >= (2, 0) else 8
    levels = int(draw.integers(1, 4))
    dim = 8 * int(draw.integers(1, 3))
    mults = draw.integers(1, 3, levels).tolist()
    init = int(draw.choice([dim, 8])) if numbers >= (2, 0, 12) else dim
    memory = int(draw.integers(1, 5)) if axes == 2 and numbers >= (1, 9) else 0

    def attention(*, full: bool) -> AttentionShape:
        if axes == 1 and not full:
            return AttentionShape(full=False, heads=4, width=32)
        heads = int(draw.integers(1, 4)) if memory else 4
        return AttentionShape(
            full=full, heads=heads, width=int(draw.choice([4, 6, 8])), memory=memory
        )

    flat = axes == 2 and numbers >= (1, 8)
    learned = bool(draw.integers(4) == 0)
    channels = int(draw.integers(1, 4))
    shape = UnetShape(
        channels=channels,
        out_channels=2 * channels if learned else channels,
        dim=dim,
        widths=(init, *(dim * mult for mult in mults)),
        attention=tuple(attention(full=flat and bool(draw.integers(2))) for _ in mults),
        middle=attention(full=True),
        axes=axes,
        self_condition=not learned and bool(draw.integers(2)),
        groups=groups,
        layer_norm=numbers < (1, 7),
        mean_values=axes == 2 and numbers < (1, 7, 4),
        stride_kernel=2 if levels == 1 or (axes == 2 and numbers > (0, 31)) else 4,
    )
    return shape, release


def save(path: Path, network: LucidrainsUnet, release: str) -> None:
    """Fills a network and saves it as the release's Trainer does."""
    shape, numbers = network.shape, tuple(map(int, release.split(".")))
    torch.manual_seed(0)
    state: State = {}
    for name, tensor in network.state_dict().items():
        value = tensor + 0.3 * torch.randn_like(tensor) if tensor.ndim != 2 else tensor
        own, key = value, name
        if numbers < (1, 7, 2) and re.search(r"block[12]\.proj\.weight$", name):
            own = F.layer_norm(value, value.shape[1:])  # standardises each filter, ε 1e-5
            if numbers >= (1, 7, 1):
                variance = value.flatten(1).var(dim=1, unbiased=False).clamp(min=1e-5)
                own = (value - value.flatten(1).mean(dim=1).reshape(-1, 1, 1, 1)) / (
                    variance.sqrt().reshape(-1, 1, 1, 1)
                )
        if shape.axes == 1 or numbers < (1, 8):
            key = re.sub(r"^((?:downs|ups)\.\d+\.2|mid_attn)\.", r"\1.fn.fn.", key)
            key = key.replace(".fn.fn.norm.", ".fn.norm.")
        if shape.axes == 2 and shape.stride_kernel == 2 and len(shape.attention) > 1:
            last = f"downs.{len(shape.attention) - 1}."
            if re.match(r"downs\.\d+\.3\.", key) and not key.startswith(last):
                key = key.replace(".3.", ".3.1.")
                value = value.reshape(len(value), -1, 1, 1) if value.ndim == 4 else value
        tensor.copy_(own)
        state[key] = value
    diffusion = {**buffers(), **{f"model.{key}": value for key, value in state.items()}}
    other = {key: value + 1 for key, value in diffusion.items()}
    torch.save(trainer(other, ema=diffusion, version=release), path)


def buffers(T: int = 30) -> State:  # noqa: N803
    """What GaussianDiffusion holds of a linear schedule, with objective pred_noise."""
    beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    made = {
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "loss_weight": torch.ones_like(beta),
    }
    return {name: buffer.float() for name, buffer in made.items()}


def trainer(online: State, *, ema: State | None = None, version: str | None = None) -> Any:
    """A file as Trainer saves it."""
    copies = {"online": online, "ema": ema or online}
    content: dict[str, Any] = {
        "step": 1,
        "model": online,
        "opt": {"state": {}, "param_groups": []},
        "ema": {
            "initted": torch.tensor([1.0]),
            "step": torch.tensor([1]),
            **{f"{kind}_model.{k}": v for kind, state in copies.items() for k, v in state.items()},
        },
        "scaler": None,
    }
    return content if version is None else {**content, "version": version}


def check_random(seed: int, folder: Path, *, export: bool = False) -> None:
    shape, release = random_shape(seed)
    network = LucidrainsUnet(shape).eval()
    path = folder / "model-1.pt"
    with torch.no_grad():
        save(path, network, release)
    loaded = check_round_trip(
        path,
        network,
        image_size=8 * (seed % 2 + 1) if shape.axes == 1 else (8, 8 * (seed % 2 + 1)),
        export=folder / "unet.onnx" if export else None,
    )
    assert isinstance(loaded.network, LucidrainsUnet)
    assert loaded.network.shape == shape
    spec = loaded.spec
    assert (spec.family, spec.weights, spec.prediction) == ("lucidrains", "ema", "epsilon")
    assert spec.schedule.name == "linear"
    assert (spec.self_condition is not None) == shape.self_condition
    assert ModelSpec.from_json(spec.to_json()) == spec
    again = load_network(path, spec=spec)
    assert again.spec == spec


@pytest.mark.parametrize("seed", range(56))
def test_a_random_network_comes_back_as_itself(seed: int, tmp_path: Path) -> None:
    check_random(seed, tmp_path)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[] if n in {0, 4, 33} else pytest.mark.slow) for n in range(56)]
)
def test_a_random_network_is_the_same_as_a_graph(seed: int, tmp_path: Path) -> None:
    check_random(seed, tmp_path, export=True)


# --- Wrappings ---


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> State:
    return variant_state("v2_3_selfcond", tmp_path_factory.mktemp("selfcond"))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def inner(state: State, prefix: str) -> State:
    """Wraps the network inside of the diffusion."""
    return {
        key.replace("model.", f"model.{prefix}", 1) if "." in key else key: value
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: {"model": d},
        lambda d: {"state_dict": d, "epoch": 3},
        lambda d: {"model_state_dict": prefixed(d, "module.")},
        lambda d: prefixed(d, "module."),
        lambda d: inner(d, "module."),
        lambda d: inner(d, "_orig_mod."),
        lambda d: {"step": 1, "model": d, "ema": d},  # before ema-pytorch
        lambda d: trainer(d)["ema"],
        lambda d: prefixed(d, "ema_model."),
        lambda d: trainer(d, version="2.3.4"),
    ],
)
def test_the_network_and_its_buffers_are_found_in_any_wrapping(
    diffusion: State, wrap: Callable[[State], Any], tmp_path: Path
) -> None:
    torch.save(wrap(diffusion), tmp_path / "file.pt")
    loaded = load_network(tmp_path / "file.pt", image_size=8)
    recorded = np.load(FOLDER / "v2_3_selfcond" / "io.npz")
    assert relative_error(call(loaded, *inputs(recorded, 1)), recorded["out1"]) <= TOLERANCE
    assert (loaded.spec.schedule.name, loaded.spec.schedule.T) == ("linear", 100)


def test_weights_that_a_file_lacks_are_refused(diffusion: State, tmp_path: Path) -> None:
    torch.save(diffusion, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="holds no ema weights; it has online"):
        load_network(tmp_path / "file.pt", image_size=8, weights="ema")


def test_no_other_family_takes_these_names(tmp_path: Path) -> None:
    for name in VARIANTS:
        state = variant_state(name, tmp_path)
        unet = {k.removeprefix("model."): v for k, v in state.items() if "." in k}
        assert [family for family in FAMILIES if family.matches(unet)] == [LUCIDRAINS]
    assert not LUCIDRAINS.matches(
        {key: torch.from_numpy(value) for key, value in golden.weights().items()}
    )


# --- What is asked, and what is refused ---


def expect_refusal(content: Any, folder: Path, match: str, **said: Any) -> None:
    torch.save(content, folder / "file.pt")
    with pytest.raises(CheckpointError, match=match):
        load_network(folder / "file.pt", **{"image_size": 8, **said})


def test_a_damaged_network_is_refused_by_what_is_wrong(diffusion: State, tmp_path: Path) -> None:
    name = "model.mid_block1.block2.proj.weight"
    missing = {key: value for key, value in diffusion.items() if key != name}
    expect_refusal(missing, tmp_path, r"Missing key\(s\).*mid_block1.block2.proj.weight")
    extra = {**diffusion, "model.mid_block9.weight": torch.zeros(1)}
    expect_refusal(extra, tmp_path, r"Unexpected key\(s\).*mid_block9.weight")
    extra = {**diffusion, "gammas": torch.zeros(1)}
    expect_refusal(extra, tmp_path, r"Unexpected key\(s\).*gammas")
    wrong = {**diffusion, name: torch.zeros(3, 3, 3, 3)}
    expect_refusal(wrong, tmp_path, "size mismatch for mid_block1.block2.proj.weight")
    no_betas = {key: value for key, value in diffusion.items() if key != "betas"}
    expect_refusal(no_betas, tmp_path, "no betas")
    short = {**diffusion, "loss_weight": torch.ones(9)}
    expect_refusal(short, tmp_path, r"loss_weight of shape \(9,\) and betas of \(100,\)")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("time_mlp.0.weights", "continuous-time models"),
        ("null_classes_emb", "class-conditional U-Net"),
        ("mid_attn.fn.norm.weight", "Annotated Diffusion"),
        ("downs.0.0.ds_conv.weight", "older than 0.27.4"),
        ("mid_attn.fn.norm.b", "older than 0.27.4"),
    ],
)
def test_relatives_are_refused_by_name(
    diffusion: State, name: str, what: str, tmp_path: Path
) -> None:
    unet = {k.removeprefix("model."): v for k, v in diffusion.items() if "." in k}
    more = [name, *(["classes_mlp.0.weight"] if name == "null_classes_emb" else [])]
    tensors = {key: torch.zeros(4) for key in more}
    expect_refusal({**unet, **tensors}, tmp_path, what)
    expect_refusal({"model": {**diffusion, **prefixed(tensors, "model.")}}, tmp_path, what)


def test_networks_of_frames_and_of_other_inputs_are_refused(
    diffusion: State, tmp_path: Path
) -> None:
    video = {**diffusion, "model.init_conv.weight": torch.zeros(12, 2, 1, 7, 7)}
    expect_refusal(video, tmp_path, "video UNet")
    other = {**diffusion, "model.init_conv.weight": torch.zeros(12, 3, 7, 7)}
    expect_refusal(other, tmp_path, "takes 3 channels and gives 1")
    shift = {**diffusion, "model.downs.0.0.mlp.1.weight": torch.zeros(12, 32)}
    expect_refusal(shift, tmp_path, "shifted by the timestep and not scaled")


def test_what_no_file_says_is_asked_for(diffusion: State, tmp_path: Path) -> None:
    expect_refusal(diffusion, tmp_path, "does not say its image size", image_size=None)
    expect_refusal(diffusion, tmp_path, "takes multiples of 2", image_size=9)
    for settings, match in [
        ({"sampling_timesteps": "101"}, "sampling_timesteps is 101; this schedule has 1 to 100"),
        ({"heads": "2"}, "has heads 2,3 by its weights, not 2"),
        ({"release": "1.5.4"}, "has release 2.0 or later by its weights, not 1.5.4"),
        ({"ddim_sampling_eta": "1"}, "ddim_sampling_eta is nothing"),
    ]:
        expect_refusal(diffusion, tmp_path, match, settings=settings)
    old = variant_state("v1_5_4", tmp_path)
    for settings, match in [
        ({"heads": "3"}, "do not split into 3, 3, 3 heads"),
        ({"heads": "4,4,4"}, "do not split into 4, 4, 4, 4 heads"),
        ({"resnet_block_groups": "5"}, "do not split into 5 groups"),
        ({"release": "2.3.4"}, "names of releases 0.27.4 to 1.7.7; it is not of 2.3.4"),
    ]:
        expect_refusal(old, tmp_path, match, settings=settings)
    sequence = variant_state("v2_3_sequence", tmp_path)
    expect_refusal(
        sequence, tmp_path, "The length is 8x16; here it is one number", image_size=(8, 16)
    )


def test_samples_without_normalisation_are_what_was_read(diffusion: State, tmp_path: Path) -> None:
    torch.save(diffusion, tmp_path / "file.pt")
    spec = load_network(tmp_path / "file.pt", image_size=8).spec
    assert (spec.value_range, spec.restore, spec.rounding) == ((-1, 1), None, "nearest")
    plain = {"auto_normalize": "false"}
    spec = load_network(tmp_path / "file.pt", image_size=8, settings=plain).spec
    assert (spec.value_range, spec.restore) == ((0, 1), None)
    torch.save(variant_state("v2_3_sequence", tmp_path), tmp_path / "sequence.pt")
    spec = load_network(tmp_path / "sequence.pt", image_size=16).spec
    assert spec.sample_shape == (2, 16)
    assert spec.restore is not None
    assert spec.restore(np.array([[[-1.0, 1.0]]], dtype=np.float32)).tolist() == [[[0, 1]]]
    spec = load_network(tmp_path / "sequence.pt", image_size=16, settings=plain).spec
    assert spec.restore is None


def call(loaded: LoadedNetwork, *arrays: NDArray[Any]) -> Samples:
    with torch.inference_mode():
        out: Tensor = loaded.network(*map(torch.from_numpy, arrays))
    return out.numpy()


def inputs(recorded: Arrays, case: int) -> list[NDArray[Any]]:
    names = (f"x{case}", f"t{case}", f"self_cond{case}")
    return [recorded[name] for name in names if name in recorded]


def variant_state(name: str, folder: Path) -> State:
    golden.make_variant(f"lucidrains/{name}", folder)
    state: State = torch.load(folder / "diffusion_state_dict.pt", weights_only=True)
    return state


def load_variant(name: str, folder: Path) -> LoadedNetwork:
    """Loads a variant as its Trainer would have saved it, with the loop that was recorded."""
    table = VARIANTS[name]
    release = table["peer"].split()[1]
    # Trainer's files say their release since 1.0.
    version = None if release.startswith("0") else release
    torch.save(trainer(variant_state(name, folder), version=version), folder / "model-1.pt")
    settings: dict[str, Any] = {**TYPED.get(name, {})}
    if release == "0.27.4":
        settings["release"] = release
    for argument in ("sampling_timesteps", "ddim_sampling_eta"):
        if argument in table["diffusion_args"]:
            settings[argument] = table["diffusion_args"][argument]
    return load_network(
        folder / "model-1.pt", image_size=tuple(table["sample_shape"][1:]), settings=settings
    )


def loop(spec: ModelSpec, steps: int, eta: float) -> list[Transition]:
    return spec.table("ddim", steps, eta=eta, spacing="trailing_floor")


def check_step(
    row: Transition, x: Samples, out: Samples, noise: Samples, wanted: Samples
) -> Samples:
    """Takes one step from a peer's state and output to its next state; returns x_0."""
    (step,) = denoise(lambda _x, _t: out, [row], lambda _: noise, x=x)
    # At the least timesteps the peer's float32 coefficients lose digits.
    tolerance = 2e-4 if row.t < 10 else 1e-5
    assert np.abs(step.x - wanted).max() <= tolerance * max(1.0, float(np.abs(wanted).max()))
    return step.x0


def test_an_average_of_another_form_is_not_passed_over(tmp_path: Path) -> None:
    golden.make_variant("lucidrains/v2_default", tmp_path)
    content = torch.load(tmp_path / "model-1.pt", weights_only=True)
    shadow = {k: v + 1 for k, v in content["model"].items() if k.startswith("model.")}
    file = {"step": 1, "model": content["model"], "ema": {"decay": 0.9, "shadow": shadow}}
    torch.save(file, tmp_path / "other.pt")
    loaded = load_network(tmp_path / "other.pt", image_size=16)
    assert loaded.spec.weights == "ema"
    name = "final_conv.bias"
    wanted = shadow["model." + name]
    assert torch.equal(loaded.network.state_dict()[name], wanted)
