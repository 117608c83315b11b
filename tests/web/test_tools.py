"""Tools in a real browser: chosen, asked for by a scripted engine, refused, allowed, and there after a reload."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "assistant"))
from scripted import Scripted
from started import address_of

from modelworks.sandbox import unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]
CALL = [("python", '{"code": "print(6 * 7)"}')]


def test_a_person_refuses_a_call_and_allows_another(browser, tmp_path):
    engine = Scripted()
    config = tmp_path / "serve.toml"
    config.write_text(f'[engines.a]\nurl = "{engine.url}"\n[tools]\npython = true\n')
    options = ("--port", "0", "--no-run", "--no-titles", "--config", str(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "modelworks", "up", *options],
        env={**os.environ, "MODELWORKS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        page = browser.new_page(base_url=address_of(process, tmp_path))
        page.set_default_timeout(60_000)
        page.goto("/")
        page.get_by_label("Tools", exact=True).click()
        page.get_by_role("checkbox", name="python").click()
        page.get_by_role("button", name="Save").click()
        page.wait_for_url("**/c/*")
        engine.lines = [CALL, "Refused then.", CALL, "It is 42."]
        field = page.get_by_label("Message", exact=True)
        field.fill("Compute.")
        field.press("Enter")
        page.get_by_role("button", name="Refuse").click()
        page.get_by_text("Refused then.").wait_for()
        field.fill("Once more.")
        field.press("Enter")
        page.get_by_role("button", name="Allow", exact=True).click()
        page.get_by_text("It is 42.").wait_for()
        page.reload()
        page.get_by_text("It is 42.").wait_for()
        refused, done = page.locator(".call").all()
        assert "refused" in refused.inner_text()
        assert "done" in done.inner_text()
        done.click()
        page.get_by_text("print(6 * 7)").last.wait_for()
        page.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        engine.end()
