from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_deploy.precision import LayerPrecision
from ddpm_deploy.report import html, write_report
from ddpm_deploy.report.words import amplification
from ddpm_deploy.run import Recipe
from ddpm_deploy.verify import Budget, Limit
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.compare import StepParts
from ddpm_deploy.verify.verification import Verification, verify
from tests.report.support import Bent, Page, found, shaped

MOST = 3_000_000


def test_a_sound_engine_s_page_says_so_with_its_numbers() -> None:
    result = found()
    page = Page(html(result))
    assert page.all("html")[0]["lang"] == "en"
    assert "The same model" in page.text
    assert "outside" not in page.text
    assert "local error of the output: max 0 at t = 19; budget 2e-05" in page.text
    assert "identical: PSNR ∞, SSIM 1, all pixels equal" in page.text
    assert "Likely causes" not in page.text


def test_a_fault_s_page_says_what_failed_why_and_what_to_do() -> None:
    cause = Cause(
        name="other-gain",
        place="network",
        says="The output is 10 % too large.",
        evidence=("The ratio of the outputs is 1.1 at every timestep.",),
        mend="Divide it by 1.1.",
        certain=True,
    )
    result = replace(found(error=0.1), causes=(cause,))
    page = Page(html(result))
    assert "Not the same model" in page.text
    assert all(failure in page.text for failure in result.comparison.failures)
    assert len(result.comparison.failures) >= 3
    for said in (cause.says, *cause.evidence, cause.mend, "certain", "other-gain"):
        assert said in page.text
    # tanh is odd and nothing else enters, so 10 % is what the output is off by at every t.
    assert "Local: worst 0.1 at t = " in page.text


def test_headings_follow_one_another_and_ids_are_the_only_ones_of_their_kind() -> None:
    for result in (found(), found(error=0.1), found(shaped((2, 12)), error=0.1)):
        page = Page(html(result, layers=[layer("fp32")]))
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        pointed = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html(result))
        assert {a or b for a, b in pointed} <= set(ids)
        labels = " ".join(a.get("aria-labelledby", "") for _, a in page.elements).split()
        assert set(labels) <= set(ids)


def test_nothing_is_fetched() -> None:
    text = html(found(error=0.1), layers=[layer("fp16")])
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_same_input_gives_the_same_bytes() -> None:
    result = found(error=0.1)
    assert html(result) == html(result)
    assert html(result) != html(replace(result, seconds=result.seconds + 1))


def test_names_from_outside_stay_text() -> None:
    evil = "<script>alert(1)</script>"
    result = found(error=0.1, name=f"{evil}.onnx")
    result = replace(
        result,
        causes=(Cause(name=evil, place="network", says=evil, evidence=(evil,), mend=evil),),
        engine={**result.engine, "groups": {evil: evil}},
        command=("ddpm-deploy", evil),
        spec=replace(result.spec, family=evil),
    )
    text = html(result, layers=[LayerPrecision(name='"><script>', op_type=evil, precision=evil)])
    assert evil not in text
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.text.count("alert(1)") >= 9


@pytest.mark.parametrize(
    ("shape", "images"),
    [((3, 256, 256), 4), ((1, 64, 64), 8), ((4, 40, 300), 2), ((3, 33, 57), 8)],
)
def test_large_pictures_stay_inside_the_size(shape: tuple[int, ...], images: int) -> None:
    # Clipping keeps pictures noisy to the end, which PNG cannot make smaller.
    result = found(shaped(shape, timesteps=6), images=images, error=0.3)
    text = html(result)
    assert len(text.encode()) < MOST
    page = Page(text)
    pictures = [img for img in page.all("img") if img["alt"]]
    assert len(pictures) == 3 * images
    assert all(opened(img["src"]).size[0] > 0 for img in page.all("img"))


def test_a_thousand_steps_and_every_measure_stay_inside_the_size() -> None:
    limits = tuple(
        Limit(error=kind, quantity="x", measure=measure, bound=0.1, first=10, last=500)
        for kind in ("local", "accumulated")
        for measure in ("max", "l2", "cosine", "psnr")
    )
    spec = shaped((3, 32, 32), timesteps=1000)
    result = verify(
        Bent(spec, error=1e-3), Bent(spec), Recipe(), range(8), budget=Budget(limits=limits)
    )
    text = html(result, layers=[layer("fp16", name="n" * 500)] * 1500)
    assert len(text.encode()) < MOST
    page = Page(text)
    assert [svg["viewbox"] for svg in page.all("svg")] != []
    assert len(page.all("svg")) == 4 * 3
    assert "1 - cosine" in page.text
    assert "PSNR in dB" in page.text
    assert "999" in page.text


