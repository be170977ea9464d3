"""OpenAI's checkpoints: against what the projects' own code gave, and over random architectures."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpm_deploy import Engine, Recipe, cosine, denoise, linear, open_engine
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.images import to_pixels
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.model.facts import Facts, Said
from ddpm_deploy.model.families import FAMILIES
from ddpm_deploy.model.family import Opened, Reading
from ddpm_deploy.model.openai import OPENAI, RELEASES, Release
from ddpm_deploy.model.openai_unet import Heads, OpenAIUNet, UNetShape
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.respacing import respaced, respaced_sampler
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.spec import ModelSpec
from tests.golden import GOLDEN, make_variant
from tests.round_trip import check_round_trip

# --- What the projects' own code gave ---


@dataclass(frozen=True)
class Variant:
    """A reference, and what its user types."""

    name: str
    settings: Mapping[str, str]
    image_size: int = 8
    schedule: Schedule | None = None
    file: str = "model000100.pt"

    def load(self, folder: Path, **more: Any) -> LoadedNetwork:
        return load_network(
            folder / self.file,
            settings={**self.settings, **more},
            image_size=self.image_size,
            schedule=self.schedule,
        )


COSINE4000 = Variant(
    "improved_cosine4000",
    {"num_heads": "4", "project": "improved"},
    image_size=32,
    schedule=cosine(4000),
    file="model500000.pt",
)
COND = Variant(
    "guided_small_cond",
    {"num_head_channels": "16", "use_new_attention_order": "True"},
    schedule=cosine(1000),
)
LEGACY = Variant("guided_small_legacy", {"num_heads": "4", "use_new_attention_order": "false"})
PLAIN = Variant(
    "improved_small_plain",
    {"num_heads": "1", "num_heads_upsample": "2", "project": "improved"},
    schedule=linear(600),
)
VARIANTS = [COSINE4000, COND, LEGACY, PLAIN]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Path]:
    root = tmp_path_factory.mktemp("openai")

    def made(variant: Variant) -> Path:
        folder = root / variant.name
        if not folder.exists():
            make_variant(f"openai/{variant.name}", folder)
        return folder

    return made


@pytest.fixture(scope="module")
def engines(
    files: Callable[[Variant], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Variant], Engine]]:
    root = tmp_path_factory.mktemp("engines")
    opened: dict[str, Engine] = {}

    def engine(variant: Variant) -> Engine:
        if variant.name not in opened:
            loaded = variant.load(files(variant))
            path = root / f"{variant.name}.onnx"
            export_network(loaded.network, loaded.spec, path)
            opened[variant.name] = open_engine(path, device="cpu")
        return opened[variant.name]

    yield engine
    for each in opened.values():
        each.close()


def recorded(variant: Variant, name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / "openai" / variant.name / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_onnx_runtime_gives_what_the_projects_own_code_gave(
    engines: Callable[[Variant], Engine], variant: Variant
) -> None:
    engine, io = engines(variant), recorded(variant, "io")
    for case in range(3):
        labels = {"y": io[f"y{case}"]} if f"y{case}" in io else {}
        out = engine(io[f"x{case}"], io[f"t{case}"], **labels)
        assert relative_error(out, io[f"out{case}"]) <= TOLERANCE


@dataclass(frozen=True)
class Run:
    """A loop that a project ran, and how it is asked for here."""

    variant: Variant
    name: str
    respacing: str = ""
    part: slice = field(default_factory=lambda: slice(None))
    settings: Mapping[str, str] = field(default_factory=dict)
    eta: float | None = None


RUNS = [
    Run(COSINE4000, "ddpm_respaced10", "10"),
    Run(COSINE4000, "ddim_respaced_ddim10", "ddim10"),
    Run(COSINE4000, "ddpm_first10", part=slice(10)),
    Run(COSINE4000, "ddpm_last10", part=slice(-10, None)),
    Run(COND, "ddpm_10", "10"),
    Run(LEGACY, "ddpm_5_3_2", "5,3,2"),
    Run(LEGACY, "ddim_ddim10", "ddim10"),
    Run(PLAIN, "ddpm_10", "10"),
    Run(PLAIN, "ddpm_10_sigma_small", "10", settings={"sigma_small": "true"}),
    Run(PLAIN, "ddpm_5_3_2_predict_xstart", "5,3,2", settings={"predict_xstart": "true"}),
    Run(PLAIN, "ddim_ddim10_eta0.5", "ddim10", eta=0.5),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.variant.name} {run.name}")
def test_each_step_of_a_loop_is_the_project_s(
    files: Callable[[Variant], Path], engines: Callable[[Variant], Engine], run: Run
) -> None:
    theirs = recorded(run.variant, run.name)
    more = {**run.settings, **({"respacing": run.respacing} if run.respacing else {})}
    spec = run.variant.load(files(run.variant), **more).spec
    engine = engines(run.variant)
    table = spec.table(eta=run.eta)[run.part]
    scale = 1000 / spec.schedule.T if spec.timestep == "rescaled" else 1
    np.testing.assert_allclose([row.t * scale for row in table], theirs["model_timesteps"])
    labels = {"y": theirs["labels"]} if "labels" in theirs else {}
    # Its DDIM divides by √(1/ᾱ - 1) in float32: 1.1e-5 seen at t = 400.
    large = 2e-5 if spec.sampler == "ddim" else 1e-5
    step = None
    for k, row in enumerate(table):
        x, out, wanted = (
            theirs[name][:, i] for name, i in [("states", k), ("model_out", k), ("states", k + 1)]
        )
        t = np.full(len(x), row.t, dtype=np.int64)
        assert relative_error(engine(x, t, **labels), out) <= TOLERANCE
        (step,) = denoise(
            lambda x, t, out=out: out,  # type: ignore[misc]
            [row],
            lambda _, k=k: theirs["noise"][k],  # type: ignore[misc]
            x=x,
        )
        # The project computes its coefficients in float32: few digits of 1 - ᾱ at small t.
        tolerance = 2e-4 if row.t < 10 else large
        error = float(np.abs(step.x - wanted).max())
        assert error <= tolerance * max(1.0, float(np.abs(wanted).max())), f"t = {row.t}: {error}"
    assert step is not None
    pixels = to_pixels(step.x, rounding=spec.rounding).astype(int)
    difference = np.abs(pixels - theirs["uint8_nhwc"])
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 1e-3


def test_the_averaged_weights_are_known_by_their_file_s_name(
    files: Callable[[Variant], Path],
) -> None:
    folder = files(COSINE4000)
    online = COSINE4000.load(folder)
    averaged = replace(COSINE4000, file="ema_0.9999_500000.pt").load(folder)
    assert (online.spec.weights, averaged.spec.weights) == ("online", "ema")
    one, other = (loaded.network.state_dict() for loaded in (online, averaged))
    assert one.keys() == other.keys()
    assert not torch.equal(one["out.2.weight"], other["out.2.weight"])


def test_respacing_at_export_is_the_loop_of_the_engine_and_of_a_recipe(
    files: Callable[[Variant], Path],
) -> None:
    for text in ("10", "5,3,2", "ddim10"):
        spec = LEGACY.load(files(LEGACY), respacing=text).spec
        own = LEGACY.load(files(LEGACY)).spec
        steps, sampler = respaced(1000, text), respaced_sampler(text)
        assert spec.table() == Recipe(sampler=sampler, steps=steps).table(own)
        assert spec.sampler == (sampler or "ddpm")
        assert ModelSpec.from_json(spec.to_json()) == spec


# --- Random architectures ---


@dataclass(frozen=True)
class Drawn:
    """A random network, and what its user types."""

    shape: UNetShape
    heads: Heads
    settings: Mapping[str, Any]
    schedule: Schedule
    size: int

    @property
    def rescaled(self) -> bool:
        return bool(self.settings.get("rescale_timesteps", self.improved))

    @property
    def improved(self) -> bool:
        return self.settings.get("project") == "improved"

    def network(self) -> OpenAIUNet:
        steps = self.schedule.T if self.rescaled else None
        network = OpenAIUNet(self.shape, heads=self.heads, steps=steps).eval()
        with torch.no_grad():
            for value in network.parameters():  # a wrong order of heads shall show
                value.add_(0.1 * torch.randn_like(value))
        return network


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)
    improved = rng.random() < 0.4
    levels = rng.choice([1, 2, 2, 3])
    mult: tuple[float, ...] = (1, *(rng.choice([1, 2]) for _ in range(levels - 1)))
    base = 32
    if not improved and rng.random() < 0.2:
        base, mult = 64, (0.5, *mult[1:])
    resample = "conv" if improved or levels == 1 else rng.choice(["conv", "block", "pool"])
    channels = rng.choice([1, 3])
    shape = UNetShape(
        channels=channels,
        out_channels=channels * rng.choice([1, 2]),
        model_channels=base,
        widths=tuple(int(base * each) for each in mult),
        blocks=rng.choice([1, 1, 2]),
        attention=tuple(rng.random() < 0.5 for _ in mult),
        resample=resample,  # type: ignore[arg-type]
        scale_shift=rng.random() < 0.6,
        classes=rng.choice([0, 0, 1, 7]),
    )
    settings: dict[str, Any] = {}
    if improved:
        settings["project"] = "improved"
    if not improved and rng.random() < 0.4:
        heads = Heads(channels=rng.choice([8, 16, 32]), new_order=rng.random() < 0.5)
        settings["num_head_channels"] = heads.channels
    else:
        down = rng.choice([1, 2, 4])
        up = rng.choice([down, down, 2])
        heads = Heads(down=down, up=up, new_order=not improved and rng.random() < 0.5)
        settings |= {"num_heads": down, "num_heads_upsample": -1 if up == down else up}
    if not improved:
        settings["use_new_attention_order"] = heads.new_order
        settings["rescale_timesteps"] = rng.random() < 0.3
    schedule = rng.choice([linear(1000), cosine(4000), linear(50, start=2e-3, end=0.4)])
    size = rng.choice([8, 16]) if levels == 3 else 8
    return Drawn(shape, heads, settings, schedule, size)


def check(drawn: Drawn, folder: Path, *, export: bool) -> LoadedNetwork:
    """Saves a network as the projects do, and compares all that is read of it."""
    network, shape = drawn.network(), drawn.shape
    path = folder / "ema_0.9999_000010.pt"
    state = [(key, torch.nn.Parameter(value)) for key, value in network.state_dict().items()]
    torch.save(OrderedDict(state), path)
    loaded = check_round_trip(
        path,
        network,
        export=folder / "unet.onnx" if export else None,
        settings={key: str(value) for key, value in drawn.settings.items()},
        image_size=drawn.size,
        schedule=drawn.schedule,
    )
    assert isinstance(loaded.network, OpenAIUNet)
    assert loaded.network.shape == shape
    spec = loaded.spec
    assert (spec.family, spec.weights) == ("openai", "ema")
    assert spec.schedule == drawn.schedule
    assert spec.timestep == ("rescaled" if drawn.rescaled else "index")
    learned = shape.out_channels == 2 * shape.channels
    assert spec.variance == ("learned_range" if learned else "fixed_large")
    assert (spec.label.classes if spec.label else 0) == shape.classes
    found = {fact.name: fact.value for fact in loaded.facts}
    assert found["attention_resolutions"] == tuple(
        drawn.size // 2**level for level, there in enumerate(shape.attention) if there
    )
    assert found["channel_mult"] == tuple(width / shape.model_channels for width in shape.widths)
    # What the spec keeps is enough to read the file again.
    again = load_network(path, spec=ModelSpec.from_json(spec.to_json()))
    assert again.spec == spec
    x, t = torch.randn(1, *spec.sample_shape), torch.tensor([drawn.schedule.T // 2])
    y = (torch.zeros(1, dtype=torch.int64),) if shape.classes else ()
    with torch.inference_mode():
        assert torch.equal(again.network(x, t, *y), loaded.network(x, t, *y))
    return loaded


@pytest.mark.parametrize("part", range(5))
def test_random_architectures_are_read_off_their_weights(tmp_path: Path, part: int) -> None:
    torch.manual_seed(part)
    for seed in range(part * 12, part * 12 + 12):
        check(draw(seed), tmp_path, export=False)


@pytest.mark.parametrize("seed", [17, 51, 58])
def test_random_architectures_are_the_same_in_onnx_runtime(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    check(draw(seed), tmp_path, export=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_all_random_architectures_are_the_same_in_onnx_runtime(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    check(draw(seed), tmp_path, export=True)


# --- What it is, and what only the user can say ---

SMALL = UNetShape(
    channels=3,
    out_channels=6,
    model_channels=32,
    widths=(32, 64),
    blocks=1,
    attention=(False, True),
)
SAID = {"num_heads": "4", "use_new_attention_order": "false"}


def write(path: Path, shape: UNetShape = SMALL, **changes: Any) -> Path:
    torch.manual_seed(0)
    network = OpenAIUNet(replace(shape, **changes), heads=Heads(down=1, up=1))
    torch.save(network.state_dict(), path)
    return path


def refused(path: Path, **said: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, **said)
    assert caught.value.hint
    return caught.value


def test_all_that_no_file_says_is_asked_for_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt")
    error = refused(path)
    for name in ("num_heads", "num_head_channels", "use_new_attention_order", "image size"):
        assert name in str(error)
    typed = "--set num_heads=4 --set use_new_attention_order=false --image-size 64"
    assert error.hint.endswith(typed)
    error = refused(path, image_size=8, settings={"use_new_attention_order": "true"})
    assert error.hint.endswith("for instance: --set num_heads=4")
    error = refused(path, image_size=8, settings=SAID, schedule=cosine(4000))
    assert error.hint.endswith("for instance: --set project=improved")
    assert "t in steps of 1000/4000" in str(error)
    load_network(path, image_size=8, settings=SAID)
    load_network(path, image_size=8, settings={"num_heads": "4", "project": "improved"})
    load_network(path, image_size=8, settings={"num_heads": "1"})  # one head has one order


def test_the_image_size_that_is_proposed_is_the_one_of_these_widths(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt", widths=(32, 64, 64, 64), attention=(False,) * 4)
    assert refused(path).hint.endswith("--image-size 32")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_heads": "5"}, "5 heads do not divide the 64 channels of an attention"),
        ({"num_heads": "0"}, "0 heads do not divide"),
        ({"num_heads": "four"}, "num_heads=four is not a whole number"),
        ({"num_head_channels": "24"}, "24 channels a head do not divide the 64 channels"),
        ({"num_heads_upsample": "3"}, "3 heads do not divide"),
        ({"project": "ddpm"}, "project=ddpm is not one of improved, guided"),
        ({"project": "improved", "use_new_attention_order": "true"}, "improved-diffusion has no"),
        ({"project": "improved", "num_head_channels": "16"}, "improved-diffusion has no"),
        ({"learn_sigma": "false"}, "has learn_sigma true by its weights, not false"),
        ({"channel_mult": "1,2,2"}, "has channel_mult 1,2 by its weights, not 1,2,2"),
        ({"sigma_small": "true"}, "--set sigma_small is nothing that"),
        ({"null_label": "zero"}, "--set null_label is nothing that"),
        ({"respacing": "2000"}, "keeps 2000 timesteps of 1000"),
        ({"predict_xstart": "yes, please"}, "is not true or false"),
        ({"release": "64x64_diffusion"}, "has not the shapes of the released 64x64_diffusion.pt"),
        ({"release": "another"}, "release=another is not one of 64x64_diffusion"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, str], what: str) -> None:
    path = write(tmp_path / "model000010.pt")
    assert what in str(refused(path, settings={**SAID, **settings}, image_size=8))


def test_flags_are_taken_as_openai_s_scripts_take_them(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt", out_channels=3)
    flags = {
        "num_channels": "32",
        "num_res_blocks": "1",
        "channel_mult": "1,2",
        "attention_resolutions": "4",
        "learn_sigma": "False",
        "sigma_small": "True",
        "use_scale_shift_norm": "True",
        "resblock_updown": "False",
        "num_heads": "4",
        "num_head_channels": "-1",
        "num_heads_upsample": "-1",
        "use_new_attention_order": "False",
        "rescale_timesteps": "True",
        "predict_xstart": "True",
        "timestep_respacing": "ddim25",
    }
    spec = load_network(path, settings=flags, image_size=8).spec
    assert (spec.variance, spec.prediction, spec.timestep) == ("fixed_small", "sample", "rescaled")
    assert (spec.sampler, len(spec.table())) == ("ddim", 25)
    assert (spec.clip, spec.rounding) == (1.0, "truncate")


def test_linear_is_the_projects_own_at_any_length(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt")
    settings = {**SAID, "rescale_timesteps": "true"}
    spec = load_network(path, settings=settings, image_size=8, schedule=linear(4000)).spec
    # Their β run from 0.1/T to 20/T.
    np.testing.assert_allclose(spec.schedule.beta[[0, -1]], [2.5e-5, 5e-3])
    own = linear(4000, start=1e-4, end=2e-2 + 1e-9)
    loaded = load_network(path, settings=settings, image_size=8, schedule=own)
    assert loaded.spec.schedule == own


def test_a_prediction_that_is_typed_twice_must_be_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt")
    said = {**SAID, "predict_xstart": "true"}
    assert load_network(path, settings=said, image_size=8).spec.prediction == "sample"
    error = refused(path, settings=said, image_size=8, prediction="epsilon")
    assert "predict_xstart=true is --prediction sample" in str(error)


def test_classes_have_a_null_label_where_the_user_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "model000010.pt", classes=3)

    def loaded(**more: str) -> LoadedNetwork:
        return load_network(path, settings={**SAID, **more}, image_size=8)

    plain, row, zero = loaded(), loaded(null_label="2"), loaded(null_label="zero")
    nulls = [each.spec.label and each.spec.label.null for each in (plain, row, zero)]
    assert nulls == [None, 2, 3]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    with torch.inference_mode():
        given = zero.network(x, t, torch.tensor([3, 3]))
        plain.network.get_parameter("label_emb.weight").zero_()
        wanted = plain.network(x, t, torch.tensor([0, 1]))
    assert torch.equal(given, wanted)
    for wrong in ("3", "-1", "zeros"):
        error = refused(path, settings={**SAID, "null_label": wrong}, image_size=8)
        assert f"null_label is {wrong}; it is one of the labels 0..2" in str(error)


def test_no_other_family_has_these_names(tmp_path: Path) -> None:
    state = torch.load(write(tmp_path / "a.pt"), weights_only=True)
    assert [family.name for family in FAMILIES if family.matches(state)] == ["openai"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, prefix: str) -> None:
    state = torch.load(write(tmp_path / "a.pt"), weights_only=True)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "b.pt")
    loaded = load_network(tmp_path / "b.pt", settings=SAID, image_size=8)
    assert torch.equal(loaded.network.state_dict()["out.2.bias"], state["out.2.bias"])


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("middle_block.1.qkv.bias", "Missing key(s) in state_dict: "),
        ("input_blocks.1.0.out_layers.3.weight", "'input_blocks.1.0.out_layers.3.weight'"),
        ("output_blocks.1.1.conv.weight", '"output_blocks.1.1.conv.weight"'),
        ("input_blocks.2.0.op.weight", '"input_blocks.2.0.op.weight"'),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, key: str, what: str) -> None:
    state = torch.load(write(tmp_path / "a.pt", attention=(False, False)), weights_only=True)
    del state[key]
    torch.save(state, tmp_path / "a.pt")
    message = str(refused(tmp_path / "a.pt", settings=SAID, image_size=8))
    assert "looks like openai but its weights do not fit" in message
    assert what in message


def test_an_extra_tensor_or_another_shape_is_named(tmp_path: Path) -> None:
    state = torch.load(write(tmp_path / "a.pt"), weights_only=True)
    torch.save({**state, "middle_block.3.weight": torch.zeros(2)}, tmp_path / "b.pt")
    assert "middle_block.3.weight" in str(refused(tmp_path / "b.pt", settings=SAID, image_size=8))
    torch.save({**state, "middle_block.1.qkv.weight": torch.zeros(192, 64)}, tmp_path / "b.pt")
    message = str(refused(tmp_path / "b.pt", settings=SAID, image_size=8))
    assert "size mismatch for middle_block.1.qkv.weight" in message
    torch.save({**state, "out.0.weight": torch.zeros(0)}, tmp_path / "b.pt")
    assert "out.0.weight holds no numbers" in str(refused(tmp_path / "b.pt"))
    torch.save({**state, "time_embed.0.weight": torch.zeros(())}, tmp_path / "b.pt")
    assert "do not fit" in str(refused(tmp_path / "b.pt", settings=SAID, image_size=8))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"channels": 6}, "is a super-resolution network"),
        ({"channels": 6, "out_channels": 3}, "is a super-resolution network"),
        ({"channels": 3, "out_channels": 4}, "takes 3 channels and gives 4"),
    ],
)
def test_networks_of_other_kinds_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    path = write(tmp_path / "model000010.pt", **changes)
    assert what in str(refused(path, settings=SAID, image_size=8))


def test_relatives_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = torch.load(write(path), weights_only=True)
    latent = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    whole = {**latent, "first_stage_model.quant_conv.weight": torch.zeros(2)}
    for content, what in (
        ({"state_dict": whole}, "is a latent diffusion model of CompVis"),
        (latent, "is the U-Net of a latent diffusion model"),
        ({**state, "input_blocks.1.1.proj_in.weight": torch.zeros(2)}, "with text attention"),
        ({**state, "middle_block.1.transformer_blocks.0.x": torch.zeros(2)}, "text attention"),
    ):
        torch.save(content, path)
        assert what in str(refused(path))
    classifier = {k: v for k, v in state.items() if not k.startswith("output_blocks")}
    torch.save({**classifier, "out.2.positional_embedding": torch.zeros(2)}, path)
    assert "is a noisy classifier of guided-diffusion" in str(refused(path))


def test_an_optimizer_s_file_names_the_weights_of_its_step(tmp_path: Path) -> None:
    for name in ("model000010", "model000020", "ema_0.9999_000020", "ema_0.9999_000030"):
        (tmp_path / f"{name}.pt").touch()
    for step, sibling in [("20", "ema_0.9999_000020"), ("10", "model000010")]:
        path = tmp_path / f"opt0000{step}.pt"
        torch.save({"state": {}, "param_groups": []}, path)
        error = refused(path)
        assert str(error) == f"{path} is an optimizer's state, not a network."
        assert error.hint.endswith(f"ddpm-deploy export {tmp_path / sibling}.pt")


# --- Released files ---


def read_release(
    released: Release, name: str, **settings: str
) -> tuple[Reading, dict[str, tuple[Any, str]]]:
    """Reads a network of a released file's shapes, without its numbers."""
    with torch.device("meta"):
        state = OpenAIUNet(released.shape, heads=released.heads).state_dict()
        opened = Opened(path=Path(name), state=state, weights="online", choices=("online",))
        facts = Facts(Said(settings=settings), source=name)
        reading = OPENAI.read(opened, facts)
    facts.done()
    return reading, {fact.name: (fact.value, fact.source) for fact in facts.all}


