"""Pages in a real browser: headless Chromium through chromedriver, offline; a test without them is skipped with a reason."""

import json
import shutil
from pathlib import Path

import pytest


class Page:
    """An open page. ``driver`` is selenium's."""

    def __init__(self, driver):
        self.driver = driver

    def run(self, script, *arguments):
        """What a line of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, seconds=60):
        """Wait until a JavaScript expression is true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds).until(lambda driver: driver.execute_script(f"return {script}"))

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def errors(self):
        """What the console complained of."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self):
        """Addresses that the page asked for beside itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [
            url
            for url in urls
            if url != self.driver.current_url.split("#")[0] and not url.startswith(("data:", "blob:"))
        ]

    def screenshot(self, path, height=None):
        """Save what is seen; ``height`` makes the window as high first."""
        if height:
            self.driver.set_window_size(self.run("return window.innerWidth"), height)
        self.driver.save_screenshot(str(path))


@pytest.fixture(scope="session")
def browser():
    """``browser(path, width=, height=, dark=)`` opens a file as a :class:`Page`; each call goes on with the same window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))

    def opened(path, width=1280, height=900, dark=False):
        chrome.set_window_size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for log in ("browser", "performance"):
            chrome.get_log(log)
        chrome.get(Path(path).resolve().as_uri())
        return Page(chrome)

    yield opened
    chrome.quit()
