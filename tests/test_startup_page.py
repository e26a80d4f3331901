"""The start-up page in a real browser: it follows the start-up without a reload, fits a phone, and names its parts."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.startup_cases import PATIENCE_S, Ranks, service

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INSTALL = "needs Chromium and its driver: apt-get install chromium chromium-driver"
REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER) and not REQUIRED, reason=INSTALL)


class Browser:
    """A WebDriver session, by the protocol itself."""

    def __init__(self, port: int, width: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self.width = width
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chrome = {"binary": BROWSER, "args": arguments}
        if width < 500:
            # A window is never narrower than 500 pixels, a phone is.
            chrome["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": 800, "pixelRatio": 1}}
        else:
            arguments.append(f"--window-size={width},900")
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        return self._call("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def until(self, script: str, wanted: Callable[[Any], bool]) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not wanted(value := self.run(script)):
            assert time.monotonic() < end, f"{script} is still {value!r}"
            time.sleep(0.1)
        return value

    def console(self) -> list[str]:
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def end(self) -> None:
        self._call("DELETE", "")


@pytest.fixture(params=[1000, 360], ids=["desktop", "phone"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    assert DRIVER and BROWSER, INSTALL
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                session = Browser(port, request.param)
                break
            except OSError:
                assert driver.poll() is None and time.monotonic() < end, "chromedriver did not start"
                time.sleep(0.1)
        yield session
        session.end()
    finally:
        driver.terminate()
        driver.wait()


BAR = "document.querySelector('#rank-{} [role=progressbar]').getAttribute('{}')"
WIDTH = "document.querySelector('#rank-0 .fill').getBoundingClientRect().width"
TEXT = "document.getElementById('{}').textContent"


def test_the_page_follows_a_start_up_from_load_to_ready_to_death(browser: Browser, tmp_path: Path) -> None:
    directory = tmp_path / "status"
    directory.mkdir()
    with Ranks(directory) as ranks, service(directory, tmp_path / "log") as status:
        browser.open(status.url + "/")
        browser.until(TEXT.format("reason"), lambda text: "no rank has reported" in text)
        browser.run("window.sameDocument = true")
        first = ranks.start(0, 2, "load:60:0.15", "ready")
        ranks.start(1, 2, "load:60:0.2", "spin:5", "ready")
        started = browser.until("document.getElementById('ranks').children.length", lambda count: count == 2)
        assert started == 2
        moving = browser.until(BAR.format(0, "aria-valuenow"), lambda value: value is not None and 0 < int(value) < 60)
        width = browser.run(WIDTH)
        browser.until(BAR.format(0, "aria-valuenow"), lambda value: value is not None and int(value) > int(moving) + 10)
        browser.until(WIDTH, lambda now: now > width)
        assert "of 60 tensors" in browser.run("document.querySelector('#rank-1 .detail').textContent")
        if shots := os.environ.get("SCREENSHOT_DIR"):
            browser.screenshot(Path(shots) / f"page-{browser.run('window.innerWidth')}.png")
        assert browser.run("document.documentElement.scrollWidth") <= browser.width, "it scrolls sideways"
        # A phase without a total has no value to announce, and says what it is.
        browser.until(BAR.format(1, "aria-label"), lambda text: text == "Rank 1, compile and warm-up")
        assert browser.run(BAR.format(1, "aria-valuenow")) is None
        browser.until(TEXT.format("state"), lambda text: text == "ready")
        assert browser.run("document.title").startswith("ready")
        assert browser.run(BAR.format(0, "aria-valuenow")) == "100"
        assert "checkpoint read" in browser.run(TEXT.format("phases"))
        first.kill()
        browser.until(TEXT.format("state"), lambda text: text == "failed")
        assert "rank 0" in browser.run(TEXT.format("reason"))
        assert "process is gone" in browser.run("document.querySelector('#rank-0 .detail').textContent")
        assert browser.run("window.sameDocument === true"), "the page was loaded again"
        assert browser.console() == [], "errors or blocked content"
        status.end()
        browser.until(TEXT.format("connection"), lambda text: "No answer from the status service" in text)


def test_what_a_rank_writes_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    directory = tmp_path / "status"
    directory.mkdir()
    with Ranks(directory) as ranks, service(directory, tmp_path / "log") as status:
        ranks.start(0, 1, "fail:<img src=x onerror=window.injected=1>")
        browser.open(status.url + "/")
        browser.until(TEXT.format("reason"), lambda text: "<img src=x" in text)
        assert browser.run("window.injected === undefined && !document.querySelector('img')")


def test_colours_have_enough_contrast_and_parts_have_names(browser: Browser, tmp_path: Path) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, in the light and the dark palette."""
    directory = tmp_path / "status"
    directory.mkdir()
    with service(directory, tmp_path / "log") as status:
        browser.open(status.url + "/")
        page = status.get("/")[1]
        assert browser.run("document.documentElement.lang") == "en" and browser.run("document.title")
        assert browser.run("document.querySelector('[role=status]') !== null")
        for palette in page.split("--text: ")[1:3]:
            colours = {"text": palette[:7]}
            for name in ("soft", "ground", "panel", "bar", "good", "bad"):
                colours[name] = palette.split(f"--{name}: ")[1][:7]
            for name in ("text", "soft", "bar", "good", "bad"):
                assert contrast(colours[name], colours["ground"]) >= 4.5, (name, colours)
            for name in ("text", "soft"):
                assert contrast(colours[name], colours["panel"]) >= 4.5, (name, colours)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