MILLIONS = {
    # As the papers give them: Dhariwal & Nichol 2021, table 10 and section 4; the files' names.
    "64x64_diffusion": (296, 1),
    "128x128_diffusion": (422, 1),
    "256x256_diffusion": (554, 1),
    "512x512_diffusion": (559, 1),
    "cifar10_uncond_50M_500K": (50, 5),
    "imagenet64_uncond_100M_1500K": (120, 5),
    "imagenet64_cond_270M_250K": (270, 5),
}


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.names[0])
def test_a_released_file_asks_for_nothing(release: Release) -> None:
    for name in release.names:
        reading, facts = read_release(release, f"models/{name}.pt")
        assert facts["release"] == (name, "release")
        assert facts["project"][0] == release.project
        spec = reading.spec
        assert spec.sample_shape == (3, release.size, release.size)
        assert spec.schedule == release.schedule
        assert spec.timestep == ("rescaled" if release.rescaled else "index")
        assert "assumed" not in {facts[n][1] for n in ("schedule", "rescale_timesteps")}
        assert {facts[n][1] for n in facts if n.startswith("num_head")} == {"release"} or (
            facts["num_heads_upsample"][0] == release.heads.up
        )
        assert facts["use_new_attention_order"] == (release.heads.new_order, "release")
    if release.names[0] in MILLIONS:
        count = sum(value.numel() for value in reading.network.parameters()) / 1e6
        millions, tolerance = MILLIONS[release.names[0]]
        assert abs(count - millions) <= tolerance


