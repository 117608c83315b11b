"""Who is at the pages: the sign-in, the session's cookie, and the door that asks for it.

With users, every page and every websocket needs a session; the API keeps asking for keys. A session is a key that ends
after twelve hours, in a cookie that scripts can't read and other sites can't send. The sign-in page is plain HTML, so
that nothing of the application runs before one is known.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import html
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import APIRouter, Request, Response
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelworks import __version__
from modelworks.assistant.accounts import SIGN_IN_S
from modelworks.assistant.gateway import AccountAccess
from modelworks.assistant.oidc import LASTS_S, Errand, Provider
from modelworks.serve.access import Principal, address_of
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.language import COOKIE, LANGUAGES, language_of, say

_LOG = logging.getLogger("modelworks.accounts")
OIDC_PATH = "/sign-in/oidc"
SESSION, FORM = "modelworks_session", "modelworks_form"
OPEN_PAGES = ("/sign-in", "/_modelworks/", "/favicon.ico")
"""What is there for somebody who has not signed in."""
SHARED_PAGES = "/s/"
"""What everybody may read who has a link; it takes nothing."""
ADMIN_PAGES = ("/admin", "/runs", "/models")
"""What changes the machine for everyone, and so is for administrators."""
_API = ("/v1", "/metrics", "/health", "/openapi.json")
LOOK_AGAIN_S = 10.0
"""How often an open page's session is looked at; one that was ended or revoked closes its websocket."""
_FORM_BYTES = 16 << 10
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with none, browsers say that the form comes from nowhere
    "X-Content-Type-Options": "nosniff",
}


class SignedIn:
    """Lets those in to the pages who have signed in; the others are sent to the sign-in, or get 401.

    Parameters
    ----------
    app
        The application behind it. Requests of its API pass: they are judged by their keys.
    access : AccountAccess
        Who knows the sessions.
    """

    def __init__(self, app: ASGIApp, access: AccountAccess) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or turn it away."""
        if scope["type"] not in {"http", "websocket"} or _is_under(scope["path"], _API):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if _is_under(scope["path"], OPEN_PAGES) or _is_shared(scope):
            state["admitted"] = True
            await self._app(scope, receive, send)
            return
        try:
            principal = await self._principal(scope)
        except (RequestError, OperationError) as error:
            await _turn_away(scope, receive, send, error)
            return
        if _is_under(scope["path"], ADMIN_PAGES) and "admin" not in principal.scopes:
            await _refused(language_of(HTTPConnection(scope)))(scope, receive, send)
            return
        state["principal"], state["admitted"] = principal, True
        if scope["type"] == "websocket":
            receive = self._watched(receive, principal)
        await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        key = session_of(scope)
        if not key:
            raise RequestError("sign in first", status=401)
        client = scope.get("client")
        return await self._access.authenticate(key, client[0] if client else "unknown")

    def _watched(self, receive: Receive, principal: Principal) -> Receive:
        """The same messages, until the session ends."""
        looked = time.monotonic()

        async def watched() -> Message:
            nonlocal looked
            message = await receive()
            if message["type"] == "websocket.receive" and time.monotonic() - looked > LOOK_AGAIN_S:
                looked = time.monotonic()
                try:
                    now = await asyncio.to_thread(self._access.accounts.still, principal.key_id)
                    ended = not principal.scopes <= now.scopes  # such as an administrator who is none any more
                except RequestError:
                    ended = True
                except OperationError:
                    ended = False  # a database that is away for a moment ends no session
                if ended:
                    return {"type": "websocket.disconnect", "code": 1008, "reason": "the sign-in has ended"}
            return message

        return watched


def session_of(scope: Scope) -> str:
    """The session's key in a request's cookies; empty if there is none."""
    return HTTPConnection(scope).cookies.get(cookie_name(scope), "")


def is_secure(scope: Scope) -> bool:
    """Whether the browser came over TLS; a proxy says so with ``X-Forwarded-Proto``, if uvicorn trusts it."""
    return scope.get("scheme") in {"https", "wss"}


def cookie_name(scope: Scope) -> str:
    """The session cookie's name; over TLS one that no other host and no unprotected page can set (RFC 6265bis)."""
    return f"__Host-{SESSION}" if is_secure(scope) else SESSION


def begin_session(response: Response, request: Request, key: str) -> None:
    """Have the browser keep a session."""
    response.set_cookie(
        cookie_name(request.scope),
        key,
        max_age=int(SIGN_IN_S),
        **_guarded(request.scope),
    )


def _guarded(scope: Scope) -> dict[str, Any]:
    """How a cookie is kept from scripts, from other sites, and over TLS from whoever listens."""
    return {"path": "/", "secure": is_secure(scope), "httponly": True, "samesite": "lax"}


