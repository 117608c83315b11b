"""The gateway's configuration: which engines stand behind it, and which models they answer for. TOML in.

::

    [engines.gpu-1]
    url = "http://10.0.0.5:8000/v1"         # vLLM, SGLang, another Modelworks
    concurrency = 128
    [engines.xai]
    url = "https://api.x.ai/v1"
    key_env = "XAI_API_KEY"                 # the environment variable that holds its key
    models = ["grok-4"]                     # left out: whatever it lists
    [engines.here]
    embedded = true                         # llama.cpp in this process, over the stored models

    [models.grok]                           # a name of your own
    price = { read = 3.0, written = 15.0 }  # dollars per million tokens, for those who look at what was used
    on = { gpu-1 = "xai-org/grok-2" }       # engine = the model's name there
    fallback = ["grok-4", "smollm2-135m"]   # asked in this order when no engine of it begins to answer

Addresses come from this file and from nowhere else: a request can't name one.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from modelworks.spec.errors import InputError
from modelworks.spec.fields import Duration, PositiveInt, Section, validate

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}$")]
"""Of an engine or a model: letters, digits, dot, dash, underscore, slash and colon."""
Wait = Annotated[Duration, Field(gt=0)]


class _Keyed(Section):
    """A server that may want to know who asks."""

    key_env: str | None = None
    """The environment variable whose value is sent as ``Authorization: Bearer``; the key never stands in the file."""

    @property
    def key(self) -> str | None:
        """The key, if one is named.

        Raises
        ------
        InputError
            If its environment variable is not set.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(f"key_env = {self.key_env!r}: this environment variable holds no key")
        return key


class EngineConfig(_Keyed):
    """One engine behind the gateway."""

    url: str | None = None
    """The base of its OpenAI-compatible API, such as ``http://10.0.0.5:8000/v1``."""
    models: list[Name] | None = None
    """The models that it answers for, by its own names; left out, those that it lists."""
    concurrency: PositiveInt = 256
    """Requests that it is given at once; more wait in the gateway. An embedded engine's is its `slots`."""
    connect_s: Wait = 5.0
    """How long a connection, or the answer to a health check, may take."""
    first_token_s: Wait = 120.0
    """How long the first chunk may take before another engine is asked."""
    stall_s: Wait = 60.0
    """How long the next chunk may take before the answer is broken off."""
    check_every_s: Wait = 5.0
    """How often its list of models is asked for, which is also how its health is known."""
    embedded: bool = False
    """llama.cpp in this process, over the models that `modelworks models list` shows as served."""
    slots: Annotated[int, Field(ge=1, le=256)] = 4
    """Of an embedded engine: chats that a model answers at once."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Of an embedded engine: threads that compute."""
    context: Annotated[int, Field(ge=16)] = 4096
    """Of an embedded engine: tokens per chat."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(
                "an address such as 'http://10.0.0.5:8000/v1' is accepted, without user, query or fragment"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _is_one_kind(self) -> EngineConfig:
        if self.embedded == (self.url is not None):
            raise ValueError("either url or embedded = true is accepted")
        return self


class PriceConfig(Section):
    """What a model's tokens cost, in US dollars per million."""

    read: Annotated[float, Field(ge=0)] = 0.0
    """Of a prompt."""
    cached: Annotated[float, Field(ge=0)] | None = None
    """Of a prompt's part that the engine still had; left out, as of any other."""
    written: Annotated[float, Field(ge=0)] = 0.0
    """Of an answer."""

    def cost(self, read: int, cached: int, written: int) -> float:
        """Dollars for so many tokens; `cached` ones are among those that were `read`."""
        kept = self.read if self.cached is None else self.cached
        return ((read - cached) * self.read + cached * kept + written * self.written) / 1e6


class ModelConfig(Section):
    """One model by a name of the operator's own, or more about a model that an engine lists."""

    on: dict[Name, Name] | None = None
    """Which engines answer for it, and its name there; left out, the engines that list it under this name."""
    fallback: list[Name] = []
    """Models that are asked, in this order, when no engine of this one begins to answer."""
    context: Annotated[int, Field(ge=16)] | None = None
    """Tokens that one chat may hold, where the engine doesn't say."""
    images: bool = False
    """Whether its messages may hold images."""
    search: bool = False
    """Whether its engines know xAI's `search_parameters`, and look for what is new."""
    price: PriceConfig | None = None
    """What it costs; usage is shown with it."""


