"""The pages in a real browser, on a real server with SmolLM2, as a person would use them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from modelworks.assistant.store import ConversationStore
from modelworks.serve.store import Store
from modelworks.spec.errors import OperationError

CHROMIUM = Path("/usr/bin/chromium")
MODEL = "smollm2-135m"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
pytestmark = [pytest.mark.slow, pytest.mark.browser]


class RunningServer:
    """`modelworks up` in a process of its own."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.process = self.command("--port", "0", "--no-run", *options)
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            try:
                self.url = json.loads((home / "up.json").read_text())["url"]
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except (OSError, ValueError, httpx.HTTPError):
                time.sleep(0.1)

    def command(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "modelworks", "up", *options]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self, with_signal: int = signal.SIGTERM) -> int:
        self.process.send_signal(with_signal)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    try:
        Store(home / "models").pull(MODEL)
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched here: {error}")
    return home


@pytest.fixture(scope="module")
def server(home):
    server = RunningServer(home)
    yield server
    server.end()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=server.url)
    yield context.new_page()
    context.close()


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


def test_hostile_words_of_a_model_do_nothing(page, home):
    store = ConversationStore(home / "modelworks.db")
    conversation = store.create(MODEL)
    attack = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    question = store.add(conversation.id, "user", attack, None)
    store.add(conversation.id, "assistant", f"{attack}\n\n[x](javascript:document.title='hacked')", question.id, MODEL)
    store.rename(conversation.id, attack)
    store.close()
    page.goto(f"/c/{conversation.id}")
    page.locator(".said").first.wait_for()
    page.wait_for_timeout(500)
    assert "onerror" in page.locator(".said").first.inner_text()
    assert page.locator(".chat img, .chat script, .talk img, .said a").count() == 0
    assert page.evaluate("document.title") != "hacked"


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
    for path in ("/", "/runs", "/models"):
        page.goto(path)
        page.get_by_label("Menu").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.wait_for_timeout(300)
    assert page.evaluate("document.body.classList.contains('body--dark')")
    page.get_by_label("Menu").click()
    page.get_by_text("New chat").wait_for()
    context.close()


def test_the_theme_that_was_chosen_is_remembered(page):
    page.goto("/")
    page.get_by_label("Dark or light").click()
    page.wait_for_function("document.body.classList.contains('body--dark')")
    page.reload()
    page.wait_for_function("document.body.classList.contains('body--dark')")


def test_a_kill_in_mid_answer_leaves_the_conversation_and_marks_the_answer(browser, home, tmp_path):
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
    question, answer = store.thread(store.conversations()[0].id)
    store.close()
    again.end()
    assert question.content == "Tell me a long story about a whale."
    assert answer.state == "interrupted"
    assert len(answer.content) > 20


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
        assert training.wait(90) == 0
    rows = [json.loads(line) for line in (home / "runs" / "seen" / "metrics.jsonl").read_text().splitlines()]
    page.locator(".state.finished").wait_for(timeout=10_000)
    assert f"{rows[-1]['loss']:,.3f}" in page.locator(".figures").inner_text()
    assert page.locator(".chart canvas").count() >= 5
    page.goto("/runs")
    assert "finished" in page.locator(".run-card", has_text="seen").inner_text()