def sign_in_routes(access: AccountAccess, others: Mapping[str, str] | None = None) -> APIRouter:
    """The sign-in page, what it sends, and the sign-out.

    Parameters
    ----------
    access : AccountAccess
        Who knows names and passwords.
    others : mapping, optional
        Other ways to sign in, as names of links and their paths.
    """
    routes, accounts = APIRouter(include_in_schema=False), access.accounts
    links = dict(others or {})

    @routes.get("/sign-in")
    async def sign_in_page(request: Request) -> Response:
        target = target_of(request.query_params.get("next", ""))
        chosen = request.query_params.get("language", "")
        if chosen not in LANGUAGES:
            return _page(request, links, target)
        response = RedirectResponse(f"/sign-in?next={quote(target, safe='')}", 303)
        response.set_cookie(COOKIE, chosen, max_age=31536000, path="/", samesite="lax")
        return response

    @routes.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        given, language = await _form(request), language_of(request)
        target = target_of(given.get("next", ""))
        token = request.cookies.get(FORM, "")
        if not token or not hmac.compare_digest(token.encode(), given.get("form", "").encode()):
            return _page(request, links, target, say("The form was too old. Try again.", to=language), 403)
        name, password = given.get("user", ""), given.get("password", "")
        try:
            _, key = await asyncio.to_thread(accounts.sign_in, name, password, address_of(request))
        except RequestError as error:
            return _page(request, links, target, _sentence(error, language), error.status, error.retry_after_s)
        except OperationError as error:
            _LOG.error("%s", error)
            return _page(request, links, target, say("The accounts can't be reached now.", to=language), 503)
        response = RedirectResponse(target, 303, headers={"Cache-Control": "no-store"})
        begin_session(response, request, key)
        response.delete_cookie(FORM, path="/sign-in")
        return response

    @routes.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        principal: Principal = request.scope["state"]["principal"]
        await asyncio.to_thread(accounts.revoke_key, principal.key_id, user_id=principal.user_id, actor=principal.user)
        response = RedirectResponse("/sign-in", 303, headers={"Cache-Control": "no-store"})
        response.delete_cookie(cookie_name(request.scope), **_guarded(request.scope))
        return response

    return routes


def oidc_routes(access: AccountAccess, provider: Provider) -> APIRouter:
    """The way to an OpenID provider and back."""
    routes, accounts = APIRouter(include_in_schema=False), access.accounts

    def redirect_of(request: Request) -> str:
        base = provider.config.public_url or f"{request.url.scheme}://{request.url.netloc}"
        return f"{base.rstrip('/')}{OIDC_PATH}/return"

    @routes.get(OIDC_PATH)
    async def leave(request: Request) -> Response:
        target = target_of(request.query_params.get("next", ""))
        try:
            address, errand = await provider.begin(redirect_of(request), target)
        except OperationError as error:
            return refusal_page(request, str(error), 502)
        response = RedirectResponse(address, 303, headers={"Cache-Control": "no-store"})
        response.set_cookie(
            _errand_name(request.scope),
            base64.urlsafe_b64encode(json.dumps(vars(errand)).encode()).decode(),
            max_age=int(LASTS_S),
            **_guarded(request.scope),
        )
        return response

    @routes.get(f"{OIDC_PATH}/return")
    async def come_back(request: Request) -> Response:
        errand = _errand_of(request)
        try:
            identity = await provider.end(redirect_of(request), errand, dict(request.query_params))
            user = await asyncio.to_thread(accounts.identified, identity, provider.config.name[:64])
            key = await asyncio.to_thread(accounts.sign_in_as, user, provider.config.name)
        except RequestError as error:
            response = refusal_page(request, str(error), error.status)
        except (InputError, OperationError) as error:
            _LOG.error("%s", error)
            reason = say("The sign-in doesn't work now; the server's log says why.", to=language_of(request))
            response = refusal_page(request, reason, 502)
        else:
            assert errand is not None
            response = RedirectResponse(target_of(errand.target), 303, headers={"Cache-Control": "no-store"})
            begin_session(response, request, key)
        response.delete_cookie(_errand_name(request.scope), **_guarded(request.scope))
        return response

    return routes


def _errand_name(scope: Scope) -> str:
    return "__Host-modelworks_oidc" if is_secure(scope) else "modelworks_oidc"


def _errand_of(request: Request) -> Errand | None:
    """What the browser has brought back from the provider; None if it isn't whole."""
    try:
        values = json.loads(base64.urlsafe_b64decode(request.cookies.get(_errand_name(request.scope), "")))
        state, nonce, verifier, target = (str(values[name]) for name in ("state", "nonce", "verifier", "target"))
        return Errand(state, nonce, verifier, target, float(values["began"])) if state and nonce and verifier else None
    except (ValueError, KeyError, TypeError):
        return None


