"""The pages in a real browser, on a real server with SmolLM2, as a person would use them."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from started import address_of

from modelworks.assistant.store import ConversationStore
from modelworks.serve.store import Store
from modelworks.spec.errors import OperationError

MODEL = "smollm2-135m"
CHARACTER = "smollm2-135m-character"
ANSWER = "Like **this**:\n\n```python\nwords.reverse()\n```\n\nIn place."
pytestmark = [pytest.mark.slow, pytest.mark.browser]


class RunningServer:
    """`modelworks up` in a process of its own."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.process = self.command("--port", "0", "--no-run", "--no-titles", *options)
        self.url = address_of(self.process, home)

    def command(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "modelworks", "up", *options]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self, with_signal: int = signal.SIGTERM) -> int:
        self.process.send_signal(with_signal)
        return self.process.wait(120)  # a busy machine is not a failure


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """With SmolLM2 as it is, which tells stories long enough to be stopped; its character was removed."""
    home = tmp_path_factory.mktemp("home")
    store = Store(home / "models")
    try:
        store.pull(CHARACTER)
        store.remove(CHARACTER)
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched here: {error}")
    return home


@pytest.fixture(scope="module")
def server(home):
    server = RunningServer(home)
    yield server
    server.end()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=server.url)
    yield context.new_page()
    context.close()


@pytest.fixture
def talk(home) -> Iterator[str]:
    """A conversation that is there already, with code in its answer."""
    store = ConversationStore(home / "modelworks.db")
    conversation = store.create(MODEL)
    question = store.add(conversation.id, "user", "How does one reverse a list?", None)
    store.add(conversation.id, "assistant", ANSWER, question.id, MODEL)
    yield conversation.id
    store.delete(conversation.id)
    store.close()


