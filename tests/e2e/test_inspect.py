"""``megavlm data inspect`` in a browser: its page is whole without any network, and shows what the pointer asks for."""

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Megavlm = Callable[..., subprocess.CompletedProcess[str]]

selenium = pytest.importorskip("selenium", reason="needs selenium: pip install -r requirements-dev.txt")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HOSTILE = "</i></script><script>document.title='owned'</script>"
HOSTILE += "<img src='http://127.0.0.1:9/x' onerror=\"document.title='owned'\">"
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1000"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A browser without a window."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS.split(), f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(recipe: Path, dataset: Path, tmp_path: Path, megavlm: Megavlm) -> Path:
    """Packed samples of a hybrid model, those of one source hostile; made by the command line."""
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()][:8]
    for row in rows:
        row["conversations"][1]["value"] = HOSTILE
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load(recipe.read_text())
    tree["model"]["fusion"]["kind"] = "hybrid"
    tree["model"]["language"]["num_layers"] = 10
    tree["training"]["trainable"].append("cross_attention")
    tree["data"] |= {"packing": {"buffer_size": 4}, "seq_length": 400}
    sources = [
        {"name": "first <b>", "weight": 1, "dataset": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}},
        {"name": "second", "weight": 1, "dataset": {"kind": "jsonl", "path": str(dataset / "valid.jsonl")}},
    ]
    for source in sources:
        source["dataset"]["image_root"] = str(dataset)  # type: ignore[index]
    tree["data"]["train"] = {"kind": "blend", "sources": sources}
    recipe.write_text(yaml.safe_dump(tree))
    result = megavlm("data", "inspect", recipe, "--num", 10, "--out", "look.html")
    assert result.returncode == 0, result.stdout
    assert "look.html: 1 page(s)" in result.stdout
    return tmp_path / "look.html"


def lit(sample: WebElement, selector: str) -> list[WebElement]:
    return [one for one in sample.find_elements(By.CSS_SELECTOR, selector) if "lit" in one.get_attribute("class")]


def said(sample: WebElement) -> str:
    return sample.find_element(By.CSS_SELECTOR, ".details").text


def point_at(browser: webdriver.Chrome, element: WebElement, sample: WebElement, words: str) -> None:
    """Move the pointer there until the sample says so: a busy browser hears of it late, and only in front of others."""
    deadline = time.monotonic() + 30.0
    while True:
        browser.execute_cdp_cmd("Page.bringToFront", {})
        ActionChains(browser).move_to_element_with_offset(element, 1, 0).move_to_element(element).perform()
        if words in said(sample):
            return
        if time.monotonic() > deadline:
            state = "return [document.visibilityState, document.hasFocus(), innerWidth, innerHeight, scrollY]"
            place = "const one = arguments[0].getBoundingClientRect(); return [one.x, one.y, one.width, one.height]"
            found = browser.execute_script(state), browser.execute_script(place, element), browser.window_handles
            raise AssertionError(f"{words!r} is not in {said(sample)!r}: {found}")
        time.sleep(0.2)


def test_a_page_in_a_browser(page: Path, browser: webdriver.Chrome) -> None:
    """A hover, a click, the keyboard and the filters do what they should; no script of the data runs; no request."""
    browser.get(page.as_uri())
    assert browser.title != "owned"
    samples = browser.find_elements(By.CSS_SELECTOR, "article.sample")
    assert len(samples) == 10
    assert any(HOSTILE in sample.get_attribute("textContent") for sample in samples)
    pictures = browser.execute_script("return [...document.images].map((one) => one.naturalWidth)")
    assert pictures
    assert all(pictures)
    assert browser.execute_script("return getComputedStyle(document.querySelector('.sample')).borderStyle") == "solid"

    sample = next(one for one in samples if len(one.find_elements(By.CSS_SELECTOR, ".tile")) > 2)
    facts = json.loads(sample.find_element(By.CSS_SELECTOR, "script.facts").get_attribute("textContent"))
    tokens, tiles = sample.find_elements(By.CSS_SELECTOR, ".tokens i, .tokens b"), facts["tiles"]
    context = next(number for number, tile in enumerate(tiles) if tile[0])
    check_pointer(browser, sample, tokens, facts, context)
    check_keyboard(browser, sample, facts)
    check_filters(browser, samples)
    check_requests(browser, page)