class QueueConfig(Section):
    """How requests wait when the engines are full."""

    waiting: Annotated[int, Field(ge=0)] = 256
    """Requests that may wait for a model; more are refused at once (429)."""
    wait_s: Wait = 30.0
    """How long a request waits before it is refused."""


class RetentionConfig(Section):
    """How long things are kept; left out, for good."""

    conversations: Wait | None = None
    """Since a conversation was last gone on with, such as ``"90d"``."""
    requests: Wait | None = None
    """Since a request ended; those that a limit still counts are kept in any case."""


class LiveConfig(Section):
    """Sources that refresh themselves: what they may reach, and the services that are searched."""

    on: bool = True
    """Whether there are any."""
    folders: list[str] = []
    """Folders of this server that people may name as sources, with all that is in them."""
    allow_addresses: list[str] = []
    """Addresses and networks that are fetched from although they aren't public, such as ``10.1.0.0/16``."""
    most: PositiveInt = 50
    """Sources that a user may have."""
    delay_s: Wait = 1.0
    """Between two requests to one host, at least; a site's own ``Crawl-delay`` holds if it is longer."""
    searxng: str | None = None
    """The address of a SearXNG whose settings allow ``json``."""
    brave_url: str = "https://api.search.brave.com/res/v1"
    brave_key_env: str = "BRAVE_API_KEY"
    """The environment variable that holds the key of Brave's search; if it isn't set, that isn't there."""
    x_url: str = "https://api.x.com/2"
    x_token_env: str = "X_BEARER_TOKEN"  # noqa: S105 (a name)
    """The environment variable that holds the bearer token of X; if it isn't set, that isn't there."""

    @field_validator("searxng", "brave_url", "x_url")
    @classmethod
    def _is_base(cls, url: str | None) -> str | None:
        return EngineConfig._is_address(url)

    @property
    def brave_key(self) -> str | None:
        """The key of Brave's search, if there is one."""
        return os.environ.get(self.brave_key_env, "").strip() or None

    @property
    def x_token(self) -> str | None:
        """The bearer token of X, if there is one."""
        return os.environ.get(self.x_token_env, "").strip() or None


def live_of(config: ServeConfig | None) -> LiveConfig:
    """The live sources of a configuration; without one, ``MODELWORKS_SEARXNG`` may name a SearXNG.

    Raises
    ------
    InputError
        If that isn't an address.
    """
    if config is not None:
        return config.live
    searxng = os.environ.get("MODELWORKS_SEARXNG")
    return validate(LiveConfig, {"searxng": searxng} if searxng else {}, "MODELWORKS_SEARXNG")


class McpConfig(_Keyed):
    """A server of the Model Context Protocol whose tools conversations may have."""

    command: list[str] | None = None
    """A program that speaks it over its stdin and stdout, and its arguments."""
    env: list[str] = []
    """Of that program: the environment variables that are passed on to it."""
    url: str | None = None
    """Or its address, of streamable HTTP."""
    wait_s: Wait = 60.0
    """How long a call may take."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> McpConfig:
        if bool(self.command) == (self.url is not None):
            raise ValueError("either command or url is accepted")
        if self.url is not None and urlsplit(self.url).scheme not in {"http", "https"}:
            raise ValueError("url: an address such as 'http://127.0.0.1:8000/mcp' is accepted")
        if self.url is None and self.key_env is not None:
            raise ValueError("key_env goes with url; what a command is given, env names")
        _ = self.key
        return self


class ToolsConfig(Section):
    """The tools that conversations on the pages may have."""

    python: bool = False
    """Whether models may run Python code in a sandbox, where this machine allows one."""
    mcp: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,24}$")], McpConfig] = {}
    """Servers of tools, by names of the operator's own."""


