"""The page in a browser: what no parser of HTML sees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

import pytest

pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from ddpm_deploy.precision import LayerPrecision
from ddpm_deploy.report import html
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.verification import Verification
from tests.report.support import found, shaped

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"there is none of {', '.join(NAMES)}")

LAYERS = [
    LayerPrecision(name=f"layer {i}", op_type=op_type, precision=precision)
    for i, (op_type, precision) in enumerate(
        [
            ("Conv", "fp32"),
            ("GroupNormalization", "fp32"),
            ("Conv", "fp16"),
            ("MatMul", "bf16"),
            ("Softmax", "fp32"),
            ("QLinearConv", "int8"),
            ("Gemm", "float8e4m3fn"),
        ]
        * 6
    )
]

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a sound engine, a faulty one, sequences, and a loop that stops."""
    folder = tmp_path_factory.mktemp("reports")
    cause = Cause(
        name="gain",
        place="network",
        says="The output is too large.",
        evidence=("By 10 % everywhere.",),
        mend="Divide it.",
    )
    faulty = found(shaped((3, 16, 16)), images=5, error=0.1, name=f"{'a-long-name-' * 9}.onnx")
    results: dict[str, Verification] = {
        "sound": found(),
        "faulty": Verification(**{**vars(faulty), "causes": (cause,)}),
        "lines": found(shaped((6, 32)), error=0.05),
        "stops": found(nan_from=6),
        "never": found(nan_from=19),
    }
    for name, result in results.items():
        path = folder / f"{name}.html"
        path.write_text(html(result, layers=None if name == "never" else LAYERS), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in results}


KINDS = ("sound", "faulty", "lines", "stops", "never")


def opened(
    browser: Browser,
    path: Path,
    *,
    scheme: Literal["light", "dark"] = "light",
    width: int = 1280,
    script: bool = True,
) -> Page:
    page = browser.new_page(
        color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=script
    )
    page.set_default_timeout(20_000)
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("kind", KINDS)
def test_the_console_is_silent_and_nothing_is_asked_for(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    page = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[kind].as_uri())
    page.wait_for_load_state("networkidle")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[kind].as_uri()]
    page.close()


@pytest.mark.parametrize("kind", ["sound", "lines"])
def test_arrow_keys_step_through_the_loop(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    page = opened(browser, pages[kind])
    slider = page.get_by_role("slider", name="Timestep")
    last = int(cast("str", slider.get_attribute("max")))
    assert page.locator(".frame:visible").count() == 1
    slider.focus()
    before = page.locator(".frame:visible").inner_html()
    assert (slider.get_attribute("aria-valuetext") or "").startswith("t = 0, step 20 of 20")
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == str(last - 1)
    assert page.locator(".frame:visible").inner_html() != before
    page.keyboard.press("Home")
    said = slider.get_attribute("aria-valuetext") or ""
    assert said.startswith("t = 19, step 1 of 20")
    assert page.locator("#step-says").inner_text() == said
    assert page.locator(".frame:visible caption").inner_text().startswith("t = 19, step 1")
    page.keyboard.press("End")
    assert page.locator(".frame:visible").inner_html() == before
    page.close()


def test_without_scripts_the_first_and_the_last_frame_stand_there(
    browser: Browser, pages: dict[str, Path]
) -> None:
    page = opened(browser, pages["sound"], script=False)
    captions = page.locator(".frame:visible caption").all_inner_texts()
    assert [text.partition(":")[0] for text in captions] == ["t = 19, step 1", "t = 0, step 20"]
    assert page.get_by_role("slider").count() == 0
    assert page.get_by_text("Without JavaScript").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_to_mend(
    browser: Browser, pages: dict[str, Path], kind: str, scheme: Literal["light", "dark"]
) -> None:
    page = opened(browser, pages[kind], scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    outcome = Axe().run(page)
    assert outcome.violations_count == 0, outcome.generate_report()
    page.close()


@pytest.mark.parametrize("width", [380, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_no_wider_than_its_window(
    browser: Browser, pages: dict[str, Path], kind: str, width: int
) -> None:
    page = opened(browser, pages[kind], width=width)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_all_that_can_be_used_is_reached_by_tab_and_seen(
    browser: Browser, pages: dict[str, Path]
) -> None:
    page = opened(browser, pages["faulty"])
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        where = page.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return [e.tagName, s.outlineStyle, s.outlineWidth]; })()"
        )
        if where[0] == "BODY":
            break
        reached.add(where[0])
        assert where[1:] == ["solid", "3px"]
    assert {"A", "INPUT", "SUMMARY"} <= reached
    page.close()
