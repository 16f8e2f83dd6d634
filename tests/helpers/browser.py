"""A page in a real browser, headless: what its document became, and what its console said."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Shown:
    """A page that was opened."""

    document: str
    """The document after loading, as HTML."""
    console: list[str]
    """Lines of the console, and resources that could not be loaded."""


def show(page: Path, width: int = 1200, picture: Path | None = None) -> Shown:
    """Open a page; the test is skipped where there is no chromium.

    Args:
        page: the HTML file.
        width: of the window, in pixels.
        picture: PNG file that is made of it.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser: chromium is not installed")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width},2400", "--virtual-time-budget=3000",
    ]  # fmt: skip
    if picture is not None:
        subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if re.search("CONSOLE|ERR_", line)])
