"""Signing in with an OpenID provider: the authorization code flow with PKCE (OpenID Connect Core 1.0, RFC 7636).

Authlib speaks with the provider and judges the token's claims, joserfc its signature. What a browser has to bring back
(state, nonce, verifier) is in a cookie of its own, so that any server of several can take it up.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass
from typing import Any

from authlib.common.security import generate_token
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from modelworks.assistant.accounts import Identity
from modelworks.serve.config import OidcConfig
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import OperationError

_LOG = logging.getLogger("modelworks.accounts")
ALGORITHMS = ["RS256", "PS256", "ES256", "RS384", "RS512", "ES384", "ES512", "EdDSA"]
"""Signatures with a public key alone: what can be checked with this server's secret could be made with it."""
LASTS_S = 600.0
"""How long one may take at the provider."""
_LEEWAY_S = 30
_WAIT_S = 10.0
_FRESH_S = 3600.0
_REFETCH_S = 10.0


@dataclass(frozen=True)
class Errand:
    """What a browser takes with it to the provider and brings back."""

    state: str
    nonce: str
    verifier: str
    target: str
    """Where to go after the sign-in."""
    began: float


class Provider:
    """One OpenID provider.

    Parameters
    ----------
    config : OidcConfig
        Where it is, and what its words mean.
    """

    def __init__(self, config: OidcConfig) -> None:
        self.config = config
        self._secret = config.secret
        self._metadata: tuple[float, dict[str, Any]] | None = None
        self._keys: tuple[float, KeySet] | None = None
        self._asking = asyncio.Lock()

    def _client(self, redirect: str = "") -> AsyncOAuth2Client:
        return AsyncOAuth2Client(
            client_id=self.config.client_id,
            client_secret=self._secret,
            token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
            scope=self.config.scopes,
            redirect_uri=redirect,
            code_challenge_method="S256",
            timeout=_WAIT_S,
            follow_redirects=False,
        )

    async def begin(self, redirect: str, target: str) -> tuple[str, Errand]:
        """The provider's address to send a browser to, and what it takes with it.

        Parameters
        ----------
        redirect : str
            Where the provider sends it back to.
        target : str
            Where it goes after that.

        Raises
        ------
        OperationError
            If the provider can't be reached.
        """
        metadata = await self._described()
        errand = Errand(generate_token(32), generate_token(32), generate_token(64), target, time.time())
        async with self._client(redirect) as client:
            address, _ = client.create_authorization_url(
                metadata["authorization_endpoint"],
                state=errand.state,
                nonce=errand.nonce,
                code_verifier=errand.verifier,
            )
        return str(address), errand

    async def end(self, redirect: str, errand: Errand | None, answer: dict[str, str]) -> Identity:
        """Who has come back from the provider.

        Parameters
        ----------
        redirect : str
            As for `begin`.
        errand : Errand or None
            What the browser has brought back.
        answer : dict
            The parameters that the provider has sent it with.

        Raises
        ------
        RequestError
            400 or 403, if anything is not as it has to be; why is the log's.
        OperationError
            If the provider can't be reached.
        """
        if errand is None or time.time() - errand.began > LASTS_S:
            raise RequestError("the sign-in took too long; begin again", status=400, code="sign_in_too_old")
        if not hmac.compare_digest(answer.get("state", "").encode(), errand.state.encode()):
            raise _distrusted("the state is another one")
        if answer.get("iss", self.config.issuer) != self.config.issuer:  # RFC 9207
            raise _distrusted("the answer is another provider's")
        if "error" in answer or "code" not in answer:
            raise _distrusted(f"the provider refused: {answer.get('error', 'no code')[:80]}")
        token = await self._exchanged(redirect, errand, answer["code"])
        return self._identity(await self._claims(token, errand.nonce))

    async def _exchanged(self, redirect: str, errand: Errand, code: str) -> dict[str, Any]:
        metadata = await self._described()
        try:
            async with self._client(redirect) as client:
                token = await client.fetch_token(
                    metadata["token_endpoint"],
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=errand.verifier,
                )
        except OAuthError as error:
            raise _distrusted(f"the code was refused: {error.error}") from None
        except Exception as error:  # noqa: BLE001 (of whichever HTTP library Authlib has below it)
            raise self._away(error) from None
        return dict(token)

    async def _claims(self, token: dict[str, Any], nonce: str) -> CodeIDToken:
        raw = token.get("id_token")
        if not isinstance(raw, str):
            raise _distrusted("there is no id_token")
        options = {
            "iss": {"essential": True, "value": self.config.issuer},
            "aud": {"essential": True, "value": self.config.client_id},
        }
        params = {"nonce": nonce, "client_id": self.config.client_id, "access_token": token.get("access_token")}
        try:
            try:
                decoded = jwt.decode(raw, await self._key_set(), algorithms=ALGORITHMS)
            except (JoseError, ValueError):  # the provider may have a new key
                decoded = jwt.decode(raw, await self._key_set(anew=True), algorithms=ALGORITHMS)
            claims = CodeIDToken(decoded.claims, decoded.header, options, params)
            claims.validate(leeway=_LEEWAY_S)
        except (JoseError, ValueError, TypeError) as error:
            raise _distrusted(f"the id_token is not good: {type(error).__name__}: {error}") from None
        return claims

    def _identity(self, claims: dict[str, Any]) -> Identity:
        config = self.config
        given = claims.get(config.groups_claim) or []
        groups = {str(group) for group in given} if isinstance(given, list) else {str(given)}
        if config.allowed is not None and not groups & set(config.allowed):
            raise RequestError("your account may not use this server", status=403, code="not_allowed")
        name = str(claims.get(config.user_claim) or claims.get("email") or claims["sub"])
        return Identity(
            issuer=config.issuer,
            subject=str(claims["sub"]),
            name=name,
            tier=next((tier for group, tier in config.tiers.items() if group in groups), config.tier),
            team=next((team for group, team in config.teams.items() if group in groups), None),
            admin=bool(groups & set(config.admins)),
        )

    async def _described(self) -> dict[str, Any]:
        """What the provider says of itself."""
        async with self._asking:
            if self._metadata is None or time.monotonic() - self._metadata[0] > _FRESH_S:
                found = await self._get(f"{self.config.issuer.rstrip('/')}/.well-known/openid-configuration")
                if found.get("issuer") != self.config.issuer:
                    raise OperationError(f"the OpenID provider {self.config.issuer} calls itself otherwise")
                missing = {"authorization_endpoint", "token_endpoint", "jwks_uri"} - found.keys()
                if missing:
                    raise OperationError(f"the OpenID provider {self.config.issuer} names no {sorted(missing)[0]}")
                self._metadata = (time.monotonic(), found)
            return self._metadata[1]

    async def _key_set(self, anew: bool = False) -> KeySet:
        metadata = await self._described()
        async with self._asking:
            age = time.monotonic() - self._keys[0] if self._keys else None
            if age is None or age > _FRESH_S or (anew and age > _REFETCH_S):
                found = await self._get(metadata["jwks_uri"])
                self._keys = (time.monotonic(), KeySet.import_key_set({"keys": found.get("keys") or []}))
            assert self._keys is not None
            return self._keys[1]

    async def _get(self, address: str) -> dict[str, Any]:
        try:
            async with self._client() as client:
                answer = await client.request("GET", address, withhold_token=True)
                answer.raise_for_status()
                found = answer.json()
        except Exception as error:  # noqa: BLE001 (of whichever HTTP library Authlib has below it)
            raise self._away(error) from None
        if not isinstance(found, dict):
            raise OperationError(f"the OpenID provider {self.config.issuer} answers with something else than it should")
        return found

    def _away(self, error: Exception) -> OperationError:
        _LOG.warning("the OpenID provider %s does not answer as it should", self.config.issuer, exc_info=error)
        return OperationError(f"the OpenID provider {self.config.issuer} does not answer as it should")


def _distrusted(reason: str) -> RequestError:
    _LOG.warning("a sign-in through OpenID was refused: %s", reason)
    return RequestError("the provider's answer is not accepted; begin again", status=400, code="not_accepted")
