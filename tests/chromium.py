"""The browser for the tests of ``report.html``: found on this machine, or installed by ``python tests/chromium.py``.

Debian's package is tried first, then Playwright's own build of the headless Chromium, which comes from its own server.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, or None: one on the PATH, else the one that Playwright has installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is not None:
        return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


def install() -> None:
    """Install one; what can't be had here is passed over."""
    packages = bool(shutil.which("apt-get")) and os.geteuid() == 0
    if packages:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", NAMES[0]], check=False)
    if find_chromium() is None:
        options = ["--with-deps"] if packages else []
        subprocess.run([sys.executable, "-m", "playwright", "install", *options, "chromium"], check=False)


if __name__ == "__main__":
    if find_chromium() is None:
        install()
    if (path := find_chromium()) is None:
        sys.exit("no Chromium: install chromium or google-chrome; without one the tests of report.html are skipped")
    print(f"Chromium: {path}")
