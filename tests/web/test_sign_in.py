"""The pages with users: who is asked for, whose conversations are shown, and what an administrator sees and does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))
from gateways import HELLO, Stub, plain_client
from started import address_of, hindrances

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.assistant.store import ConversationStore
from modelworks.web.admin import usage_chart
from modelworks.web.sign_in import FORM, SESSION, target_of

PASSWORD = "correct horse battery"
PAGES = ("/", "/plan", "/supercomputer", "/runs", "/models", "/admin", "/c/whatever")


class Place:
    """`modelworks up` with users, over a stub engine, in a process of its own."""

    def __init__(self, home: Path, stub: Stub) -> None:
        self.file = home / "modelworks.db"
        self.accounts = Accounts(Database(self.file))
        self.accounts.set_tier("small", ["models=['stub']", "messages=3", "parallel=8"])
        self.accounts.add_user("root", admin=True, password=PASSWORD, tier="premium+")
        self.accounts.add_user("alice", password=PASSWORD, tier="premium+")
        self.accounts.add_user("bob", password=PASSWORD, tier="small")
        (home / "serve.toml").write_text(
            f'[engines.a]\nurl = "{stub.url}"\n[models.stub]\nprice = {{ read = 2.0, written = 1e6 }}\n'
        )
        environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment.pop("MODELWORKS_DATABASE", None)
        command = [sys.executable, "-m", "modelworks", "up", "--host", "0.0.0.0", "--port", "0", "--no-run"]
        self.process = subprocess.Popen(
            [*command, "--config", str(home / "serve.toml")], env=environment, stdout=subprocess.PIPE, text=True
        )
        self.url = address_of(self.process, home)

    @contextlib.contextmanager
    def client(self, name: str | None = None, password: str = PASSWORD) -> Iterator[httpx.Client]:
        """A browser's worth of cookies; signed in if a name is given."""
        with plain_client(base_url=self.url, headers={"Accept": "text/html"}) as client:
            if name is not None:
                assert sign_in(client, name, password).status_code == 303
            yield client

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.accounts.database.close()


def sign_in(client: httpx.Client, name: str, password: str, target: str = "/") -> httpx.Response:
    form = re.search(r'name="form" value="([^"]+)"', client.get("/sign-in").text)
    assert form is not None
    return client.post("/sign-in", data={"form": form[1], "next": target, "user": name, "password": password})


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub("stub", "hidden")
    yield stub
    stub.end()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, stub: Stub) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("home"), stub)
    yield place
    place.end()