def test_the_axis_runs_as_the_loop_does() -> None:
    text = html(found(error=0.1))
    chart = text[text.index('<svg viewBox="') : text.index("</svg>")]
    ticks = [
        (int(t), float(x)) for x, t in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>(\d+)<', chart)
    ]
    assert [t for t, _ in sorted(ticks, key=lambda tick: tick[1])] == [19, 14, 10, 5, 0]


def y_of(text: str, label: str) -> float:
    """Returns how far down a drawing a label's baseline is."""
    found = re.search(rf'<text[^>]* y="([\d.]+)"[^>]*>{re.escape(label)}<', text)
    assert found is not None, label
    return float(found[1])


def drawings(result: Verification) -> dict[str, str]:
    """Returns each drawing by its name."""
    svgs = re.findall(r"<svg.*?</svg>", html(result), re.DOTALL)
    return {svg.partition('id="')[2].partition("-title")[0]: svg for svg in svgs}


def test_budgets_stand_in_the_drawing_of_their_error_at_their_height() -> None:
    drawn = drawings(found(error=0.1))
    assert "local budget 2e-05" in drawn["error-out-max"]
    assert "accumulated budget 0.001" in drawn["error-x-max"]
    assert "budget" not in drawn["error-x0-max"]
    # A label stands 3 points above its line; 2e-5 lies between two powers.
    baseline = y_of(drawn["error-x-max"], "accumulated budget 0.001")
    assert abs(baseline + 3 - y_of(drawn["error-x-max"], "10⁻³")) < 6
    between = y_of(drawn["error-out-max"], "local budget 2e-05")
    assert y_of(drawn["error-out-max"], "10⁻⁴") < between < y_of(drawn["error-out-max"], "10⁻⁵")


def test_equal_sides_are_drawn_at_zero_below_all_powers() -> None:
    drawn = drawings(found())["error-out-max"]
    powers = [y_of(drawn, label) for label in re.findall(r">(10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)<", drawn)]
    zeros = re.findall(r'<text[^>]*text-anchor: (\w+)[^>]* y="([\d.]+)"[^>]*>0<', drawn)
    (at_the_side,) = (float(y) for anchor, y in zeros if anchor == "end")
    assert at_the_side > max(powers)


def test_colours_in_drawings_are_the_page_s() -> None:
    text = html(found(error=0.1))
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", svgs) == []
    assert "var(--first)" in svgs
    assert "var(--second)" in svgs
    assert "DejaVu" not in svgs


def test_pictures_are_the_verification_s_own_and_their_difference_is_amplified() -> None:
    result = found(shaped((3, 8, 8)), images=1, error=0.02)
    assert result.pixels is not None
    wanted, given = (pixels[0] for pixels in result.pixels)
    page = Page(html(result))
    shown = [np.asarray(opened(img["src"])) for img in page.all("img") if img["alt"]]
    np.testing.assert_array_equal(shown[0], wanted)
    np.testing.assert_array_equal(shown[1], given)
    difference = np.abs(given.astype(int) - wanted)
    match = re.search(r"\|deployed − reference\| × (\d+):", page.text)
    assert match is not None
    factor = int(match[1])
    np.testing.assert_array_equal(shown[2], difference * factor)
    assert difference.max() * factor <= 255 < difference.max() * factor * 2.5


def test_a_single_pixel_s_difference_is_seen_in_a_reduced_map() -> None:
    result = found(shaped((1, 512, 512), timesteps=3), images=1)
    assert result.pixels is not None
    wanted, given = result.pixels
    given = given.copy()
    given[0, 301, 77] ^= 255
    page = Page(html(replace(result, pixels=(wanted, given))))
    _, _, difference = (opened(img["src"]) for img in page.all("img") if img["alt"])
    assert difference.size[0] < 512
    assert np.count_nonzero(np.asarray(difference)) == 1


@pytest.mark.parametrize("shape", [(7, 16), (4,), (2, 5, 5), (2, 3, 4, 4)])
def test_samples_that_are_no_pictures_are_lines(shape: tuple[int, ...]) -> None:
    result = found(shaped(shape), error=0.05)
    page = Page(html(result))
    assert page.all("img") == []
    assert "Last samples" in page.text
    assert "Sample 1" in page.text
    assert "x_0 of sample" in page.text
    frames = [a for _, a in page.elements if a.get("class") == "frame"]
    assert 2 <= len(frames) <= 8
    assert len(page.all("svg")) == 3 + 2 + 2 * len(frames)


