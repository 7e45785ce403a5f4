"""The README's picture of a report: the comparison and its first figure, and below them a test image of the gallery.

python scripts/draw_report.py outputs/demo/report/index.html docs/report.jpg    # needs Chromium and its driver
"""

import argparse
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_WIDTH = 1400  # pixels
_MARGIN = 16
_BYTES = 400_000  # at most


def main() -> None:
    """One picture of two parts of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dark", action="store_true", help="as in a dark room")
    given = parser.parse_args()
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        shade = {"name": "prefers-color-scheme", "value": "dark" if given.dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [shade]})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": _WIDTH, "height": 12000, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get(given.page.resolve().as_uri())
        while not browser.execute_script("return document.documentElement.dataset.drawn"):
            time.sleep(0.1)
        whole = cv2.imdecode(np.frombuffer(browser.get_screenshot_as_png(), np.uint8), cv2.IMREAD_COLOR)
        first, shown = (
            browser.execute_script(
                "const box = document.querySelector(arguments[0])?.getBoundingClientRect();"
                "return box && [box.top, box.bottom].map(Math.round)",
                selector,
            )
            for selector in (".chart", ".shown")
        )
    finally:
        browser.quit()
    parts = [whole[: first[1] + _MARGIN]]
    if shown:
        parts.append(whole[shown[0] : shown[1] + _MARGIN])
    for quality in range(90, 30, -5):
        _, encoded = cv2.imencode(".jpg", np.vstack(parts), [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(encoded) < _BYTES:
            break
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_bytes(encoded.tobytes())


if __name__ == "__main__":
    main()
