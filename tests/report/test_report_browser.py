"""The page in a real browser: charts drawn, themes, hovering, widths, nothing executed, nothing requested."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SCRIPT

from iprox.report.page import build_report

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
DRIVER = shutil.which("chromedriver") or "/usr/bin/chromedriver"
pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    not (Path(CHROMIUM).is_file() and Path(DRIVER).is_file()),
    reason="chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)",
)

WIDTHS = (390, 820, 1440)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(f"return {script}"))


def wait_until_drawn(browser: Any) -> None:
    wait_for(browser, "[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg.main-svg'))")


def load(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    wait_until_drawn(browser)


def set_width(browser: Any, width: int) -> None:
    """Sets the viewport itself: a window cannot be made as narrow as a phone."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requested(browser: Any) -> set[str]:
    """Returns the scheme of everything the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # Before it opens our page, the browser loads its own new-tab page, with its chrome-untrusted: frames.
    ours = [p["request"]["url"] for p in sent if not p["documentURL"].startswith(("chrome:", "chrome-untrusted:"))]
    return {url.split(":", 1)[0] for url in ours}


def test_report_in_a_browser(make_run: Callable[..., Path], browser: Any) -> None:
    page = build_report(make_run())
    load(browser, page)

    # Every chart is drawn, in the size that was kept free for it.
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map(c => {"
        " const s = c.querySelector('svg.main-svg').getBoundingClientRect();"
        " return [c.id, s.width, s.height, c.getBoundingClientRect().height]; })"
    )
    assert len(drawn) == 12
    for name, width, height, kept in drawn:
        assert width > 200, name
        assert height == pytest.approx(kept, abs=1), name

    # A row that holds a script shows it as text, and it did not run.
    assert browser.execute_script("return document.getElementById('examples').innerText.includes(arguments[0])", SCRIPT)
    assert browser.execute_script("return window.pwned === undefined && document.title === 'iprox report: run'")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    # Nor would one that got past the escaping: the policy lets only the page's own two scripts run.
    browser.execute_script(
        "const s = document.createElement('script'); s.text = 'window.pwned = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.pwned === undefined")
    blocked = [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert len(blocked) == 1

    browses(browser)
    hovers(browser)
    themes(browser)
    widths(browser)
    unfolds(browser)

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    schemes = requested(browser)
    assert "file" in schemes
    assert schemes <= {"file", "data", "blob"}


def browses(browser: Any) -> None:
    """Search narrows the list, filters and orders work, and text is text."""

    def shown(then: str = "") -> list[dict[str, Any]]:
        return browser.execute_script(
            then + "return [...document.querySelectorAll('#browser-list .card')].map(c => ({"
            " id: c.querySelector('bdi').textContent, selected: !!c.querySelector('.badge'),"
            " source: c.querySelector('.meta bdi').textContent, text: c.innerText,"
            " influence: c.querySelector('dd').textContent}))"
        )

    def choose(control: str, value: str) -> list[dict[str, Any]]:
        return shown(
            f"const e = document.getElementById('browser-{control}'); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));"
        )

    first = shown()
    assert len(first) == 12
    assert SCRIPT in first[0]["text"]  # the best row
    (found,) = choose("search", "safe MARKUP window.pwned")
    assert found["id"] == first[0]["id"]
    assert browser.find_element("id", "browser-count").text == "1 example"
    assert choose("search", "nothing says this") == []
    assert [row["id"] for row in choose("search", "")] == [row["id"] for row in first]
    assert {row["source"] for row in choose("source", "code")} == {"code"}
    assert not any(row["selected"] for row in choose("kind", "others"))
    assert all(row["selected"] for row in choose("kind", "selected"))
    choose("source", "")
    choose("kind", "")
    lowest = choose("order", "0 -1")
    assert lowest[0]["influence"].startswith("−")
    assert choose("order", "2 1")[0]["id"] == first[0]["id"]  # the best for the second task
    choose("order", "0 1")
    browser.execute_script("document.getElementById('browser-more').click()")
    assert len(shown()) == 24
    shades(browser)


def shades(browser: Any) -> None:
    """Tokens are shaded by their terms, as text, in the cards of the page and of the browser."""
    for where in ("#examples .pair", "#browser-list"):
        script = (
            f"const d = document.querySelector('{where} details.shading'); d.open = true;"
            "return [...d.querySelectorAll('.tok')].map(t =>"
            " [t.textContent, getComputedStyle(t).backgroundColor, t.title])"
        )
        (first, harm, term), (script_text, help2, _), (_, plain, _), (_, help5, _) = browser.execute_script(script)
        assert (first, term) == ("Is this ", "−0.01")
        assert script_text == SCRIPT
        assert len({harm, help2, plain, help5}) == 4
        assert plain.endswith(" 0)")  # transparent


def hovers(browser: Any) -> None:
    def hover(chart: str, point: str) -> str:
        browser.execute_script(f"Plotly.Fx.hover(document.getElementById('{chart}'), {point})")
        return wait_for(browser, f"document.querySelector('#{chart} .hoverlayer').textContent")

    assert "selected" in hover("chart-influence", "[{curveNumber: 1, pointNumber: 5}]")
    assert "rows)" in hover("chart-sources", "[{curveNumber: 1, pointNumber: 0}]")
    assert "proxy" in hover("chart-fidelity-0", "[{curveNumber: 0, pointNumber: 3}]")
    # A hostile source name is text in the label, not markup.
    names = browser.execute_script(
        "const c = document.getElementById('chart-sources');"
        "return [...c.querySelectorAll('.yaxislayer-above text')].map(t => t.textContent)"
    )
    assert any(name.startswith("<img") for name in names)


def themes(browser: Any) -> None:
    def look() -> tuple[str, str]:
        return tuple(
            browser.execute_script(
                "const fill = document.querySelectorAll('#chart-influence .trace')[1].querySelector('path').style.fill;"
                "return [getComputedStyle(document.body).backgroundColor, fill]"
            )
        )

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    # Until a theme is chosen, the page follows the system.
    prefer("light")
    before = look()
    prefer("dark")
    wait_for(browser, "document.documentElement.dataset.theme === 'dark'")
    dark = look()
    prefer("light")
    wait_for(browser, "document.documentElement.dataset.theme === 'light'")
    assert look() == before

    browser.find_element("id", "theme").click()
    after = look()
    assert after == dark
    assert before[0] != after[0]
    assert before[1] != after[1]
    browser.refresh()
    wait_until_drawn(browser)
    assert look() == after
    browser.find_element("id", "theme").click()
    assert look() == before


def widths(browser: Any) -> None:
    for width in WIDTHS:
        set_width(browser, width)
        browser.refresh()
        wait_until_drawn(browser)
        page, widest = browser.execute_script(
            "return [document.documentElement.scrollWidth,"
            " Math.max(...[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right))]"
        )
        assert page <= width
        assert widest <= width
    # Charts follow a window that changes without a reload.
    set_width(browser, WIDTHS[0])
    wait_for(browser, f"document.querySelector('#chart-influence svg').getBoundingClientRect().width < {WIDTHS[0]}")


def unfolds(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    set_width(browser, WIDTHS[-1])
    summary = browser.find_element("css selector", ".turn summary")
    excerpt = browser.find_element("css selector", ".turn .excerpt")
    assert excerpt.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert not excerpt.is_displayed()


def test_report_without_optional_stages_has_no_errors(make_run: Callable[..., Path], browser: Any) -> None:
    off = ("warmup", "compress", "align", "audit", "select")
    load(browser, build_report(make_run(without=off, tasks=("gsm8k",))))
    assert browser.execute_script("return document.querySelectorAll('.js-plotly-plot svg').length") > 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