def test_every_page_sends_a_stranger_to_the_sign_in_and_nothing_else_is_given(place: Place) -> None:
    with place.client() as client:
        for path in PAGES:
            answer = client.get(path)
            assert (answer.status_code, answer.headers["location"][:14]) == (303, "/sign-in?next="), path
        for path in ("/_nicegui/anything.js", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/sign-out"):
            assert client.get(path, headers={"Accept": "*/*"}).status_code == 401, path
        assert client.post("/sign-out").status_code == 401
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200


def test_a_shared_conversation_is_for_everybody_and_nothing_else_of_its_owner(place: Place) -> None:
    store = ConversationStore(place.file)
    own = store.of(place.accounts.user("alice").id)
    chat = own.create("stub")
    first = own.add(chat.id, "user", "<script>alert(1)</script> what is said", None)
    share = own.shares.create(chat.id)
    own.add(chat.id, "assistant", "an afterthought", first.id, "stub")
    with place.client() as client:
        page = client.get(share.path)
        assert page.status_code == 200
        assert "&lt;script&gt;alert(1)&lt;/script&gt; what is said" in page.text
        assert not [word for word in ("<script", "afterthought", "alice", chat.id) if word in page.text]
        assert "noindex" in page.headers["x-robots-tag"]
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for path in ("/s/", "/s/nothing", f"{share.path}/more", f"{share.path}x", "/s/../admin"):
            assert client.get(path).status_code in {303, 404}, path
            assert "what is said" not in client.get(path).text
        for path in (f"/c/{chat.id}", f"/c/{chat.id}/export/json", "/s", "/share"):
            assert client.get(path).status_code in {303, 404}, path
        assert client.post(share.path, headers={"Accept": "*/*"}).status_code == 401
    with place.client("bob") as client:
        assert client.get(f"/c/{chat.id}/export/json").status_code == 404
    with place.client("alice") as client:
        assert "an afterthought" in client.get(f"/c/{chat.id}/export/json").text
    own.shares.revoke(share.id)
    with place.client() as client:
        gone = client.get(share.path, headers={"Accept-Language": "pl"})
        assert (gone.status_code, 'lang="pl"' in gone.text, "Niczego tu nie ma" in gone.text) == (404, True, True)
    store.close()


def test_a_session_opens_the_pages_and_not_the_api_and_ends_with_the_sign_out(place: Place) -> None:
    with place.client() as client:
        answer = sign_in(client, "alice", PASSWORD, "/plan?gpus=8")
        assert answer.headers["location"] == "/plan?gpus=8"
        cookie = next(value for value in answer.headers.get_list("set-cookie") if value.startswith(f"{SESSION}="))
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert "Secure" not in cookie
        assert client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 401
        kept = client.cookies[SESSION]
        assert client.post("/sign-out").headers["location"] == "/sign-in"
        assert SESSION not in client.cookies
        assert client.get("/", headers={"Cookie": f"{SESSION}={kept}"}).status_code == 303


def test_behind_tls_the_cookie_is_never_sent_without_it(place: Place) -> None:
    with place.client() as client:
        page = client.get("/sign-in", headers={"X-Forwarded-Proto": "https"})
        form = re.search(r'name="form" value="([^"]+)"', page.text)
        assert form is not None
        answer = client.post(
            "/sign-in",
            data={"form": form[1], "user": "alice", "password": PASSWORD},
            headers={"X-Forwarded-Proto": "https", "Cookie": f"{FORM}={form[1]}"},
        )
        cookies = answer.headers.get_list("set-cookie")
        assert any(value.startswith(f"__Host-{SESSION}=") and "Secure" in value for value in cookies)


def test_a_form_that_this_server_did_not_give_signs_nobody_in(place: Place) -> None:
    given = {"user": "alice", "password": PASSWORD}
    with place.client() as client:
        assert client.post("/sign-in", data=given).status_code == 403
        assert client.post("/sign-in", data=given | {"form": ""}).status_code == 403
        client.get("/sign-in")
        assert client.post("/sign-in", data=given | {"form": "of-another-site"}).status_code == 403
        form = client.cookies[FORM]
        other = {"Origin": "https://evil.example"}
        assert client.post("/sign-in", data=given | {"form": form}, headers=other).status_code == 403
        assert SESSION not in client.cookies


def test_wrong_passwords_make_one_wait_on_the_page_as_at_the_api(place: Place) -> None:
    place.accounts.add_user("mallory", password=PASSWORD)
    with place.client() as client:
        answers = [sign_in(client, "mallory", f"guess number {number}") for number in range(7)]
        assert [answer.status_code for answer in answers[:5]] == [401] * 5
        assert "The name or the password is wrong" in answers[0].text
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        login = client.post("/v1/account/login", json={"user": "mallory", "password": PASSWORD})
        assert login.status_code == 429


@pytest.mark.parametrize(
    "given", ["//evil.example", "https://evil.example/", "/\\evil.example", "evil", "/sign-in?next=/", "", "/\n/evil"]
)
def test_the_way_back_leads_nowhere_else(given: str) -> None:
    assert target_of(given) == "/"


def test_the_sign_in_speaks_the_browsers_language_until_another_is_chosen(place: Place) -> None:
    with place.client() as client:
        polish = client.get("/sign-in?next=/plan", headers={"Accept-Language": "pl"}).text
        assert '<html lang="pl">' in polish
        assert "Hasło" in polish
        assert "/sign-in?language=en&amp;next=%2Fplan" in polish
        chosen = client.get("/sign-in?language=en&next=//evil.example", headers={"Accept-Language": "pl"})
        assert (chosen.status_code, chosen.headers["location"]) == (303, "/sign-in?next=%2F")
        english = client.get("/sign-in", headers={"Accept-Language": "pl"}).text
        assert '<html lang="en">' in english
        assert "Password" in english


def test_what_changes_the_machine_is_for_administrators(place: Place) -> None:
    with place.client("bob") as bob, place.client("root") as root:
        for path in ("/runs", "/models", "/admin"):
            assert bob.get(path).status_code == 403, path
            assert root.get(path).status_code == 200, path
        assert bob.get("/plan").status_code == 200


def test_a_closed_account_and_a_new_password_end_the_sessions(place: Place) -> None:
    place.accounts.add_user("carol", password=PASSWORD)
    with place.client("carol") as client:
        place.accounts.set_password("carol", "another long password")
        assert client.get("/").status_code == 303
    with place.client("carol", "another long password") as client:
        assert client.get("/").status_code == 200
        place.accounts.change_user("carol", disabled=True)
        assert client.get("/").status_code == 303


def test_one_users_conversation_is_not_there_for_another(place: Place) -> None:
    store = ConversationStore(place.file)
    owners = {name: place.accounts.user(name).id for name in ("alice", "bob")}
    hers = store.of(owners["alice"])
    talk = hers.create("stub")
    hers.add(talk.id, "user", "alice's secret plan", None)
    with place.client("alice") as alice, place.client("bob") as bob:
        assert "secret plan" in alice.get(f"/c/{talk.id}").text
        for path in ("/", f"/c/{talk.id}", "/plan"):
            assert "secret plan" not in bob.get(path).text, path
        assert "This conversation isn" in bob.get(f"/c/{talk.id}").text
    store.close()


def test_a_chart_of_usage_shows_every_token_once() -> None:
    rows: list[dict[str, Any]] = [
        {"day": day, "user": f"user {number}", "requests": 1, "tokens": 10 * number + day}
        for day in (100, 101)
        for number in range(10)
    ]
    chart = usage_chart(rows, 101, 3)
    assert len(chart["series"]) == 8
    assert sum(sum(series["data"]) for series in chart["series"]) == sum(row["tokens"] for row in rows)
    assert chart["series"][0]["name"] == "user 9"
    assert [series["data"][0] for series in chart["series"]] == [0] * 8


# --- in a real browser


def enter(browser: Any, place: Place, name: str, target: str = "/", **options: Any) -> Any:
    """A page of a browser in which somebody has signed in."""
    page = browser.new_context(base_url=place.url, **options).new_page()
    page.goto(target)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for(state="attached")
    return page


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sign_in_and_the_administration_hinder_nobody(browser: Any, place: Place, scheme: str) -> None:
    page = browser.new_context(base_url=place.url, color_scheme=scheme).new_page()
    page.goto("/sign-in")
    assert hindrances(page) == []
    page = enter(browser, place, "root", "/admin", color_scheme=scheme)
    page.locator(".sections").wait_for()
    assert hindrances(page) == []


@pytest.mark.slow
@pytest.mark.browser
def test_two_people_sign_in_talk_and_see_their_own_talks_alone(browser: Any, place: Place) -> None:
    place.accounts.add_user("dora", password=PASSWORD, tier="small")
    bob, dora = enter(browser, place, "bob"), enter(browser, place, "dora", "/plan")
    assert dora.url.endswith("/plan")
    bob.get_by_label("Message", exact=True).fill("bob asks about whales")
    bob.get_by_label("Message", exact=True).press("Enter")
    bob.get_by_label("Answer again").wait_for()
    assert bob.locator(".said").first.inner_text()
    assert "/c/" in bob.url
    dora.goto(bob.url.removeprefix(place.url))
    dora.get_by_text("This conversation isn't here").wait_for()
    assert "whales" not in dora.content()
    used = place.accounts.database
    with used.read() as session:
        from modelworks.assistant.tables import UsageRow

        assert {row.model for row in session.query(UsageRow)} == {"stub"}
    for word in ("second", "third"):
        bob.get_by_label("Message", exact=True).fill(f"the {word} question")
        bob.get_by_label("Message", exact=True).press("Enter")
        bob.get_by_label("Answer again").nth(1 if word == "second" else 2).wait_for()
    bob.get_by_label("Message", exact=True).fill("one too many")
    bob.get_by_label("Message", exact=True).press("Enter")
    bob.get_by_text("the tier small allows 3 answers").wait_for()
    bob.get_by_role("button", name="Sign out").click()
    bob.wait_for_url("**/sign-in")
    bob.goto("/")
    assert "/sign-in" in bob.url
    bob.context.close()
    dora.context.close()


@pytest.mark.slow
@pytest.mark.browser
def test_an_administrator_adds_a_user_revokes_a_key_and_finds_both_in_the_audit_log(browser: Any, place: Place) -> None:
    key, whole = place.accounts.create_key("alice", "to be revoked")
    page = enter(browser, place, "root", "/admin", viewport={"width": 1200, "height": 800})
    page.get_by_role("button", name="Add a user").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("eve")
    dialog.get_by_label("Password, of").fill(PASSWORD)
    dialog.get_by_role("button", name="Add").click()
    page.locator("td", has_text="eve").first.wait_for()
    assert place.accounts.user("eve").has_password
    page.get_by_role("tab", name="Keys").click()
    page.locator("tr", has_text=key.prefix).get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    page.locator("tr", has_text=key.prefix).get_by_text("was revoked").wait_for()
    assert httpx.get(f"{place.url}/v1/models", headers={"Authorization": f"Bearer {whole}"}).status_code == 401
    asked = {"model": "stub", "messages": HELLO, "max_tokens": 3}
    key_of_root = {"Authorization": f"Bearer {place.accounts.create_key('root')[1]}"}
    httpx.post(f"{place.url}/v1/chat/completions", headers=key_of_root, json=asked).raise_for_status()
    page.get_by_role("tab", name="Models").click()
    page.locator("tr", has_text="$2.00").get_by_text("$1,000,000.00").wait_for()
    page.get_by_role("tab", name="Usage").click()
    page.locator("tr", has_text="root").get_by_text("$3.00").wait_for()
    page.get_by_role("tab", name="Engines").click()
    page.locator("tr", has_text="a").get_by_text("well").wait_for()
    page.get_by_role("tab", name="Audit log").click()
    page.locator("tr", has_text="revoke key").first.wait_for()
    done = {(row["actor"], row["action"]) for row in place.accounts.audit()}
    assert {("root", "add user"), ("root", "revoke key")} <= done
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # One who is an administrator no longer changes nothing more, on a page that is still open.
    place.accounts.add_user("second", admin=True)
    place.accounts.change_user("root", admin=False)
    page.set_viewport_size({"width": 1200, "height": 800})
    page.get_by_role("tab", name="Users").click()
    page.locator("tr", has_text="eve").get_by_role("button", name="Close").click()
    page.get_by_text("you are no longer an administrator").wait_for()
    assert not place.accounts.user("eve").disabled
    place.accounts.change_user("root", admin=True)
    page.context.close()
