"""How long the page Plan takes to answer a change, in the process and in a browser; and how near its answer is.

In the process: every slider and choice is moved through all its values on several models, one at a time from a
starting point, and `web.plan.answer` (search, waterfall, memory, chart, table, as markup) is timed. In a browser: a
server in a process of its own and Chromium; arrow keys move the sliders, and a mutation observer in the page times
from the key to the new answer, the round trip and drawing included. Nearness: the step that the page finds over that
of the full search (`plan.planner.plan`), on a few runs.

    python benchmarks/plan_page.py [--json] [--no-browser] [--no-full]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
STARTS = (
    {"model": "grok-1", "gpus": 1024, "global_batch": 1024, "seq_len": 8192},
    {"model": "deepseek-v3", "gpus": 2048, "global_batch": 4096, "seq_len": 4096},
    {"model": "llama-3.1-405b", "gpus": 16384, "global_batch": 2048, "seq_len": 8192},
    {"model": "llama-3.1-8b", "gpus": 256, "global_batch": 1024, "seq_len": 8192},
)
SLIDERS = ("GPUs", "Global batch", "Tokens to train on", "Tensor parallel", "Pipeline parallel", "Micro batch")
PRESSES = 6
_TIMED = """
() => {
  window.answered = new Promise((resolve) => {
    addEventListener("keydown", () => {
      const begun = performance.now();
      const seen = new MutationObserver(() => {
        seen.disconnect();
        requestAnimationFrame(() => resolve(performance.now() - begun));
      });
      for (const place of document.querySelectorAll(".plan-headline, .plan .answer")) {
        seen.observe(place, { childList: true, subtree: true, characterData: true });
      }
      setTimeout(() => resolve(null), 4000);
    }, { once: true, capture: true });
  });
}
"""


def changes() -> Iterator[Any]:
    """Choices that differ from a starting point in one thing."""
    from modelworks.plan.layout import RECOMPUTE
    from modelworks.spec.files import model_spec
    from modelworks.web import plan as page

    for start in STARTS:
        begun = page.Choices(**start)  # type: ignore[arg-type]
        for gpus in page._counts(begun.cluster):
            yield replace(begun, gpus=gpus)
        for batch in page._BATCHES:
            yield replace(begun, global_batch=batch)
        for length in page._lengths(begun.model):
            yield replace(begun, seq_len=length)
        for device in page._devices(begun.cluster):
            for precision in page._precisions(device):
                yield replace(begun, device=device, precision=precision)
        for kind in RECOMPUTE:
            yield replace(begun, recompute=kind)
        for _, name, values in page._degree_values(model_spec(begun.model)):
            for value in values:
                yield replace(begun, degrees={name: value})


def in_process() -> tuple[list[float], list[float]]:
    """Seconds for each change: as a clock shows, and of the processor, which a busy machine doesn't stretch as much."""
    from modelworks.web.plan import Choices, answer

    answer(Choices())
    wall, processor = [], []
    for choices in changes():
        begun, used = time.perf_counter(), time.process_time()
        answer(choices)
        wall.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    return wall, processor


def in_browser() -> list[float]:
    """Seconds for each key that changed the answer."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run"]
        environment = {**os.environ, "MODELWORKS_HOME": home, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (Path(home) / "up.json").exists():
                time.sleep(0.2)
            url = json.loads((Path(home) / "up.json").read_text())["url"]
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
            page = browser.new_page()
            page.goto(f"{url}/plan")
            page.locator(".headline").wait_for(timeout=60_000)
            times = []
            for slider in SLIDERS:
                page.locator(f'[aria-label="{slider}"] [tabindex="0"]').focus()
                for press in range(PRESSES):
                    page.evaluate(_TIMED)
                    page.keyboard.press("ArrowRight" if press < PRESSES // 2 else "ArrowLeft")
                    found = page.evaluate("window.answered")
                    if found is not None:
                        times.append(found / 1000)
                    page.wait_for_timeout(300)
            browser.close()
        finally:
            server.terminate()
            server.wait(120)
    return times


def nearness() -> list[float]:
    """The page's step over the full search's, for each starting point."""
    from modelworks.plan.live import quick
    from modelworks.plan.planner import plan
    from modelworks.web.plan import Choices

    ratios = []
    for start in STARTS:
        run = Choices(**start).run()  # type: ignore[arg-type]
        best = quick(run).best
        assert best is not None
        ratios.append(best.step_time_s / plan(run).step_time_s)
    return ratios


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds: median, 90th percentile, most; and the share below 200."""
    ordered = sorted(times)
    return {
        "changes": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p90_ms": 1e3 * ordered[int(0.9 * (len(ordered) - 1))],
        "most_ms": 1e3 * ordered[-1],
        "below_200_ms": sum(one < 0.2 for one in ordered) / len(ordered),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--no-full", action="store_true", help="don't run the full searches")
    options = parser.parse_args()
    wall, processor = in_process()
    found: dict[str, Any] = {"process": summary(wall), "processor": summary(processor)}
    if not options.no_browser:
        found["browser"] = summary(in_browser())
    if not options.no_full:
        found["step_over_full_search"] = nearness()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for place, name in (
        ("process", "in the process"),
        ("processor", "of the processor"),
        ("browser", "in the browser"),
    ):
        if place in found:
            said = found[place]
            print(
                f"{name}: {said['changes']} changes, median {said['median_ms']:.0f} ms, 90 % within "
                f"{said['p90_ms']:.0f} ms, most {said['most_ms']:.0f} ms, {said['below_200_ms']:.1%} below 200 ms"
            )
    if "step_over_full_search" in found:
        names = zip((start["model"] for start in STARTS), found["step_over_full_search"], strict=True)
        print("step over the full search's: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in names))
    print(f"p90_ms_for_a_change: {found.get('browser', found['process'])['p90_ms']:.0f}")


if __name__ == "__main__":
    main()