class OidcConfig(Section):
    """An OpenID provider that people sign in with, and what its words mean here."""

    issuer: str
    """Its address, as its tokens name it."""
    client_id: str
    """What it calls this server."""
    client_secret_env: str | None = None
    """The environment variable that holds this server's secret; left out, it has none (PKCE alone)."""
    name: str = "OpenID"
    """What the sign-in page calls it."""
    public_url: str | None = None
    """The address by which browsers reach this server; left out, as they ask for it."""
    scopes: str = "openid profile email"
    """What is asked for."""
    user_claim: str = "preferred_username"
    """The claim that becomes the user's name; where it is missing, `email`, and then `sub`."""
    groups_claim: str = "groups"
    """The claim that lists the user's groups."""
    allowed: list[str] | None = None
    """Groups whose members may sign in; left out, everyone whom the provider knows."""
    tiers: dict[str, str] = {}
    """Group = tier; the first one in the file that the user is in."""
    teams: dict[str, str] = {}
    """Group = team; the first one in the file that the user is in."""
    admins: list[str] = []
    """Groups whose members are administrators."""
    tier: str = "free"
    """The tier of those whose groups name none."""

    @field_validator("issuer", "public_url")
    @classmethod
    def _is_safe(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        near = parts.scheme == "http" and parts.hostname in {"localhost", "127.0.0.1", "::1"}
        if not parts.hostname or not (parts.scheme == "https" or near) or parts.query or parts.fragment:
            raise ValueError("an address such as 'https://id.example.org' is accepted; http on this machine alone")
        return url

    @property
    def secret(self) -> str | None:
        """This server's secret at the provider.

        Raises
        ------
        InputError
            If its environment variable is not set.
        """
        if self.client_secret_env is None:
            return None
        secret = os.environ.get(self.client_secret_env, "").strip()
        if not secret:
            raise InputError(
                f"oidc.client_secret_env = {self.client_secret_env!r}: this environment variable holds no secret"
            )
        return secret


def oidc_of(config: ServeConfig | None) -> OidcConfig | None:
    """The OpenID provider of a configuration, or of ``MODELWORKS_OIDC_ISSUER``, ``_CLIENT_ID`` and ``_CLIENT_SECRET``.

    Raises
    ------
    InputError
        If the environment names no client, or its issuer can't be one.
    """
    if config is not None and config.oidc is not None:
        return config.oidc
    names = {field: f"MODELWORKS_OIDC_{field.upper()}" for field in ("issuer", "client_id", "client_secret")}
    given = {field: os.environ[name] for field, name in names.items() if os.environ.get(name)}
    if "issuer" not in given:
        return None
    if given.pop("client_secret", None):
        given["client_secret_env"] = names["client_secret"]
    return validate(OidcConfig, given, "MODELWORKS_OIDC_*")


class ServeConfig(Section):
    """The gateway's configuration file."""

    engines: dict[Name, EngineConfig]
    models: dict[Name, ModelConfig] = {}
    queue: QueueConfig = QueueConfig()
    tries: Annotated[int, Field(ge=1, le=10)] = 3
    """How often a model's engines are asked in all, before its fallback is."""
    affinity: bool = True
    """Whether a conversation goes to the engine that read its beginning, unless that one has too much to do."""
    drain_s: Wait = 20.0
    """How long answers that run may go on after the gateway was told to end."""
    retention: RetentionConfig = RetentionConfig()
    live: LiveConfig = LiveConfig()
    oidc: OidcConfig | None = None
    tools: ToolsConfig = ToolsConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> ServeConfig:
        if not self.engines:
            raise ValueError("engines is empty: at least one table [engines.NAME] is needed")
        for name, model in self.models.items():
            if model.on is not None and not model.on:
                raise ValueError(f"models.{name}.on is empty: an engine and the model's name there are needed")
            for engine in model.on or {}:
                if engine not in self.engines:
                    raise ValueError(f"models.{name}.on names the engine {engine!r}; there are {_listed(self.engines)}")
            if name in model.fallback:
                raise ValueError(f"models.{name}.fallback names the model itself; other models are accepted")
        if sum(engine.embedded for engine in self.engines.values()) > 1:
            raise ValueError("engines: one with embedded = true is accepted")
        return self


def prices_of(config: ServeConfig) -> dict[str, PriceConfig]:
    """The models that have a price."""
    return {name: model.price for name, model in config.models.items() if model.price is not None}


def _listed(names: dict[str, EngineConfig]) -> str:
    return ", ".join(names)


def load_config(path: Path) -> ServeConfig:
    """Read a configuration file; the environment variables that it names must be set.

    Raises
    ------
    InputError
        Naming the file, the field, the value and what is accepted.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise InputError(f"the configuration {path} cannot be read: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    config = validate(ServeConfig, values, str(path))
    for name, engine in config.engines.items():
        try:
            _ = engine.key
        except InputError as error:
            raise InputError(f"{path}: engines.{name}.{error}") from None
    if config.oidc is not None:
        try:
            _ = config.oidc.secret
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return config