def test_long_samples_stay_inside_the_size() -> None:
    text = html(found(shaped((7, 1000), timesteps=12), images=8, error=0.01))
    assert len(text.encode()) < MOST
    assert "the first 4 of 7 rows are drawn; 160 of 1000 points a row" in Page(text).text


def test_a_loop_that_stops_is_told_with_what_came_before() -> None:
    result = found(error=0.001, nan_from=6)
    assert result.comparison.not_finite is not None
    page = Page(html(result))
    assert "its numbers are not finite" in page.text
    assert "From t = 6 (step 14) on the deployed side's numbers are not finite" in page.text
    assert "There are none: the loop stopped at t = 6." in page.text
    assert len(page.all("svg")) == 3
    assert "t = 7, step 13 of 20" in str(page.elements)


def test_a_loop_that_never_starts_has_a_page_too() -> None:
    result = found(nan_from=19)
    assert result.comparison.steps == ()
    page = Page(html(result))
    assert "No step could be measured." in page.text
    assert "From t = 19 (step 1) on the deployed side's numbers are not finite" in page.text
    assert "No timestep was kept" in page.text
    assert page.all("svg") == page.all("img") == []


def test_without_a_script_the_first_and_the_last_frame_are_shown() -> None:
    page = Page(html(found()))
    frames = [a for _, a in page.elements if a.get("class") == "frame"]
    assert [i for i, frame in enumerate(frames) if "hidden" not in frame] == [0, len(frames) - 1]
    assert len(frames) == 20
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "19")
    assert frames[0]["data-says"].startswith("t = 19, step 1 of 20")


def layer(precision: str, *, op_type: str = "Conv", name: str = "conv") -> LayerPrecision:
    return LayerPrecision(name=name, op_type=op_type, precision=precision)


def test_layers_are_told_in_order_counted_and_not_by_colour_alone() -> None:
    layers = [layer("fp32"), layer("fp16"), layer("fp16", op_type="MatMul"), layer("int8")]
    result = found()
    groups = {"fp16": "1 Conv, 1 MatMul", "float32, because it overflows": "1 Conv"}
    page = Page(html(replace(result, engine={**result.engine, "groups": groups}), layers=layers))
    cells = [a["class"] for a in page.all("li") if a.get("class", "").startswith("p-")]
    assert cells == ["p-fp32", "p-fp16", "p-fp16", "p-int8"]
    assert [text for tag, text in page.texts if tag == "b" and text in {"32", "16", "i8"}] == [
        "32", "16", "16", "i8",
    ]  # fmt: skip
    assert "4 layers: 1 in fp32, 2 in fp16, 1 in int8" in page.text
    for reason, counts in groups.items():
        assert reason in page.text
        assert counts in page.text


def test_the_page_says_where_all_comes_from_and_how_to_do_it_again() -> None:
    result = replace(
        found(),
        command=("/home/a/.venv/bin/ddpm-deploy", "verify", "-e", "my net.onnx"),
        engine={"name": "onnxruntime CPU", "path": "my net.onnx", "sha256": "ab" * 32},
        same_checkpoint=False,
    )
    text = Page(html(result)).text
    assert "ddpm-deploy verify -e 'my net.onnx'" in text
    assert "/home/a" not in text
    assert "ab" * 32 in text
    assert "linear (start 0.001, end 0.2), T = 20" in text
    assert "different checkpoint files" in text
    assert "all 20 timesteps" in text


def test_the_page_is_a_file(tmp_path: Path) -> None:
    result = found()
    write_report(tmp_path / "report.html", result)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(result)


@pytest.mark.parametrize(
    ("local", "free", "said"),
    [
        (1e-3, 5e-3, "The loop makes a step's error 5 times as large"),
        (1e-3, 1e-4, "The loop forgets what a step does wrong (factor 0.1)"),
        (1e-3, 1.1e-3, "hands a step's error on nearly as it is (factor 1.1)"),
        (0.0, 0.0, "no step differs, so there is nothing"),
        (0.0, 1e-3, "the two loops are fed differently"),
    ],
)
def test_what_the_loop_makes_of_an_error_is_told(local: float, free: float, said: str) -> None:
    result = found()
    step = result.comparison.steps[0]

    def parts(error: float) -> StepParts:
        return replace(step.local, x=replace(step.local.x, max=error))

    steps = (replace(step, local=parts(local), accumulated=parts(free)),)
    changed = replace(result, comparison=replace(result.comparison, steps=steps))
    assert said in amplification(changed)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
