"""Documents on the chat page in a real browser: dropped, asked about, named in the answer, and opened there."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parents[1] / "assistant"))
from gateways import Stub, wait_for
from papers import pdf
from started import address_of

from modelworks.web.documents import cited

DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  document.querySelector(".chat").dispatchEvent(
    new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: transfer }));
}"""


@pytest.mark.parametrize(
    ("html", "shown"),
    [
        ("<p>See [1].</p>", "<p>See {1}.</p>"),
        ("<p>[1][2] and [1, 2]</p>", "<p>{1}{2} and {1}{2}</p>"),
        ("<p>[3] [1, 3] [x] []</p>", "<p>[3] [1, 3] [x] []</p>"),
        ("<pre><code>a[1]</code></pre><p>[1]</p>", "<pre><code>a[1]</code></pre><p>{1}</p>"),
        ('<p><a href="x">[1]</a> <code>b[2]</code> [2]</p>', '<p><a href="x">[1]</a> <code>b[2]</code> {2}</p>'),
        ('<p title="[1]">x</p>', '<p title="[1]">x</p>'),
    ],
)
def test_numbers_of_passages_become_buttons_in_prose_alone(html: str, shown: str) -> None:
    for number in (1, 2):
        button = f'<button type="button" class="cite" aria-label="Open source {number}">{number}</button>'
        shown = shown.replace(f"{{{number}}}", button)
    assert cited(html, {1, 2}) == shown


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture
def address(tmp_path: Path, stub: Stub) -> Iterator[str]:
    (tmp_path / "serve.toml").write_text(f'[engines.a]\nurl = "{stub.url}"\n')
    environment = {**os.environ, "MODELWORKS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("MODELWORKS_DATABASE", None)
    command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run", "--no-titles"]
    command += ["--config", str(tmp_path / "serve.toml")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    yield address_of(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=address)
    page = context.new_page()
    page.set_default_timeout(90_000)  # a busy machine is not a failure
    yield page
    context.close()


@pytest.mark.slow
@pytest.mark.browser
def test_a_dropped_pdf_is_asked_about_and_the_passage_that_the_answer_names_is_opened(page: Any, stub: Stub) -> None:
    stub.control(says="It is 37 months [2], see also [9].")
    paper = pdf(["The pump X100 has no warranty at all.", "The pump X200 has a warranty of 37 months."])
    page.goto("/")
    page.get_by_label("Message", exact=True).fill("How long is the warranty of the X200?")
    page.evaluate(DROP, ["pumps.pdf", base64.b64encode(paper).decode()])
    chip = page.locator(".document.ready", has_text="pumps.pdf")
    chip.wait_for()
    assert "/c/" in page.url
    page.get_by_label("Message", exact=True).press("Enter")
    cite = page.get_by_label("Open source 2")
    cite.wait_for()
    page.get_by_text("Sources: 2").wait_for()
    assert page.locator(".cite").count() == 1  # there is no ninth passage
    asked = stub.seen()["last"]["messages"][-1]["content"]
    assert "[2] pumps.pdf, page 2\nThe pump X200 has a warranty of 37 months." in asked
    assert asked.endswith("How long is the warranty of the X200?")
    cite.click()
    passage = page.locator(".passage")
    passage.wait_for()
    assert "The pump X200 has a warranty of 37 months." in passage.inner_text()
    assert "page 2" in passage.inner_text()
    page.get_by_role("button", name="Close").click()
    passage.wait_for(state="detached")

    page.reload()
    chip.wait_for()
    page.get_by_label("Open source 2").wait_for()
    assert page.locator(".bubble").inner_text() == "How long is the warranty of the X200?"
    page.get_by_label("Remove pumps.pdf").click()
    chip.wait_for(state="detached")
    page.reload()
    page.locator(".said").wait_for()
    assert page.locator(".cite").count() == page.locator(".document").count() == 0


@pytest.mark.slow
@pytest.mark.browser
def test_what_cannot_be_read_says_so_on_its_chip_and_is_not_given(page: Any, stub: Stub) -> None:
    page.goto("/")
    page.locator(".document-picker").set_input_files({"name": "a.pdf", "mimeType": "", "buffer": b"%PDF-1.4 cut"})
    page.locator(".document.failed", has_text="a.pdf is cut off or damaged").wait_for()
    page.get_by_label("Message", exact=True).fill("Hello?")
    page.get_by_label("Message", exact=True).press("Enter")
    wait_for(lambda: stub.seen()["last"], 60)
    assert stub.seen()["last"]["messages"][-1]["content"] == "Hello?"
