"""The HTML report in a real Chromium: opened from a file, read by keyboard, in the dark and on a narrow screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from report_gallery import HOSTILE, many, report

from pytest_llmload.reports import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
    ),
    pytest.mark.skipif(find_spec("selenium") is None, reason="no selenium: pip install selenium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a report, of one full of hostile text, and of one with 200 loads."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, document in (("plain", report()), ("hostile", report(HOSTILE)), ("many", many(200))):
        path = Path(folder, f"{name}.html")
        path.write_text(html.text(document), encoding="utf-8")
        found[name] = path.as_uri()
    return found


def show(browser: Any, address: str, *, width: int = 1280, scheme: str = "light", scripts: bool = True) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get(address)


def visible(browser: Any, selector: str) -> list[Any]:
    from selenium.webdriver.common.by import By

    return [element for element in browser.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_it_opens_without_complaint_and_asks_for_nothing(browser: Any, pages: dict[str, str], name: str) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    show(browser, pages[name])
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.title.startswith("Model loading: 5 of 12 loads failed")
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    assert browser.execute_script("return document.querySelectorAll('img, script, iframe').length") == 1


def test_the_filter_is_used_by_keyboard(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["plain"])
    assert len(visible(browser, "#loads tbody tr")) == 12
    browser.find_element(By.ID, "text").send_keys("nf4 REGRESSED")
    assert [row.text.split()[0] for row in visible(browser, "#loads tbody tr")] == ["polyglot-ko-12.8b-nf4-dq"]
    assert len(visible(browser, "#details details")) == 1
    assert browser.find_element(By.ID, "shown").text == "1 of 12 loads"
    browser.find_element(By.ID, "text").clear()
    browser.find_element(By.ID, "text").send_keys(" " + Keys.BACKSPACE + Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "failing"
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert len(visible(browser, "#loads tbody tr")) == 5


def test_a_link_unfolds_the_load_that_it_leads_to(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    show(browser, pages["plain"])
    link = next(row for row in visible(browser, "#loads tbody a") if row.text == "polyglot-ko-12.8b-nf4-dq")
    link.send_keys(Keys.ENTER)
    # The page moves the focus once it has scrolled there.
    WebDriverWait(browser, 10).until(lambda page: page.switch_to.active_element.tag_name == "summary")
    summary = browser.switch_to.active_element
    assert summary.find_element(By.XPATH, "..").get_attribute("open")
    assert visible(browser, "#details details[open] svg.timeline")


def test_all_of_it_can_be_read_without_scripts(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By

    show(browser, pages["plain"], scripts=False)
    assert not browser.find_element(By.ID, "filter").is_displayed()
    assert len(visible(browser, "#loads tbody tr")) == 12
    assert visible(browser, "#memory svg.bar")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_its_text_stands_out(
    browser: Any, pages: dict[str, str], width: int, scheme: str
) -> None:
    for name in ("plain", "hostile"):
        show(browser, pages[name], width=width, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    contrasts = browser.execute_script(
        """
        const light = (color) => {
          const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
          const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = (part) => {
          for (; part; part = part.parentElement) {
            const color = getComputedStyle(part).backgroundColor;
            if (color !== "rgba(0, 0, 0, 0)") return color;
          }
        };
        return [...document.querySelectorAll("h1, h2, h3, p, li, small, .chip, caption, th, td, a, pre, code")]
          .map((part) => {
            const [a, b] = [light(getComputedStyle(part).color), light(ground(part))];
            return [part.className || part.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
          });
        """
    )
    assert min(contrast for _, contrast in contrasts) >= 4.5, sorted(contrasts, key=lambda item: item[1])[:3]
    bright = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright == (scheme == "light")


def test_no_figure_has_to_be_looked_for_on_a_phone(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["plain"], width=390)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    wider = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.scrollWidth > each.clientWidth)"
    tables = ".scroll:has(> .bars), .scroll:has(> .loads), .scroll:has(> .moved)"
    assert len(visible(browser, tables)) > 10
    assert browser.execute_script(wider, tables) == []
    told = browser.execute_script(
        "return [...arguments[0].cells].map((cell) => getComputedStyle(cell, '::before').content)",
        visible(browser, "#memory .bars tbody tr")[0],
    )
    assert told == ["none", *(f'"{title} "' for title in ("phase", "memory", "peak", "baseline", "change"))]


def test_200_loads_open_in_under_a_second(browser: Any, pages: dict[str, str]) -> None:
    times = []
    for _ in range(5):
        show(browser, pages["many"])
        times.append(browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd"))
        if times[-1] < 1000:
            break
    # Other processes of the machine take their share of a single try.
    assert min(times) < 1000, times
    assert len(visible(browser, "#moved article")) == 20