def target_of(given: str) -> str:
    """Where to go after the sign-in: a path of this server, whatever was asked for."""
    parts = urlsplit(given)
    plain = given.isprintable() and "\\" not in given and not parts.scheme and not parts.netloc
    if not plain or not given.startswith("/") or given.startswith("//") or _is_under(given, ("/sign-in", "/sign-out")):
        return "/"
    return given


def refusal_page(request: Request, message: str, status: int) -> Response:
    """A page that says why nobody was let in."""
    language = language_of(request)
    text = f"""<h1>{say("Not signed in", to=language)}</h1><p role='alert' class='wrong'>{html.escape(message)}</p>
<p><a href='/sign-in'>{say("Back to the sign-in", to=language)}</a></p>"""
    return HTMLResponse(_document(text, language), status, _HEADERS)


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _FORM_BYTES:
            return {}
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=8)
    except ValueError:
        return {}
    return {name: values[0] for name, values in fields.items()}


def _page(
    request: Request,
    links: Mapping[str, str],
    target: str,
    wrong: str = "",
    status: int = 200,
    retry_after_s: float | None = None,
) -> Response:
    language = language_of(request)
    token = request.cookies.get(FORM, "") or secrets.token_urlsafe(24)
    said = f"<p role='alert' class='wrong'>{html.escape(wrong)}</p>" if wrong else ""
    others = "".join(
        f"<a class='other' href='{html.escape(path)}?next={quote(target, safe='')}'>{html.escape(name)}</a>"
        for name, path in links.items()
    )
    sign_in = say("Sign in", to=language)
    ways = "".join(
        f"<a lang='{code}' href='/sign-in?language={code}&amp;next={quote(target, safe='')}'>{name}</a>"
        for code, name in LANGUAGES.items()
        if code != language
    )
    text = f"""<h1>{sign_in}</h1>{said}
<form method="post" action="/sign-in">
<input type="hidden" name="form" value="{html.escape(token)}">
<input type="hidden" name="next" value="{html.escape(target)}">
<label>{say("Name", to=language)}<input name="user" autocomplete="username" maxlength="64" required autofocus></label>
<label>{say("Password", to=language)}<input name="password" type="password" autocomplete="current-password"
 maxlength="256" required></label>
<button type="submit">{sign_in}</button>
</form>{others}<p class="languages">{ways}</p>"""
    headers = dict(_HEADERS)
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    theme = {"dark": "body--dark", "light": "light"}.get(request.cookies.get("modelworks_theme", ""), "auto")
    response = HTMLResponse(_document(text, language, theme), status, headers)
    response.set_cookie(
        FORM, token, max_age=3600, path="/sign-in", secure=is_secure(request.scope), httponly=True, samesite="strict"
    )
    return response


def _document(content: str, language: str, theme: str = "auto") -> str:
    from modelworks.web.frame import LOGO

    return f"""<!doctype html><html lang="{language}"><head><meta charset="utf-8">
<title>{say("Sign in", to=language)} · Modelworks</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><link rel="stylesheet" href="/_modelworks/{__version__}/style.css">
</head><body class="sign-in {theme}"><main><div class="brand">{LOGO}<span>Modelworks</span></div>{content}</main>
</body></html>"""


def _sentence(error: RequestError, language: str) -> str:
    if error.status == 429 and error.retry_after_s is not None:
        wait = math.ceil(error.retry_after_s)
        return say("There were too many wrong attempts. Try again in {seconds} s.", to=language, seconds=wait)
    return say("The name or the password is wrong.", to=language) if error.status == 401 else str(error)


def _refused(language: str) -> Response:
    text = f"""<h1>{say("Not for you", to=language)}</h1><p>{say("This page is for administrators.", to=language)}</p>
<p><a href='/'>{say("To the chat", to=language)}</a></p>"""
    return HTMLResponse(_document(text, language), 403, _HEADERS)


async def _turn_away(scope: Scope, receive: Receive, send: Send, error: InputError | OperationError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": "sign in first"})
        return
    request = Request(scope)
    status = error.status if isinstance(error, RequestError) else 503
    if request.method in {"GET", "HEAD"} and "text/html" in request.headers.get("accept", "") and status != 503:
        query = f"?{request.url.query}" if request.url.query else ""
        target = quote(request.url.path + query, safe="")
        response: Response = RedirectResponse(f"/sign-in?next={target}", 303, headers={"Cache-Control": "no-store"})
    else:
        response = PlainTextResponse("sign in first\n" if status != 503 else "the accounts can't be reached\n", status)
    await response(scope, receive, send)


def _is_shared(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] in {"GET", "HEAD"} and _is_under(scope["path"], (SHARED_PAGES,))


def _is_under(path: str, starts: tuple[str, ...]) -> bool:
    path = path.partition("?")[0]
    return any(path == start or path.startswith(start if start.endswith("/") else f"{start}/") for start in starts)
