"""A headless Chromium for tests, brought along where it is missing: never skipped in silence.

Continuous integration has to have it: where it is missing and cannot be installed, the test fails. On somebody's own
machine it is skipped with the command to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

# Debian's names first; others that a developer's machine may have.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = ("chromedriver", "chromium-driver", "chromium.chromedriver")
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=300")
INSTALL = ("install", "-y", "--no-install-recommends", "chromium", "chromium-driver")
COMMAND = "sudo apt-get update && sudo apt-get install -y --no-install-recommends chromium chromium-driver"
SECONDS = 900


class NotThereError(Exception):
    """There is no browser and none can be had; says why."""


@dataclass(frozen=True)
class Browser:
    """The two programs a test needs."""

    browser: str
    driver: str


def find() -> Browser | None:
    """The browser and its driver, where both are there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = next(filter(None, map(shutil.which, DRIVERS)), None)
    return Browser(browser, driver) if browser and driver else None


def elevation() -> list[str] | None:
    """What stands before a command that needs root: nothing for root, else sudo; None where it asks for a password."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    asked = subprocess.run(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return ["sudo", "-n"] if asked.returncode == 0 else None


def install() -> None:
    """Debian's packages, through apt-get.

    Raises:
        NotThereError: no apt-get here, not allowed, or apt-get failed.
    """
    if shutil.which("apt-get") is None:
        raise NotThereError("there is no apt-get to install Chromium with")
    before = elevation()
    if before is None:
        raise NotThereError("installing Chromium needs root or sudo without a password")
    for arguments in (("update",), INSTALL):
        # sudo drops the environment, so that env sets it behind sudo.
        command = [*before, "env", "DEBIAN_FRONTEND=noninteractive", *APT, *arguments]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise NotThereError(f"apt-get {arguments[0]} took longer than {SECONDS} s") from None
        if done.returncode:
            told = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise NotThereError(f"apt-get {arguments[0]} failed: {told}")


def need() -> Browser:
    """The browser, installed if need be; fails the test under CI, skips it elsewhere, where there is none."""
    try:
        return find() or _brought()
    except NotThereError as error:
        told = f"NO BROWSER: {error}; the page was not opened. To have it tested: {COMMAND}"
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(told, pytrace=False)
    pytest.skip(told)


def _brought() -> Browser:
    # Every process of pytest-xdist comes here at once; the first installs, the others find it there.
    with FileLock(Path(tempfile.gettempdir()) / f"recbole-llm-browser-{os.getuid()}.lock", timeout=2 * SECONDS):
        if find() is None:
            install()
    found = find()
    if found is None:
        raise NotThereError("apt-get installed chromium and chromium-driver, and they are still not to be found")
    return found


@contextlib.contextmanager
def opened(width: int = 1280, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser session; it keeps what the page says on its console and whatever it asks the network for."""
    programs = need()
    options = webdriver.ChromeOptions()
    options.binary_location = programs.browser
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium runs as root without its sandbox only.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With its path given, and its manager offline, selenium has no reason to look for a driver anywhere.
    os.environ["SE_OFFLINE"] = "true"
    driver = webdriver.Chrome(options=options, service=Service(executable_path=programs.driver))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()


def console(driver: webdriver.Chrome) -> list[dict[str, Any]]:
    """What the page complained of since the last call."""
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(driver: webdriver.Chrome) -> list[str]:
    """Every address that was asked for since the last call, those inside the page (data:, blob:) left out."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if not address.startswith(("data:", "blob:"))]
