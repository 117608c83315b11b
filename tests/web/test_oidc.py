"""Signing in with an OpenID provider: a small real one, with its own keys, and what is refused of it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from joserfc import jwt
from joserfc.jwk import RSAKey

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import plain_client, serving

from modelworks.assistant import oidc as oidc_room
from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.assistant.gateway import AccountAccess
from modelworks.assistant.ledger import Ledger
from modelworks.assistant.oidc import Provider
from modelworks.serve.access import principal_of
from modelworks.serve.api import create_app
from modelworks.serve.config import OidcConfig, ServeConfig, oidc_of
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.web.sign_in import SESSION, SignedIn, oidc_routes, sign_in_routes

CLIENT, SECRET = "modelworks", "a secret of the two"


@dataclass
class World:
    """A provider that knows one person, and what it is told to do wrong."""

    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "first"}))
    issuer: str = ""
    person: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    """What stands in the token instead of what should; None leaves it out."""
    signed_by: RSAKey | bytes | None = None
    """Another key; of bytes, one of HMAC."""
    header: dict[str, Any] = field(default_factory=lambda: {"alg": "RS256", "kid": "first"})
    codes: dict[str, dict[str, str]] = field(default_factory=dict)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/.well-known/openid-configuration")
        def described() -> dict[str, Any]:
            names = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "jwks"}
            return {"issuer": self.issuer} | {name: f"{self.issuer}/{path}" for name, path in names.items()}

        @app.get("/jwks")
        def keys() -> dict[str, Any]:
            return {"keys": [self.key.as_dict(private=False)]}

        @app.get("/authorize")
        def authorize(request: Request) -> RedirectResponse:
            asked = dict(request.query_params)
            assert asked["response_type"] == "code"
            assert asked["client_id"] == CLIENT
            assert asked["code_challenge_method"] == "S256"
            code = secrets.token_urlsafe(16)
            self.codes[code] = asked
            answer = urlencode({"code": code, "state": asked["state"]})
            return RedirectResponse(f"{asked['redirect_uri']}?{answer}")

        @app.post("/token")
        async def token(request: Request) -> JSONResponse:
            given = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
            asked = self.codes.pop(given.get("code", ""), None)
            challenge = hashlib.sha256(given.get("code_verifier", "").encode()).digest()
            basic = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
            right = (
                asked is not None
                and request.headers.get("authorization") == basic
                and asked["redirect_uri"] == given["redirect_uri"]
                and asked["code_challenge"] == letters(challenge).decode()
            )
            if not right or asked is None:
                return JSONResponse({"error": "invalid_grant"}, 400)
            now = int(time.time())
            usual = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 60, "nonce": asked["nonce"]}
            claims = {name: value for name, value in (usual | self.person | self.claims).items() if value is not None}
            if isinstance(self.signed_by, bytes):  # by hand: no library signs with such a key
                parts = b".".join(letters(json.dumps(part).encode()) for part in (self.header, claims))
                signed = (parts + b"." + letters(hmac.digest(self.signed_by, parts, "sha256"))).decode()
            else:
                signed = jwt.encode(self.header, claims, self.signed_by or self.key)
            return JSONResponse({"access_token": "of no use", "token_type": "Bearer", "id_token": signed})

        return app


def letters(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    with serving(world.app()) as address:
        world.issuer = address
        yield world


@pytest.fixture
def place(server: tuple[str, Accounts], world: World) -> tuple[str, Accounts]:
    """The server without a user, and the provider with its one person, doing what it should."""
    for user in server[1].users():
        server[1].remove_user(user.name)
    world.person = {"sub": "248289761001", "preferred_username": "jane", "groups": ["staff", "grok-premium", "ops"]}
    world.claims, world.signed_by, world.header = {}, None, {"alg": "RS256", "kid": "first"}
    return server


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Accounts]]:
    """A server whose pages say who is there, and its accounts."""
    tmp_path = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THE_SECRET", SECRET)
        yield from running(world, tmp_path)


def running(world: World, tmp_path: Path) -> Iterator[tuple[str, Accounts]]:
    config = OidcConfig(
        issuer=world.issuer,
        client_id=CLIENT,
        client_secret_env="THE_SECRET",
        name="Company",
        tiers={"grok-premium": "premium"},
        teams={"research": "research", "staff": "everyone"},
        admins=["root"],
        allowed=["staff"],
    )
    database = Database(tmp_path / "modelworks.db")
    access = AccountAccess(Accounts(database), Ledger(database))
    router = Router(validate(ServeConfig, {"engines": {"a": {"url": "http://127.0.0.1:1/v1"}}}))
    app = create_app(
        router, Store(tmp_path / "models"), access=access, door=lambda inner: SignedIn(inner, access), hosts=["other"]
    )
    app.include_router(sign_in_routes(access, {"Sign in with Company": "/sign-in/oidc"}))
    app.include_router(oidc_routes(access, Provider(config)))

    @app.get("/who")
    def who(request: Request) -> PlainTextResponse:
        principal = principal_of(request)
        assert principal is not None
        return PlainTextResponse(f"{principal.user} {principal.tier.name} {principal.team}")

    with serving(app) as address:
        yield address, access.accounts
    database.close()


def follow(client: httpx.Client, address: str, change: dict[str, str] | None = None) -> httpx.Response:
    """Go to the provider and come back, perhaps with something else than it gave."""
    leaving = client.get(f"{address}/sign-in/oidc?next=/who")
    assert leaving.status_code == 303, leaving.text
    back = client.get(leaving.headers["location"]).headers["location"]
    parts = urlsplit(back)
    given = {name: values[0] for name, values in parse_qs(parts.query).items()} | (change or {})
    return client.get(f"{address}{parts.path}?{urlencode(given)}")


def test_one_comes_back_signed_in_with_the_tier_and_team_of_the_groups(place: tuple[str, Accounts]) -> None:
    address, accounts = place
    with plain_client() as client:
        page = client.get(f"{address}/sign-in")
        assert re.search(r"href='/sign-in/oidc\?next=%2F'>Sign in with Company", page.text)
        answer = follow(client, address)
        assert (answer.status_code, answer.headers["location"]) == (303, "/who")
        assert client.get(f"{address}/who").text == "jane premium everyone"
    user = accounts.user("jane")
    assert not user.admin
    assert not user.has_password
    assert {"add user", "sign in with Company"} <= {row["action"] for row in accounts.audit()}


def test_the_same_person_is_the_same_user_and_changes_with_the_groups(
    place: tuple[str, Accounts], world: World
) -> None:
    address, accounts = place
    with plain_client() as client:
        follow(client, address)
        first = accounts.user("jane").id
        world.person |= {"preferred_username": "jane.married", "groups": ["staff", "root"]}
        follow(client, address)
    assert [(user.id, user.name, user.tier, user.admin) for user in accounts.users()] == [(first, "jane", "free", True)]


def test_a_provider_takes_over_nobodys_account_by_its_name(place: tuple[str, Accounts]) -> None:
    address, accounts = place
    accounts.add_user("Jane", password="correct horse battery", admin=True)
    with plain_client() as client:
        follow(client, address)
        assert client.get(f"{address}/who").text.startswith("jane-2 ")


def test_a_closed_account_and_one_in_no_allowed_group_stay_outside(place: tuple[str, Accounts], world: World) -> None:
    address, accounts = place
    with plain_client() as client:
        follow(client, address)
        accounts.change_user("jane", disabled=True)
        assert follow(client, address).status_code == 403
        world.person |= {"sub": "another", "groups": ["guests"]}
        assert follow(client, address).status_code == 403
    assert len(accounts.users()) == 1


NOW = int(time.time())


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "of another sign-in"},
        {"nonce": None},
        {"aud": "another application"},
        {"aud": None},
        {"aud": [CLIENT, "another"], "azp": "another"},
        {"exp": NOW - 3600},
        {"exp": None},
        {"iss": "https://evil.example"},
        {"nbf": NOW + 3600},
        {"sub": None},
    ],
    ids=range(10),
)
def test_a_token_that_is_not_for_this_sign_in_is_refused(
    place: tuple[str, Accounts], world: World, claims: dict[str, Any]
) -> None:
    world.claims = claims
    refused(place)


def test_a_token_that_somebody_else_has_signed_is_refused(place: tuple[str, Accounts], world: World) -> None:
    world.signed_by = RSAKey.generate_key(2048, {"kid": "first"})
    refused(place)


def test_a_token_signed_with_what_everybody_knows_is_refused(place: tuple[str, Accounts], world: World) -> None:
    # The public key, or the client's secret, taken for a key of HMAC.
    world.header = {"alg": "HS256", "kid": "first"}
    for known in (world.key.as_pem(private=False), SECRET.encode()):
        world.signed_by = known
        refused(place)


def test_a_new_key_of_the_provider_is_fetched(place: tuple[str, Accounts], world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(oidc_room, "_REFETCH_S", 0.0)
    address, _ = place
    before = world.key
    with plain_client() as client:
        follow(client, address)
        world.key = RSAKey.generate_key(2048, {"kid": "second"})
        world.header = {"alg": "RS256", "kid": "second"}
        try:
            assert follow(client, address).status_code == 303
        finally:
            world.key, world.header = before, {"alg": "RS256", "kid": "first"}
        assert follow(client, address).status_code == 303  # and back


@pytest.mark.parametrize(
    "change",
    [{"state": "another"}, {"state": ""}, {"code": "another"}, {"iss": "https://evil.example"}, {"error": "no"}],
    ids=str,
)
def test_an_answer_that_is_not_to_this_browsers_question_is_refused(
    place: tuple[str, Accounts], change: dict[str, str]
) -> None:
    refused(place, change)


def test_another_browser_can_not_bring_the_answer_back(place: tuple[str, Accounts]) -> None:
    address, accounts = place
    with plain_client() as client, plain_client() as other:
        leaving = client.get(f"{address}/sign-in/oidc")
        back = client.get(leaving.headers["location"]).headers["location"]
        assert other.get(back).status_code == 400
        assert SESSION not in other.cookies
        assert client.get(back).status_code == 303
        assert client.get(back).status_code == 400, "an answer counts once"
    assert len(accounts.users()) == 1


def refused(place: tuple[str, Accounts], change: dict[str, str] | None = None) -> None:
    address, accounts = place
    with plain_client() as client:
        answer = follow(client, address, change)
        assert answer.status_code == 400
        assert "begin again" in answer.text
        assert SESSION not in client.cookies
        assert client.get(f"{address}/who").status_code == 401
    assert accounts.users() == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"issuer": "http://id.example.org", "client_id": "x"}, "http on this machine alone"),
        ({"issuer": "https://id.example.org"}, "client_id"),
        ({"issuer": "https://id.example.org", "client_id": "x", "secret": "y"}, "secret"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(values: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        validate(OidcConfig, values, "serve.toml")


def test_the_environment_names_a_provider_where_no_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oidc_of(None) is None
    monkeypatch.setenv("MODELWORKS_OIDC_ISSUER", "https://id.example.org")
    with pytest.raises(InputError, match="client_id"):
        oidc_of(None)
    monkeypatch.setenv("MODELWORKS_OIDC_CLIENT_ID", "modelworks")
    monkeypatch.setenv("MODELWORKS_OIDC_CLIENT_SECRET", SECRET)
    found = oidc_of(None)
    assert found is not None
    assert found.secret == SECRET