def check_pointer(
    browser: webdriver.Chrome, sample: WebElement, tokens: list[WebElement], facts: dict[str, Any], context: int
) -> None:
    """A token lights the tiles that it sees, a tile the tokens that see it."""
    tiles = sample.find_elements(By.CSS_SELECTOR, ".tile")
    point_at(browser, tokens[-1], sample, f"position {len(facts['ids']) - 1} · id {facts['ids'][-1]}")
    first, stop = facts["visible"][-1][1:]
    seen = [number for number, (length, *_) in enumerate(facts["tiles"]) if not length or first <= number < stop]
    assert [int(one.get_attribute("data-tile")) for one in lit(sample, ".tile")] == seen
    assert "by cross-attention" in said(sample)
    point_at(browser, tokens[0], sample, "sees no tile")
    assert lit(sample, ".tile") == []
    assert "no label, loss weight 0" in said(sample)

    edges = [*facts["visible"], [len(facts["ids"]), 0, 0]]
    num_seeing = sum(after[0] - now[0] for now, after in itertools.pairwise(edges) if now[1] <= context < now[2])
    assert num_seeing > 0
    point_at(browser, tiles[context], sample, f"seen by {num_seeing} of {len(facts['ids'])} positions")
    assert lit(sample, ".tokens i")
    tiles[context].click()
    ActionChains(browser).move_to_element(sample.find_element(By.TAG_NAME, "h3")).perform()
    assert lit(sample, ".tokens i"), "a click keeps it"


def check_keyboard(browser: webdriver.Chrome, sample: WebElement, facts: dict[str, Any]) -> None:
    """Escape lets go; the arrow keys go from token to token."""
    box = sample.find_element(By.CSS_SELECTOR, ".tokens")
    browser.execute_script("arguments[0].focus()", box)
    box.send_keys(Keys.ESCAPE)
    assert said(sample) == ""
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert said(sample).startswith(f"position 1 · id {facts['ids'][1]}")
    box.send_keys(Keys.END)
    assert f"id {facts['ids'][-1]}" in said(sample)
    box.send_keys(Keys.ESCAPE)
    assert sample.find_elements(By.CSS_SELECTOR, ".now") == []


def check_filters(browser: webdriver.Chrome, samples: list[WebElement]) -> None:
    """Sources and kinds hide samples and their links; links lead to samples."""
    [first, second] = browser.find_elements(By.CSS_SELECTOR, "[name=source]")
    first.click()
    of_second = [one for one in samples if one.get_attribute("data-source") == "1"]
    assert 0 < len(of_second) < len(samples)
    assert [one for one in samples if one.is_displayed()] == of_second
    assert browser.find_element(By.ID, "num-shown").text == str(len(of_second))
    assert sum(one.is_displayed() for one in browser.find_elements(By.CSS_SELECTOR, "nav li")) == len(of_second)
    second.click()
    assert not any(one.is_displayed() for one in samples)
    first.click()
    second.click()
    assert all(one.is_displayed() for one in samples)
    browser.find_element(By.CSS_SELECTOR, "nav li:nth-child(7) a").click()
    assert browser.current_url.endswith("#s6")
    assert abs(browser.execute_script("return document.getElementById('s6').getBoundingClientRect().top")) < 60


def check_requests(browser: webdriver.Chrome, page: Path) -> None:
    """The page asked for itself and nothing else; nothing of it was refused or failed."""
    browser.execute_script("const one = new Image(); one.src = 'http://127.0.0.1:9/x'; document.body.append(one);")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    failed = [message["params"] for message in messages if message["method"] == "Network.loadingFailed"]
    blocked = {one["requestId"] for one in failed if one.get("blockedReason") == "csp"}
    asked = {one["request"]["url"].partition("#")[0] for one in sent if one["requestId"] not in blocked}
    own = ("data:image/", "chrome://")  # inside the page; and of the browser's own start page
    assert {url for url in asked if not url.startswith(own)} == {page.as_uri()}
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert len(complaints) == 1, complaints  # of the picture that this test asked for
    assert "Content Security Policy" in complaints[0]
    assert browser.title != "owned"