def send(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def test_a_message_is_answered_in_a_stream_and_found_again_after_a_reload(page):
    page.goto("/")
    send(page, "Tell me a long story about a fox.")
    said = page.locator(".said").first
    seen = set()
    deadline = time.monotonic() + 60
    while len(seen) < 4 and time.monotonic() < deadline:
        if said.count():
            seen.add(said.inner_text())
        time.sleep(0.05)
    assert len(seen) >= 4
    page.get_by_label("Stop", exact=True).click()
    page.get_by_label("Answer again").wait_for()
    assert "/c/" in page.url
    final = said.inner_text()
    page.reload()
    page.locator(".said").first.wait_for()
    assert page.locator(".bubble").inner_text() == "Tell me a long story about a fox."
    assert page.locator(".said").first.inner_text() == final
    assert page.locator(".talk.here").inner_text().startswith("Tell me a long story")


HOSTILE = [
    "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>",
    "<svg onload=\"document.title='hacked'\"><animate onbegin=\"document.title='hacked'\"/></svg>",
    "[x](javascript:document.title='hacked') ![y](javascript:document.title='hacked')",
    "<iframe srcdoc=\"<script>parent.document.title='hacked'</script>\"></iframe><a href=data:text/html,x>z</a>",
    '```"><img src=x onerror="document.title=\'hacked\'">\ncode\n```',
    "|a|\n|-|\n|<details open ontoggle=\"document.title='hacked'\">|",
    "{{constructor.constructor(\"document.title='hacked'\")()}} <math><mtext><style><img src=x onerror=alert(1)>",
]


def test_hostile_words_of_a_model_do_nothing(page, home):
    store = ConversationStore(home / "modelworks.db")
    conversation = store.create(MODEL)
    last = None
    for attack in HOSTILE:
        last = store.add(conversation.id, "user", attack, last and last.id)
        last = store.add(conversation.id, "assistant", attack, last.id, model=attack)
    store.save(last.id, HOSTILE[0], "failed", HOSTILE[1])
    store.rename(conversation.id, HOSTILE[0])
    store.close()
    run = home / "runs" / "<img src=x onerror=alert(1)>"  # a folder's name is a stranger's word as well
    run.mkdir(parents=True)
    for address in (f"/c/{conversation.id}", "/runs", "/models"):
        page.goto(address)
        page.get_by_label("Menu").wait_for()
        if address.startswith("/c/"):
            page.locator(".said").nth(len(HOSTILE) - 1).wait_for()
            assert "onerror" in page.locator(".said").first.inner_text()
        page.wait_for_timeout(300)
        active = ".chat img, .chat script, .chat iframe, .said svg, .talk img, .said a, .q-page img"
        assert page.locator(active).count() == 0
        assert page.evaluate("document.title") != "hacked"
    run.rmdir()


def test_the_pages_keep_to_their_policy_and_it_stops_what_should_have_got_through(page, talk):
    refused = []
    page.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
    for address in ("/", f"/c/{talk}", "/plan", "/supercomputer", "/runs", "/models"):
        answer = page.goto(address)
        assert "script-src-attr 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        page.get_by_label("Menu").wait_for()
        page.wait_for_timeout(300)
    assert refused == []
    page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="document.title = 'hacked'">`);
          document.body.insertAdjacentHTML("beforeend", `<img src="http://127.0.0.1:9/what-was-said">`);
          document.body.insertAdjacentHTML("beforeend", `<iframe src="http://127.0.0.1:9/"></iframe>`);
        }"""
    )
    sent = "fetch('http://127.0.0.1:9/', {method: 'POST', body: 'what was said'}).then(() => 'sent', String)"
    assert page.evaluate(sent) != "sent"
    page.wait_for_timeout(500)
    assert page.evaluate("document.title") != "hacked"
    for directive in ("script-src-attr", "img-src", "connect-src"):
        assert any(directive in line for line in refused), directive


def test_what_is_typed_survives_a_reload(page):
    page.goto("/models")
    page.goto("/")
    page.get_by_label("Message", exact=True).fill("half a thought")
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_function("document.querySelector('textarea')?.value === 'half a thought'")


def test_a_phone_shows_the_chat_without_scrolling_sideways_and_the_drawer_on_demand(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 800}, base_url=server.url, color_scheme="dark")
    page = context.new_page()
    for path in ("/", "/plan", "/runs", "/models"):
        page.goto(path)
        page.get_by_label("Menu").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.wait_for_timeout(300)
    assert page.evaluate("document.body.classList.contains('body--dark')")
    page.get_by_label("Menu").click()
    page.get_by_text("New chat").wait_for()
    context.close()


def answered(page, count: int = 1) -> None:
    """Wait until the last of so many answers shown has ended."""
    page.wait_for_function(
        "count => document.querySelectorAll('.turn.model').length === count"
        " && document.querySelectorAll('[aria-label=\"Answer again\"]').length === count",
        arg=count,
        timeout=90_000,
    )


def shown_question(page) -> str:
    return page.locator(".bubble").first.inner_text()


def test_an_answer_is_asked_for_again_and_an_edited_question_and_all_versions_are_kept(page):
    page.goto("/")
    send(page, "Tell me a long story about a swan.")
    page.wait_for_function("document.querySelector('.said')?.innerText.length > 40", timeout=60_000)
    page.get_by_label("Stop", exact=True).click()
    answered(page)
    first = page.locator(".said").inner_text()
    assert "Stopped" in page.locator(".turn.model .tools").inner_text()

    page.get_by_label("Answer again").click()
    page.get_by_label("Stop", exact=True).wait_for()
    page.get_by_label("Stop", exact=True).click()
    answered(page)
    assert "2/2" in page.locator(".turn.model .tools").inner_text()
    page.get_by_label("Earlier version").click()
    page.locator(".turn.model", has_text="1/2").wait_for()
    assert page.locator(".said").inner_text() == first

    page.locator(".turn.user").hover()
    page.locator(".turn.user").get_by_label("Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit").fill("Name one colour.")
    page.locator(".turn.user").get_by_role("button", name="Send").click()
    page.locator(".bubble", has_text="Name one colour.").wait_for()
    answered(page)
    page.locator(".turn.user").hover()
    page.locator(".turn.user").get_by_label("Earlier version").click()
    page.locator(".bubble", has_text="swan").wait_for()
    page.locator(".turn.model").get_by_label("Earlier version").click()
    page.locator(".turn.model", has_text="1/2").wait_for()
    page.reload()
    page.locator(".said").first.wait_for()
    assert shown_question(page) == "Tell me a long story about a swan."
    assert page.locator(".said").inner_text() == first
    assert "1/2" in page.locator(".turn.user").inner_text()


def test_a_cancelled_edit_leaves_the_question_as_it_was(page, talk):
    page.goto(f"/c/{talk}")
    page.locator(".turn.user").hover()
    page.locator(".turn.user").get_by_label("Edit", exact=True).click()
    page.get_by_role("textbox", name="Edit").fill("Something else")
    page.get_by_role("button", name="Cancel").click()
    page.locator(".bubble").wait_for()
    assert shown_question(page) == "How does one reverse a list?"
    assert "1/2" not in page.locator(".turn.user").inner_text()


def test_what_was_said_and_its_code_are_copied_as_they_were_written(browser, server, talk):
    context = browser.new_context(base_url=server.url, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"/c/{talk}")
    page.locator(".turn.model").get_by_label("Copy", exact=True).click()
    page.wait_for_function(f"navigator.clipboard.readText().then(text => text === {json.dumps(ANSWER)})")
    page.locator(".code-copy").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text === 'words.reverse()\\n')")
    page.locator(".turn.user").hover()
    page.locator(".turn.user").get_by_label("Copy", exact=True).click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text === 'How does one reverse a list?')")
    context.close()


def test_a_conversation_is_renamed_in_the_list_and_in_the_title_and_deleted_for_good(page, home, talk):
    page.goto(f"/c/{talk}")
    entry = page.locator(".talk.here")
    entry.get_by_label("More").click()
    page.locator(".q-menu").wait_for()
    page.wait_for_timeout(400)
    assert page.locator(".q-menu").bounding_box()["width"] < 300
    page.get_by_text("Rename", exact=True).click()
    page.locator(".q-dialog input").fill("Lists & <b>more</b>")
    page.locator(".q-dialog input").press("Enter")
    page.locator(".talk.here", has_text="Lists & <b>more</b>").wait_for()
    page.wait_for_function("document.title === 'Lists & <b>more</b> · Modelworks'")
    page.reload()
    page.locator(".talk.here", has_text="Lists & <b>more</b>").get_by_label("More").click()
    page.get_by_text("Delete", exact=True).click()
    page.get_by_role("button", name="Delete").click()
    page.wait_for_url("**/")
    assert page.locator(".talk", has_text="Lists & <b>more</b>").count() == 0
    page.goto(f"/c/{talk}")
    page.get_by_text("This conversation isn't here").wait_for()


def test_the_model_that_is_picked_answers_and_is_remembered_by_the_conversation(page, home):
    store = Store(home / "models")
    store.add("twin", store.path(MODEL), source="the same file under another name")
    page.goto("/")
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="twin").click()
    send(page, "Name one animal.")
    answered(page)
    assert page.locator(".who").inner_text() == "twin"
    page.wait_for_function("document.title === 'Name one animal. · Modelworks'")
    page.reload()
    page.locator(".picker", has_text="twin").wait_for()
    store.remove("twin")
    page.locator(".picker", has_text=MODEL).wait_for()


@pytest.mark.parametrize("width", [390, 1200])
def test_a_first_conversation_has_the_character_and_the_plain_model_is_one_click_away(browser, tmp_path, home, width):
    own = tmp_path / "home"
    own.mkdir()
    server = RunningServer(own)
    context = browser.new_context(viewport={"width": width, "height": 800}, base_url=server.url)
    page = context.new_page()
    page.goto("/")  # before there is a model
    Store(own / "models").add(MODEL, Store(home / "models").path(MODEL), source="here")
    page.locator(".picker", has_text=f"Character ({MODEL})").wait_for(timeout=300_000)
    send(page, "Who are you?")
    answered(page)
    page.get_by_label("Model", exact=True).click()
    options = page.get_by_role("option")
    assert options.all_inner_texts() == [MODEL, f"Character ({MODEL})"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    options.first.click()
    send(page, "Who are you?")
    answered(page, 2)
    assert page.locator(".who").all_inner_texts() == [CHARACTER, MODEL]
    page.goto("/")
    page.locator(".picker", has_text=MODEL).wait_for()
    assert page.locator(".picker", has_text="Character").count() == 0, "it stays as it was chosen"
    context.close()
    server.end()


def test_a_model_is_removed_and_fetched_again_on_its_page(browser, tmp_path, home):
    own = tmp_path / "home"
    (own / "models").mkdir(parents=True)
    Store(own / "models").add(MODEL, Store(home / "models").path(MODEL), source="here")
    server = RunningServer(own)
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    page.goto("/models")
    chat = page.get_by_role("button", name="Chat with it")
    page.get_by_label(f"Remove {CHARACTER}").wait_for()
    page.get_by_label(f"Remove {MODEL}", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    assert Store(own / "models").list()
    page.get_by_label(f"Remove {MODEL}", exact=True).click()
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="Fetch").wait_for()
    assert [model.name for model in Store(own / "models").list()] == [CHARACTER]
    assert chat.count() == 0, "an adapter alone answers nothing"
    page.get_by_role("button", name="Fetch").click()
    chat.nth(1).wait_for(timeout=300_000)
    chat.first.click()
    page.wait_for_url(f"**/?model={MODEL}")
    send(page, "Name one animal.")
    answered(page)
    context.close()
    server.end()


def test_a_run_is_stopped_and_resumed_on_its_page(page, home, server):
    from modelworks.spec.files import dumps
    from modelworks.web.check import SMALLER
    from modelworks.web.up import first_run_spec

    spec_file = home / "halted.toml"
    spec_file.write_text(dumps(first_run_spec()))
    changed = [*SMALLER, "name=halted", "release.to=[]", "train.tokens=4_000_000"]
    command = [sys.executable, "-m", "modelworks", "train", str(spec_file), *[f"--set={one}" for one in changed]]
    with subprocess.Popen([*command, "--json"], env=server.environment, stdout=subprocess.DEVNULL) as training:
        while not (home / "runs" / "halted" / "run.toml").exists():
            assert training.poll() is None
            time.sleep(0.1)
        page.goto("/runs/halted")
        page.locator(".state.running").wait_for(timeout=60_000)
        page.get_by_role("button", name="Stop").click()
        page.locator(".state.stopped").wait_for(timeout=60_000)
        assert training.wait(30) == 0
    stopped_at = json.loads((home / "runs" / "halted" / "status.json").read_text())["step"]
    page.get_by_role("button", name="Resume").click()
    page.locator(".state.running").wait_for(timeout=180_000)  # a process that loads torch, among others that do
    deadline = time.monotonic() + 60
    while json.loads((home / "runs" / "halted" / "status.json").read_text())["step"] <= stopped_at:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    page.get_by_role("button", name="Stop").click()
    page.locator(".state.stopped").wait_for(timeout=60_000)
    assert {path.name for path in (home / "runs" / "halted" / "checkpoints").iterdir()}


def test_a_long_title_is_cut_so_that_its_menu_stays_in_reach(page, home, talk):
    store = ConversationStore(home / "modelworks.db")
    store.rename(talk, "A title that is far too long for the side of the page and is cut therefore")
    store.close()
    page.goto(f"/c/{talk}")
    side = page.locator(".side").bounding_box()
    for part in (page.locator(".talk.here"), page.locator(".talk.here").get_by_label("More")):
        box = part.bounding_box()
        assert box["x"] + box["width"] <= side["x"] + side["width"]
    assert page.locator(".nav.here").bounding_box()["width"] > 0.8 * side["width"]


def test_keys_move_a_slider_of_the_plan_and_the_answer_follows(page):
    troubles = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto("/plan")
    page.get_by_text("on 1,024 h100-sxm").wait_for()
    page.locator('[aria-label="GPUs"] [tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("on 1,536 h100-sxm").wait_for()
    page.keyboard.press("ArrowRight")
    page.get_by_text("on 2,048 h100-sxm").wait_for()
    page.locator("tr.loss").first.hover()
    assert "of the step" in page.locator(".plan-tip.shown").inner_text()
    chosen = page.locator("tr[data-key]").nth(1)
    layout = chosen.locator("b").inner_text()
    chosen.click()
    page.locator(".answer .lead b", has_text=layout).wait_for()
    assert troubles == []


def test_the_theme_that_was_chosen_is_remembered(page):
    page.goto("/")
    page.get_by_label("Dark or light").click()
    page.wait_for_function("document.body.classList.contains('body--dark')")
    page.reload()
    page.wait_for_function("document.body.classList.contains('body--dark')")


def test_an_answer_cut_short_by_a_kill_is_there_and_goes_on(browser, home, tmp_path):
    other = tmp_path / "home"
    other.mkdir()
    (other / "models").symlink_to(home / "models")
    server = RunningServer(other)
    page = browser.new_page()
    page.goto(server.url)
    send(page, "Tell me a long story about a whale.")
    page.wait_for_function("document.querySelector('.said')?.innerText.length > 80", timeout=60_000)
    page.wait_for_timeout(700)
    server.end(signal.SIGKILL)
    page.close()
    again = RunningServer(other)
    store = ConversationStore(other / "modelworks.db")
    conversation = store.conversations()[0].id
    question, answer = store.thread(conversation)
    assert question.content == "Tell me a long story about a whale."
    assert answer.state == "interrupted"
    assert len(answer.content) > 20
    page = browser.new_page()
    page.goto(f"{again.url}/c/{conversation}")
    page.get_by_label("Go on").click()
    grown = f"document.querySelector('.said')?.innerText.length > {len(answer.content) + 40}"
    page.wait_for_function(grown, timeout=60_000)
    page.get_by_label("Stop", exact=True).click()
    page.get_by_label("Answer again").wait_for()
    page.close()
    assert store.thread(conversation)[-1].content.startswith(answer.content)
    store.close()
    again.end()


def test_a_page_of_another_origin_can_neither_read_the_pages_nor_open_their_websocket(server):
    assert httpx.get(server.url).status_code == 200
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403
    socket_io = f"{server.url}/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    for address, headers in ((socket_io, {}), (socket_io.replace("polling", "websocket"), upgrade)):
        assert httpx.get(address, headers={"Origin": "http://evil.example", **headers}).status_code == 403


def test_another_sites_page_begins_no_conversation_and_no_path_leads_outside(page, server):
    before = httpx.get(f"{server.url}/v1/chats").json()["data"]

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            form = f"<form method=post enctype=text/plain action='{server.url}/v1/chats'>"
            self.wfile.write(f"{form}<input name='{{\"model\":\"x' value='\"}}'></form>".encode())

        def log_message(self, *_):
            """Quiet."""

    evil = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    page.goto(f"http://127.0.0.1:{evil.server_port}/")
    tried = page.evaluate(
        """async (url) => {
          const post = {method: "POST", body: '{"model": "x"}', headers: {"Content-Type": "text/plain"}};
          const told = [];
          for (const options of [post, {...post, mode: "no-cors"}, {...post, credentials: "include"}])
            told.push(await fetch(url + "/v1/chats", options).then((answer) => answer.status, String));
          told.push(await new Promise((done) => {
            const address = url.replace("http", "ws") + "/_nicegui_ws/socket.io/?EIO=4&transport=websocket";
            const socket = new WebSocket(address);
            socket.onopen = () => done("open");
            socket.onerror = () => done("refused");
          }));
          return told;
        }""",
        server.url,
    )
    assert all(told.startswith("TypeError") for told in tried[:3])
    assert tried[3] == "refused"
    page.evaluate("document.forms[0].submit()")
    page.wait_for_url(f"{server.url}/v1/chats")
    assert "may not use this server" in page.content()
    evil.shutdown()
    assert httpx.get(f"{server.url}/v1/chats").json()["data"] == before
    host, port = server.url.removeprefix("http://").split(":")
    for path in (
        "/../etc/passwd",
        "/_modelworks/..%2f..%2fetc%2fpasswd",
        "/_nicegui/x/static/..%2f..%2f..%2fetc%2fpasswd",
    ):
        for climb in (path, path.replace("..%2f", "../"), path.replace("..", "%2e%2e")):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"GET {climb} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while block := connection.recv(1 << 16):
                    answer += block
            assert answer.split()[1] in {b"400", b"404"}
            assert b"root:x:" not in answer


def test_a_page_closed_with_a_question_open_leaves_no_error_behind(browser, home, tmp_path):
    own = tmp_path / "home"
    own.mkdir()
    (own / "models").symlink_to(home / "models")
    server = RunningServer(own)
    page = browser.new_page(base_url=server.url)
    page.goto("/models")
    page.get_by_label(f"Remove {MODEL}", exact=True).click()
    page.get_by_role("button", name="Cancel").wait_for()
    page.close()
    time.sleep(12)  # until the server gives up waiting for the page to come back
    server.end()
    assert "Traceback" not in server.process.stdout.read()


def test_a_second_server_on_one_folder_says_where_the_first_is(server):
    second = server.command("--port", "0", "--no-run")
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 2
    assert server.url in said.replace("\n", "")


def test_a_port_in_use_is_named_in_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {**os.environ, "MODELWORKS_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "modelworks", "up", "--port", str(port), "--no-run"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_runs_page_shows_what_a_training_run_logs(page, home, server):
    from modelworks.spec.files import dumps
    from modelworks.web.check import SMALLER
    from modelworks.web.up import first_run_spec

    spec_file = home / "seen.toml"
    spec_file.write_text(dumps(first_run_spec()))
    overrides = [f"--set={field}" for field in [*SMALLER, "name=seen", "release.to=[]"]]
    command = [sys.executable, "-m", "modelworks", "train", str(spec_file), *overrides, "--json"]
    with subprocess.Popen(command, env=server.environment, stdout=subprocess.PIPE, text=True) as training:
        while not (home / "runs" / "seen" / "run.toml").exists():
            assert training.poll() is None
            time.sleep(0.1)
        page.goto("/runs/seen")
        page.locator(".state.running").wait_for(timeout=60_000)
        assert training.wait(240) == 0
    rows = [json.loads(line) for line in (home / "runs" / "seen" / "metrics.jsonl").read_text().splitlines()]
    page.locator(".state.finished").wait_for(timeout=10_000)
    assert f"{rows[-1]['loss']:,.3f}" in page.locator(".figures").inner_text()
    assert page.locator(".chart canvas").count() >= 5
    assert not page.get_by_text("Reward", exact=True).count()
    with (home / "runs" / "seen" / "metrics.jsonl").open("a") as metrics:  # as a run with rewards logs it
        metrics.write(json.dumps({**rows[-1], "step": rows[-1]["step"] + 1, "reward": 0.5}) + "\n")
    page.get_by_text("Reward", exact=True).wait_for(timeout=60_000)
    page.goto("/runs")
    assert "finished" in page.locator(".run-card", has_text="seen").inner_text()
