"""Chromium for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

if os.environ.get("GEMMARY_REQUIRE_BROWSER") != "1":
    pytest.importorskip(
        "playwright", reason="pages are tested through Playwright; GEMMARY_REQUIRE_BROWSER=1 requires it"
    )
from playwright.sync_api import Browser, expect, sync_playwright

__all__ = ["chromium"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser for a file of tests, closed with it: Playwright's loop must not outlive them."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and os.environ.get("GEMMARY_REQUIRE_BROWSER") != "1":
        pytest.skip("there is no Chromium here; GEMMARY_REQUIRE_BROWSER=1 makes that a failure")
    assert path, "these tests need Chromium"
    expect.set_options(timeout=5000)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()
