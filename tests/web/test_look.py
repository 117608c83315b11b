"""How the chat looks and is reached, in a real browser over a stub engine: drawings, keys, languages, accessibility,
long conversations, and connections that are lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))
from gateways import Stub
from started import address_of, hindrances, long_conversation

from modelworks.assistant.store import ConversationStore

PAGES = ("/", "/c/long", "/sources", "/plan", "/supercomputer", "/runs", "/models")
pytestmark = [pytest.mark.slow, pytest.mark.browser]


class Up:
    """`modelworks up` over a stub engine, in a process of its own."""

    def __init__(self, home: Path, stub: Stub, port: int = 0) -> None:
        self.home = home
        (home / "serve.toml").write_text(f'[engines.a]\nurl = "{stub.url}"\n')
        environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment.pop("MODELWORKS_DATABASE", None)
        command = [sys.executable, "-m", "modelworks", "up", "--port", str(port), "--no-run"]
        self.process = subprocess.Popen(
            [*command, "--config", str(home / "serve.toml")], env=environment, stdout=subprocess.PIPE, text=True
        )
        self.url = address_of(self.process, home)

    def end(self, with_signal: int = signal.SIGTERM) -> None:
        self.process.send_signal(with_signal)
        self.process.wait(120)


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.end()


@pytest.fixture(scope="module")
def up(stub, tmp_path_factory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("home"), stub)
    long_conversation(up.home / "modelworks.db", 2000)
    yield up
    up.end()


@pytest.fixture
def page(browser, up):
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=up.url)
    yield context.new_page()
    context.close()


def talk(up: Up, *answers: str) -> str:
    """A conversation with these answers, each to a question of its own."""
    store = ConversationStore(up.home / "modelworks.db")
    conversation = store.create("stub")
    last = None
    for number, answer in enumerate(answers):
        last = store.add(conversation.id, "user", f"Question {number}", last and last.id)
        last = store.add(conversation.id, "assistant", answer, last.id, "stub")
    store.close()
    return f"/c/{conversation.id}"


def test_formulas_and_diagrams_are_drawn_without_a_network(page, up):
    troubles, elsewhere = [], []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith((up.url, "data:")) else elsewhere.append(asked.url))
    page.goto(
        talk(
            up,
            "Is $a^2$ over \\(\\frac{1}{2}\\) but $5 and $10?\n\n$$\n\\sqrt{x}\n$$\n\n`$y$` and $\\nosuchthing$",
            "```mermaid\nflowchart LR\n  A[Begin] --> B[End]\n```\n\n```mermaid\nflowchart LR\n  A --> --> B\n```",
        )
    )
    page.locator(".diagram .notice").wait_for()
    page.locator(".diagram img.picture").wait_for()
    assert page.locator(".formula .katex").count() == 3
    assert page.locator(".formula[data-display] .katex-display").count() == 1
    text = page.locator(".said").first.inner_text()
    assert "$5 and $10" in text
    assert "$y$" in text
    assert "$\\nosuchthing$" in text
    assert "This diagram can't be drawn: Parse error on line 2" in page.locator(".diagram .notice").inner_text()
    assert page.locator(".diagram").nth(1).locator("pre").is_visible()
    width = "document.querySelector('.picture').naturalWidth"
    page.wait_for_function(f"{width} > 50")
    page.get_by_role("button", name="Code", exact=True).first.click()
    assert page.locator(".diagram").first.locator("pre").is_visible()
    light = page.locator(".picture").get_attribute("src")
    page.get_by_label("Dark or light").click()
    page.wait_for_function("before => document.querySelector('.picture').src !== before", arg=light)
    assert troubles == []
    assert elsewhere == []


HACK = "document.title='hacked'"
HOSTILE_FORMULAS = [
    rf"$\href{{javascript:{HACK}}}{{x}}$",
    rf"$\url{{javascript:{HACK}}}$",
    rf"$\htmlData{{x=1, onclick={HACK}}}{{x}}$",
    r"$\htmlStyle{position:fixed;inset:0}{x}$ $\htmlClass{said}{x}$ $\htmlId{app}{x}$",
    r"$\includegraphics{http://127.0.0.1:9/what-was-said}$",
    rf"$\text{{<img src=x onerror={HACK}>}}$",
    rf'$x"><img src=x onerror={HACK}>$',
    r"$\color{red;background:url(http://127.0.0.1:9/)}{x}$ $\rule{900000em}{900000em}$",
    r"$\def\a{\a\a}\a$",
]
HOSTILE_DIAGRAMS = [
    f'flowchart LR\n  A[One] --> B\n  click A "javascript:{HACK}"\n  click B call alert(1)',
    f'flowchart LR\n  A["<img src=x onerror={HACK}>"] --> B["<a href=javascript:{HACK}>x</a>"]',
    f'%%{{init: {{"securityLevel": "loose", "htmlLabels": true, "flowchart": {{"htmlLabels": true}}}}}}%%\n'
    f'flowchart LR\n  A["<img src=x onerror={HACK}>"]\n  click A "javascript:{HACK}"',
    '%%{init: {"themeCSS": "} body { display: none } * { background: url(http://127.0.0.1:9/) "}}%%\nflowchart LR\n  A',
    f"---\nconfig:\n  securityLevel: loose\n---\nsequenceDiagram\n  A->>B: <svg onload={HACK}>\n"
    f"  link A: x @ javascript:{HACK}",
    f'classDiagram\n  class A\n  link A "javascript:{HACK}"\n  callback A "alert"',
]


def test_formulas_and_diagrams_of_a_stranger_do_nothing(page, up):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    fences = [f"```mermaid\n{diagram}\n```" for diagram in HOSTILE_DIAGRAMS]
    page.goto(talk(up, "\n\n".join(HOSTILE_FORMULAS), *fences))
    page.locator(".formula .katex").first.wait_for()
    drawn = ".diagram img.picture, .diagram .notice"
    page.wait_for_function(f"document.querySelectorAll('{drawn}').length === {len(fences)}")
    page.wait_for_timeout(300)
    active = ".said a, .said script, .said iframe, .said foreignObject, .said img:not(.picture), .said [onclick]"
    assert page.locator(active).count() == 0
    assert page.locator(".said [data-x], .said #app, .said .said").count() == 0
    assert page.locator(".said [style*=fixed], .said [style*=url]").count() == 0
    for picture in page.locator(".picture").all():
        picture.click()
        assert picture.get_attribute("src").startswith("data:image/svg+xml")
    for formula in page.locator(".formula").all():
        formula.click(force=True)
    assert page.evaluate("document.title") != "hacked"
    assert page.locator(".composer").is_visible()
    assert page.locator("body > svg, body > div[id^=ddrawing]").count() == 0
    assert errors == []


def test_keys_do_what_buttons_do_outside_of_fields_only(page, up, stub):
    stub.control(fault="none", tokens=3000, rate=50)
    page.goto(talk(up, "The first answer"))
    field = page.get_by_label("Message", exact=True)
    field.press("n")
    field.press("?")
    assert field.input_value() == "n?"
    assert page.locator("dialog").count() == 0
    field.fill("")
    field.press("Escape")
    page.keyboard.press("?")
    overview = page.get_by_role("dialog", name="Keyboard shortcuts")
    assert "Copy the last answer" in overview.inner_text()
    page.keyboard.press("Escape")
    overview.wait_for(state="detached")
    for _ in range(50):  # a dialog that has just gone still gives back where one was
        page.keyboard.press("m")
        page.wait_for_timeout(200)
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
    else:
        pytest.fail("the key m doesn't lead to the message")
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.get_by_label("Stop", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.locator(".turn.model", has_text="2/2").wait_for()
    page.keyboard.press(",")
    page.locator(".turn.model", has_text="The first answer").wait_for()
    page.keyboard.press(".")
    page.locator(".turn.model", has_text="2/2").wait_for()
    page.keyboard.press("?")
    overview.get_by_label("Use these keys").uncheck()
    overview.get_by_role("button", name="Close").click()
    page.keyboard.press(",")
    page.keyboard.press("?")
    page.wait_for_timeout(300)
    assert page.locator("dialog").count() == 0
    assert "2/2" in page.locator(".turn.model").inner_text()
    stub.control(tokens=8, rate=200)


def test_a_polish_browser_is_spoken_to_in_polish_until_another_language_is_chosen(browser, up):
    context = browser.new_context(base_url=up.url, locale="pl-PL", viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.goto("/")
    page.get_by_text("Czego chcesz się dowiedzieć?").wait_for()
    assert page.evaluate("document.documentElement.lang") == "pl"
    page.get_by_label("Wiadomość", exact=True).fill("Cześć")
    page.get_by_label("Wyślij", exact=True).click()
    page.get_by_label("Odpowiedz ponownie").wait_for()
    assert "tokenów/s" in page.locator(".turn.model .tools").inner_text()
    page.get_by_label("Wiadomość", exact=True).fill("pół zdania")
    page.get_by_label("English").click()
    page.get_by_label("Answer again").wait_for()
    assert page.evaluate("document.documentElement.lang").startswith("en")
    page.wait_for_function("document.querySelector('textarea').value === 'pół zdania'")
    context.close()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_hinders_anybody(browser, up, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, base_url=up.url, color_scheme=scheme)
    page = context.new_page()
    found = []
    drawn = talk(up, "$$\nx^2\n$$\n\n| a |\n|---|\n| 1 |\n\n```mermaid\nflowchart LR\n  A --> B\n```")
    for path in (*PAGES, drawn):
        page.goto(path)
        page.locator(".q-header").wait_for()
        if path == drawn:
            page.locator(".picture").wait_for()
            page.locator(".katex").wait_for()
        found += [(path, *one) for one in hindrances(page)]
    context.close()
    assert found == []


def test_a_long_conversation_shows_its_end_and_holds_what_is_read_when_older_turns_come(page):
    page.goto("/c/long")
    page.locator(".said", has_text="End of 999.").wait_for()
    region = "document.querySelector('.thread')"
    page.wait_for_function(f"{region}.scrollHeight - {region}.scrollTop - {region}.clientHeight < 2")
    assert page.locator(".turn").count() == 20
    seen = [20]
    for _ in range(3):
        page.evaluate(
            f"""() => {{
              {region}.scrollTop = 40;
              window.read = document.querySelector(".turn");
              window.place = read.getBoundingClientRect().top;
            }}"""
        )
        page.wait_for_function("before => document.querySelectorAll('.turn').length > before", arg=seen[-1])
        page.wait_for_timeout(200)
        assert abs(page.evaluate("read.getBoundingClientRect().top - place")) < 2
        seen.append(page.locator(".turn").count())
    assert seen == sorted(set(seen))


WIDE = "| a | " + "b | " * 12 + "\n|" + "---|" * 13 + "\n| unbroken | " + "some longer words | " * 12


def test_a_wide_table_is_scrolled_and_no_word_of_it_is_broken(browser, up):
    page = browser.new_page(viewport={"width": 390, "height": 844}, base_url=up.url)
    page.goto(talk(up, WIDE))
    cell = page.get_by_text("unbroken", exact=True)
    assert cell.bounding_box()["width"] > 50
    assert cell.bounding_box()["height"] < 130
    assert page.evaluate("document.querySelector('.table').scrollWidth > document.querySelector('.table').clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_text_that_is_read_from_the_right_begins_there(page, up):
    page.goto(talk(up, "שלום עולם\n\nLeft."))
    right, left = page.locator(".said p").all()
    edge = "(p) => { const r = new Range(); r.selectNodeContents(p); return r.getBoundingClientRect().left; }"
    assert right.evaluate(edge) > left.evaluate(edge) + 300


DIALOGS = ["Conversation settings", "Tools", "New folder", "Shared links", "Import conversations", "More"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_dialog_and_no_menu_hinders_anybody(browser, up, scheme):
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=up.url, color_scheme=scheme)
    page = context.new_page()
    store = ConversationStore(up.home / "modelworks.db")
    store.folders.create(f"A folder for {scheme}")
    store.close()
    page.goto(talk(up, "An answer"))
    page.locator(".said").wait_for()
    found = []
    for name in DIALOGS:
        within = page.locator(".talk.here") if name == "More" else page
        within.get_by_label(name, exact=True).click()
        opened = page.locator(".q-menu" if name == "More" else ".q-dialog")
        opened.wait_for()
        page.wait_for_timeout(600)  # until it has faded in
        # axe takes the page behind a dialog for the ground of its buttons.
        found += [(name, *one) for one in hindrances(page) if one[0] != "color-contrast"]
        page.keyboard.press("Escape")
        opened.wait_for(state="detached")
    context.close()
    assert found == []


def test_a_second_click_does_not_stop_what_the_first_has_sent_and_what_is_typed_since_stays(page, stub):
    stub.control(fault="none", tokens=2000, rate=50)
    page.goto("/")
    field = page.get_by_label("Message", exact=True)
    field.fill("Count")
    page.get_by_label("Send", exact=True).dblclick()
    page.get_by_label("Stop", exact=True).wait_for()
    page.wait_for_timeout(700)
    page.get_by_label("Stop", exact=True).click()
    page.get_by_label("Go on").wait_for()
    assert page.locator(".turn").count() == 2
    field.fill("Count again")
    # Typed before the server has answered: it knows of nothing when it takes what was sent out of the field.
    page.evaluate(
        """() => {
          const field = document.querySelector(".composer textarea");
          field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
          field.value += " and then";
          field.dispatchEvent(new Event("input", { bubbles: true }));
        }"""
    )
    page.wait_for_function("document.querySelectorAll('.turn').length === 4")
    page.wait_for_function("document.querySelector('.composer textarea').value === ' and then'")
    page.get_by_label("Stop", exact=True).click()
    stub.control(tokens=8, rate=200)


def test_a_page_shows_what_another_has_added_and_goes_on_behind_it(page, up, stub):
    stub.control(fault="none", tokens=4, rate=200)
    address = talk(up, "An answer")
    page.goto(address)
    page.locator(".said").wait_for()
    store = ConversationStore(up.home / "modelworks.db")
    place = address.removeprefix("/c/")
    question = store.add(place, "user", "From elsewhere", store.thread(place)[-1].id)
    last = store.add(place, "assistant", "Answered elsewhere", question.id, "stub")
    page.locator(".said", has_text="Answered elsewhere").wait_for()
    page.get_by_label("Message", exact=True).fill("Here")
    page.get_by_label("Message", exact=True).press("Enter")
    page.wait_for_function("document.querySelectorAll('.turn').length === 6")
    asked = store.thread(place)[4]
    store.close()
    assert (asked.content, asked.parent_id) == ("Here", last.id)


def test_a_long_text_becomes_a_document_and_nothing_to_send_is_said(page):
    page.goto("/")
    field = page.get_by_label("Message", exact=True)
    field.press("Enter")
    page.get_by_text("There is nothing to send yet.").wait_for()
    field.evaluate(
        """(field) => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", "word ".repeat(30000));
          field.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData }));
        }"""
    )
    page.locator(".document", has_text="pasted text.txt").wait_for()
    field.fill("x" * (1 << 20))
    assert len(field.input_value()) == 250_000
    field.press("Enter")
    page.get_by_label("Answer again").wait_for()


class Line:
    """A connection to a server that can be cut, and mended."""

    def __init__(self, port: int) -> None:
        self._to, self._open = port, True
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open = False
        for end in self._pairs:
            with_nothing_left(end)
        self._pairs.clear()

    def mend(self) -> None:
        self._open = True

    def end(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._pairs += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=carry, args=(one, other), daemon=True).start()


def with_nothing_left(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed already
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def carry(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := one.recv(1 << 16):
            other.sendall(block)
    with_nothing_left(one)
    with_nothing_left(other)


@pytest.mark.parametrize("offline_s", [4, 14], ids=["shorter than the page is kept", "longer than the page is kept"])
def test_an_answer_is_whole_after_the_connection_was_lost_in_its_middle(browser, up, stub, offline_s):
    stub.control(tokens=60 * offline_s, rate=40)
    line = Line(int(up.url.rsplit(":", 1)[1]))
    page = browser.new_page(base_url=f"http://127.0.0.1:{line.port}")
    page.goto("/")
    page.get_by_label("Message", exact=True).fill("Count")
    page.get_by_label("Message", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('.said')?.innerText.length > 100")
    page.get_by_label("Message", exact=True).fill("half a thought")
    line.cut()
    page.get_by_text("The connection is lost.").wait_for()
    at_cut = page.locator(".said").inner_text()
    page.wait_for_timeout(offline_s * 1000)
    line.mend()
    page.get_by_label("Answer again").wait_for(timeout=60_000)
    store = ConversationStore(up.home / "modelworks.db")
    answer = store.thread(page.url.rsplit("/", 1)[1])[-1]
    store.close()
    assert answer.state == "complete"
    assert page.locator(".said").inner_text().split() == answer.content.split()
    assert answer.content.startswith(at_cut.strip())
    # A page that was loaded again for want of the old one gets what was typed a moment after its turns.
    page.wait_for_function("document.querySelector('textarea').value === 'half a thought'")
    page.close()
    line.end()
    stub.control(tokens=8, rate=200)


def test_a_page_that_stays_open_says_what_a_killed_server_left_and_goes_on_with_the_next(browser, stub, tmp_path):
    stub.control(tokens=3000, rate=40)
    up = Up(tmp_path, stub)
    page = browser.new_page(base_url=up.url)
    page.goto("/")
    page.get_by_label("Message", exact=True).fill("Count")
    page.get_by_label("Message", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('.said')?.innerText.length > 200")
    page.get_by_label("Message", exact=True).fill("half a thought")
    page.wait_for_timeout(700)
    up.end(signal.SIGKILL)
    page.get_by_text("The connection is lost.").wait_for()
    again = Up(tmp_path, stub, int(up.url.rsplit(":", 1)[1]))
    page.get_by_text("Interrupted: the server ended").wait_for(timeout=60_000)
    assert len(page.locator(".said").inner_text()) > 100
    page.wait_for_function("document.querySelector('textarea').value === 'half a thought'")
    page.close()
    again.end()
    stub.control(tokens=8, rate=200)