def test_shapes_that_many_networks_have_need_the_file_s_name(tmp_path: Path) -> None:
    release = next(r for r in RELEASES if r.names[0].startswith("cifar10"))
    with pytest.raises(CheckpointError) as caught:
        read_release(release, "ema_0.9999_200000.pt")
    assert "--set num_heads=4" in caught.value.hint
    assert "--set release=cifar10_uncond_50M_500K" in caught.value.hint
    _, facts = read_release(release, "a.pt", release="cifar10_uncond_50M_500K")
    assert facts["use_new_attention_order"] == (False, "release")
    assert facts["schedule"][0].startswith("cosine")


def test_a_released_file_with_another_name_is_known_by_shapes_that_few_have() -> None:
    release = next(r for r in RELEASES if r.names[0] == "64x64_diffusion")
    _, facts = read_release(release, "renamed.pt")
    assert facts["num_head_channels"] == (64, "release")
    assert facts["use_new_attention_order"] == (True, "release")
    with pytest.raises(CheckpointError, match="does not say how many heads"):
        read_release(release, "64x64_diffusion.pt", release="none")


def test_a_released_file_s_name_alone_says_nothing(tmp_path: Path) -> None:
    assert "does not say how many heads" in str(refused(write(tmp_path / "64x64_diffusion.pt")))


def test_what_the_user_says_wins_over_a_release() -> None:
    release = next(r for r in RELEASES if r.names[0] == "64x64_diffusion")
    reading, facts = read_release(release, "a.pt", num_heads="4", use_new_attention_order="false")
    assert facts["num_heads"] == (4, "flag")
    assert facts["use_new_attention_order"] == (False, "flag")
    assert "num_head_channels" not in facts
    assert reading.spec.schedule == cosine(1000)
