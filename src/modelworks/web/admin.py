"""The administrator's page: users, keys, tiers, what is used, the models and engines, and what was done.

Every change is made by `assistant.accounts` in the administrator's name, after another look at whether it still is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from nicegui import ui

from modelworks.assistant.accounts import Accounts, Key, User
from modelworks.assistant.gateway import AccountAccess
from modelworks.assistant.ledger import DAY_S, used_by_day
from modelworks.serve.access import Principal, Tier
from modelworks.serve.listen import described
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.charts import COLOURS
from modelworks.web.dialogs import ask
from modelworks.web.frame import frame
from modelworks.web.services import Services

DAYS = 30
LOOK_S = 5.0
_SECTIONS = ("Users", "Keys", "Tiers", "Usage", "Models", "Engines", "Audit log")
_MOST = 7
"""Users with a colour of their own in the chart; the others are one."""
_INK, _LINE = "#8a8c93", "rgba(128,128,128,.18)"


def register(services: Services) -> None:
    """Add the page ``/admin``."""

    @ui.page("/admin")
    async def admin(request: Request) -> None:
        own = services.of(request)
        with frame(request, own, "/admin", "Administration") as side:
            with side.bar:
                ui.html("<h1>Administration</h1>")
            with ui.element("div").classes("sheet"):
                assert own.access is not None
                assert own.principal is not None
                await Administration(own, own.access, own.principal).draw()


class Administration:
    """One open page."""

    def __init__(self, services: Services, access: AccountAccess, principal: Principal) -> None:
        self._services, self._access, self._principal = services, access, principal
        self._panels: dict[str, ui.element] = {}
        self._drawers: dict[str, Callable[[], Any]] = {
            "Users": self._users,
            "Keys": self._keys,
            "Tiers": self._tiers,
            "Usage": self._usage,
            "Models": self._models,
            "Engines": self._engines,
            "Audit log": self._audit,
        }

    @property
    def _accounts(self) -> Accounts:
        return self._access.accounts

    async def draw(self) -> None:
        """Draw all sections."""
        with ui.tabs().props("dense no-caps align=left inline-label").classes("sections") as tabs:
            for name in _SECTIONS:
                ui.tab(name)
        with ui.tab_panels(tabs, value="Users", animated=False).classes("panels"):
            for name in _SECTIONS:
                with ui.tab_panel(name) as panel:
                    self._panels[name] = ui.element("div").classes("section")
                panel.style("padding:0")
        for name in _SECTIONS:
            await self._redraw(name)
        tabs.on_value_change(lambda event: self._redraw(str(event.value)))
        ui.timer(LOOK_S, lambda: self._redraw("Engines"))

    async def _redraw(self, *names: str) -> None:
        for name in names:
            panel = self._panels[name]
            panel.clear()
            with panel:
                await self._drawers[name]()

    async def _do(self, work: Callable[..., Any], *arguments: Any, redraw: Sequence[str], **options: Any) -> Any:
        """A change in the administrator's name; what can't be done is said. Returns what it gave, or None."""
        try:
            still = await asyncio.to_thread(self._accounts.still, self._principal.key_id)
            if "admin" not in still.scopes:
                raise InputError("you are no longer an administrator")
            done = await asyncio.to_thread(lambda: work(*arguments, actor=still.user, **options))
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return None
        await self._redraw(*redraw, "Audit log")
        return done

    # --- users

    async def _users(self) -> None:
        users = await asyncio.to_thread(self._accounts.users)
        tiers = list(await asyncio.to_thread(self._accounts.tiers))
        with ui.element("div").classes("row-line"):
            ui.label(f"{len(users)} user{'' if len(users) == 1 else 's'}").classes("muted").style("flex:1")
            _button("Add a user", "person_add", lambda: self._add_user(tiers))
        with _table("Name", "Tier", "Team", "Signs in", "Since", "", ""):
            for user in users:
                self._user(user, tiers)

    def _user(self, user: User, tiers: list[str]) -> None:
        async def change(**what: Any) -> None:
            await self._do(self._accounts.change_user, user.name, redraw=["Users"], **what)

        me = user.name == self._principal.user
        with ui.element("tr"):
            with ui.element("td"):
                ui.label(user.name).classes("named")
                if user.admin:
                    ui.label("administrator").classes("state running")
                if user.disabled:
                    ui.label("closed").classes("state stopped")
            with ui.element("td"):
                picker = ui.select(tiers, value=user.tier, on_change=lambda event: change(tier=event.value))
                picker.props("dense options-dense borderless").classes("picker")
                picker.props["aria-label"] = f"Tier of {user.name}"
            _cell(user.team or "")
            _cell("through OpenID" if user.issuer else "with a password" if user.has_password else "with keys alone")
            _cell(_day(user.created))
            with ui.element("td"):
                if not me:
                    _small("Open" if user.disabled else "Close", lambda: change(disabled=not user.disabled))
            with ui.element("td"):
                if not me:
                    _small("Remove", lambda: self._remove_user(user))

    async def _add_user(self, tiers: list[str]) -> None:
        with ui.dialog() as dialog, ui.card().style("min-width:min(400px, 88vw);gap:12px"):
            ui.label("Add a user").style("font-weight:600")
            name = ui.input("Name").props("outlined dense autofocus").style("width:100%")
            password = ui.input("Password, of 12 characters or more", password=True, password_toggle_button=True)
            password.props("outlined dense autocomplete=new-password").style("width:100%")
            tier = ui.select(tiers, value=tiers[0], label="Tier").props("outlined dense").style("width:100%")
            team = ui.input("Team, if any").props("outlined dense").style("width:100%")
            admin = ui.checkbox("Administrator")
            with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
                ui.button("Cancel", on_click=dialog.close).props("flat no-caps color=grey")
                ui.button("Add", on_click=lambda: dialog.submit(True)).props("unelevated no-caps")
        wanted = await dialog
        dialog.delete()  # first: what is drawn again takes its dialogs with it
        if wanted:
            await self._do(
                self._accounts.add_user,
                name.value.strip(),
                tier=tier.value,
                team=team.value.strip() or None,
                password=password.value or None,
                admin=bool(admin.value),
                redraw=["Users"],
            )

    async def _remove_user(self, user: User) -> None:
        note = "All keys, conversations and the record of what was used are removed for good."
        if await ask(f"Remove {user.name}?", "Remove", note=note):
            await self._do(self._accounts.remove_user, user.name, redraw=["Users", "Keys", "Usage"])

    # --- keys

    async def _keys(self) -> None:
        now = time.time()
        keys = await asyncio.to_thread(self._accounts.keys)
        good = [key for key in keys if key.revoked is None and (key.expires is None or key.expires > now)]
        ui.label(f"{len(good)} valid of {len(keys)}; a sign-in is a key of twelve hours").classes("muted")
        with _table("Key", "User", "Name", "", "Used", "Until", "May"):
            for key in sorted(keys, key=lambda key: key not in good)[:200]:
                self._key(key, key in good)

    def _key(self, key: Key, good: bool) -> None:
        with ui.element("tr").classes("" if good else "past"):
            _cell(key.prefix, "code")
            _cell(key.user)
            _cell(key.name)
            with ui.element("td"):
                if good:
                    _small("Revoke", lambda: self._revoke(key))
            _cell(_day(key.last_used) or "never")
            _cell("was revoked" if key.revoked else _day(key.expires) or "it is revoked")
            _cell(", ".join(key.scopes))

    async def _revoke(self, key: Key) -> None:
        if await ask(f"Revoke {key.prefix}?", "Revoke", note=f"Whatever {key.user} runs with it is refused at once."):
            await self._do(self._accounts.revoke_key, key.id, redraw=["Keys"])

    # --- tiers

    async def _tiers(self) -> None:
        tiers = list((await asyncio.to_thread(self._accounts.tiers)).values())
        with ui.element("div").classes("row-line"):
            ui.label("What the users of a tier may use; a change holds from the next request on").classes(
                "muted"
            ).style("flex:1 1 200px")
            _button("Set a tier", "tune", self._set_tier)
        with _table("", *(tier.name for tier in tiers)):
            for field in (name for name in Tier.model_fields if name != "name"):
                with ui.element("tr"):
                    _cell(field.removesuffix("_s").replace("_", " "), "muted")
                    for tier in tiers:
                        _cell(_limit(field, getattr(tier, field)))

    async def _set_tier(self) -> None:
        with ui.dialog() as dialog, ui.card().style("min-width:min(440px, 88vw);gap:12px"):
            ui.label("Set a tier").style("font-weight:600")
            name = ui.input("Name, of a new one or one that is there").props("outlined dense autofocus")
            limits = ui.textarea("Limits, one a line", placeholder='tokens_per_day=50M\nmodels=["grok-*"]')
            name.style("width:100%")
            limits.props("outlined dense autogrow").style("width:100%")
            with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
                ui.button("Cancel", on_click=dialog.close).props("flat no-caps color=grey")
                ui.button("Set", on_click=lambda: dialog.submit(True)).props("unelevated no-caps")
        wanted = await dialog
        dialog.delete()
        if wanted:
            lines = [line.strip() for line in (limits.value or "").splitlines() if line.strip()]
            await self._do(self._accounts.set_tier, name.value.strip(), lines, redraw=["Tiers", "Users"])

    # --- usage

    async def _usage(self) -> None:
        rows = await asyncio.to_thread(self._access.usage, float(DAYS))
        by_day = await asyncio.to_thread(used_by_day, self._accounts.database, DAYS, time.time())
        costs = [row["cost"] for row in rows if row["cost"] is not None]
        sum_of = f"; ${sum(costs):,.2f} in all, at today's prices" if costs else ""
        ui.label(f"Tokens of each day (UTC), read and written, of the last {DAYS}{sum_of}").classes("muted")
        ui.echart(usage_chart(by_day, int(time.time() // DAY_S), DAYS)).classes("chart panel").style("height:280px")
        heads = ("User", "Team", "Model", ">Requests", ">Failed", ">Tokens read", ">From cache", ">Tokens written")
        with _table(*heads, *([">Cost"] if costs else [])):
            for row in rows:
                with ui.element("tr"):
                    for name in ("user", "team", "model"):
                        _cell(row[name] or "")
                    for name in ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens"):
                        _cell(f"{int(row[name] or 0):,}", "number")
                    if costs:
                        _cell(f"${row['cost']:,.2f}" if row["cost"] is not None else "", "number")
        if not rows:
            ui.label("Nothing was used yet.").classes("muted")

    # --- models

    async def _models(self) -> None:
        prices = await asyncio.to_thread(self._access.prices)
        ui.label("What is served, where it comes from, and what a million tokens cost").classes("muted")
        with _table("Model", "Source", "License", ">Context", ">Read", ">Written"):
            for card in sorted(await self._services.engine.models(), key=lambda card: card.name):
                price = prices.get(card.name)
                with ui.element("tr"):
                    _cell(card.name, "named")
                    _cell(card.source)
                    _cell(card.license)
                    _cell(f"{card.context:,}", "number")
                    _cell(f"${price.read:,.2f}" if price else "", "number")
                    _cell(f"${price.written:,.2f}" if price else "", "number")

    # --- engines

    async def _engines(self) -> None:
        if self._services.members is None:
            ui.label("llama.cpp answers inside this process").classes("muted")
            with _table("Model", ">Context", ">Answering", ">Waiting"):
                busy = self._services.engine.activity()
                for card in await self._services.engine.models():
                    with ui.element("tr"):
                        _cell(card.name, "named")
                        _cell(f"{card.context:,}", "number")
                        _cell(str(busy[card.name].running if card.name in busy else 0), "number")
                        _cell(str(busy[card.name].waiting if card.name in busy else 0), "number")
            return
        with _table("Engine", "State", ">Running", ">At most", "Models"):
            for engine in map(described, self._services.members()):
                with ui.element("tr"):
                    _cell(engine["name"], "named")
                    with ui.element("td"):
                        ui.label("well" if engine["well"] else "down").classes(
                            "state running" if engine["well"] else "state failed"
                        )
                    _cell(str(engine["running"]), "number")
                    _cell(str(engine["concurrency"]), "number")
                    _cell(", ".join(engine["models"]))

    # --- what was done

    async def _audit(self) -> None:
        rows = await asyncio.to_thread(self._accounts.audit, 200)
        ui.label("What was done to accounts and to the server, the latest first").classes("muted")
        with _table("When (UTC)", "Who", "What", "To what"):
            for row in rows:
                with ui.element("tr"):
                    _cell(datetime.fromtimestamp(row["at"], UTC).strftime("%Y-%m-%d %H:%M:%S"))
                    _cell(row["actor"])
                    _cell(row["action"])
                    _cell(row["subject"])


def usage_chart(rows: Sequence[dict[str, Any]], today: int, days: int) -> dict[str, Any]:
    """Stacked bars of the tokens of each day, by user.

    Parameters
    ----------
    rows : sequence of dict
        ``day`` (days since 1970), ``user`` and ``tokens``, as `assistant.ledger.used_by_day` gives them.
    today, days : int
        The last day, and how many are drawn.
    """
    every = list(range(today - days + 1, today + 1))
    total: dict[str, int] = {}
    for row in rows:
        total[row["user"]] = total.get(row["user"], 0) + row["tokens"]
    first = sorted(total, key=lambda user: (-total[user], user))[:_MOST]
    names = [*first, "others"] if len(total) > len(first) else first
    bars = {name: dict.fromkeys(every, 0) for name in names}
    for row in rows:
        if row["day"] in bars.get(row["user"], bars.get("others", {})):
            bars[row["user"] if row["user"] in first else "others"][row["day"]] += row["tokens"]
    text = {"color": _INK, "fontSize": 11}
    return {
        "animation": False,
        "color": COLOURS,
        "grid": {"left": 8, "right": 8, "top": 34, "bottom": 6, "containLabel": True},
        "legend": {"type": "scroll", "top": 0, "left": 0, "itemWidth": 14, "itemHeight": 8, "textStyle": text},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {
            "type": "category",
            "data": [datetime.fromtimestamp(day * DAY_S, UTC).strftime("%d %b") for day in every],
            "axisLabel": text | {"hideOverlap": True},
            "axisLine": {"lineStyle": {"color": _LINE}},
        },
        "yAxis": {"type": "value", "axisLabel": text, "splitLine": {"lineStyle": {"color": _LINE}}},
        "series": [
            {"name": name, "type": "bar", "stack": "tokens", "data": [bars[name][day] for day in every]}
            for name in names
        ],
    }


def _table(*heads: str) -> ui.element:
    """A table's body, to be filled with rows. A head that begins with ``>`` stands over numbers."""
    with ui.element("div").classes("panel grid-table").props("tabindex=0"), ui.element("table"):
        with ui.element("thead"), ui.element("tr"):
            for head in heads:
                with ui.element("th").classes("number" if head.startswith(">") else ""):
                    ui.label(head.removeprefix(">"))
        return ui.element("tbody")


def _cell(text: str, kind: str = "") -> None:
    with ui.element("td").classes("number" if kind == "number" else ""):
        ui.label(text).classes("" if kind == "number" else kind)


def _button(name: str, icon: str, action: Callable[[], Any]) -> None:
    ui.button(name, icon=icon, on_click=action).props("flat no-caps dense padding='4px 12px'").classes("quiet")


def _small(name: str, action: Callable[[], Any]) -> None:
    ui.button(name, on_click=action).props("flat no-caps dense padding='2px 8px' size=13px").classes("quiet")


def _day(at: float | None) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") if at is not None else ""


def _limit(field: str, value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if field == "window_s":
        return f"{value / 3600:g} h"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
