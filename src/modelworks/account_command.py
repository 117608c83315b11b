"""The commands for those who run a gateway: its users, their keys and tiers, and what they used.

They sit beside the command line, which adds them. The accounts are `assistant/`'s.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modelworks.spec.errors import InputError

if TYPE_CHECKING:
    from modelworks.assistant.accounts import Accounts
    from modelworks.assistant.listing import Kind

users_app = typer.Typer(help="Add, list, change and remove users of the gateway.", no_args_is_help=True)
keys_app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
tiers_app = typer.Typer(help="List and change tiers: what their users may use.", no_args_is_help=True)
console = Console()
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]
UserName = Annotated[str, typer.Argument(metavar="USER", help="A user's name, as `users list` shows it.")]
TierName = Annotated[str | None, typer.Option(metavar="TIER", help="A tier, as `tiers list` shows it.")]
TeamName = Annotated[str | None, typer.Option(metavar="TEAM", help="A team; it is made if it isn't there.")]
AdminFlag = Annotated[bool | None, typer.Option("--admin/--no-admin", help="Whether the user may have admin keys.")]
PasswordFlag = Annotated[
    bool, typer.Option("--password", help="Read a password: typed twice, or a line of standard input.")
]


@contextlib.contextmanager
def _accounts() -> Iterator[Accounts]:
    from modelworks.assistant.accounts import Accounts
    from modelworks.assistant.database import Database, default_database

    database = Database(default_database())
    try:
        yield Accounts(database)
    finally:
        database.close()


def _password() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\n")


def _printed(kind: Kind, rows: list[dict[str, Any]], as_json: bool, nothing: str) -> None:
    """Rows for programs, or a table for people."""
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        console.print(nothing)
    else:
        from modelworks.assistant.listing import table

        console.print(table(kind, rows))


@users_app.command("add")
def _users_add(
    user: Annotated[str, typer.Argument(metavar="USER", help="The new user's name.")],
    tier: TierName = "free",
    team: TeamName = None,
    admin: AdminFlag = False,
    password: PasswordFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Add a user. From the next start on, `modelworks serve` asks everyone for a key.

    Example: [bold]modelworks users add alice --tier premium --team research[/bold]
    """
    with _accounts() as accounts:
        word = _password() if password else None
        made = accounts.add_user(user, tier=tier or "free", team=team, admin=bool(admin), password=word)
    if as_json:
        print(json.dumps(vars(made), indent=1))
    else:
        console.print(f"{made.name} is added; give them a key: modelworks keys create {made.name}", highlight=False)


@users_app.command("list")
def _users_list(as_json: JsonFlag = False) -> None:
    """List the users.

    Example: [bold]modelworks users list --json[/bold]
    """
    with _accounts() as accounts:
        _printed("users", [vars(user) for user in accounts.users()], as_json, "no users yet: everything is open")


@users_app.command("set")
def _users_set(
    user: UserName,
    tier: TierName = None,
    team: TeamName = None,
    admin: AdminFlag = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Whether their keys work.")] = None,
    password: PasswordFlag = False,
    conversations: Annotated[
        bool, typer.Option("--conversations", help="Give them the conversations from before there were users.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Change a user; it holds from the next request on.

    Example: [bold]modelworks users set alice --tier premium+ --disable[/bold]
    """
    with _accounts() as accounts:
        if conversations:
            accounts.give_conversations(user)
        if password:
            accounts.set_password(user, _password())
        disabled = None if enabled is None else not enabled
        changed = accounts.change_user(user, tier=tier, team=team, admin=admin, disabled=disabled)
    print(json.dumps(vars(changed), indent=1)) if as_json else console.print(f"{changed.name} is changed")


@users_app.command("rm")
def _users_rm(
    user: UserName,
    everything: Annotated[
        bool, typer.Option("--everything", help="Take the name out of the audit log, and forget failed sign-ins, too.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove a user, with all keys, conversations and the record of what was used.

    Example: [bold]modelworks users rm alice --everything[/bold]
    """
    with _accounts() as accounts:
        accounts.user(user)
        accounts.remove_user(user, everything=everything)
    print(json.dumps({"removed": user})) if as_json else console.print(f"{user} is removed", highlight=False)


@keys_app.command("create")
def _keys_create(
    user: UserName,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may do: generate, embed, models, account, admin; may be repeated.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.001, help="How long it lasts; left out, until revoked.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Create a key. It is shown this once: what is kept can't be turned back into it.

    Example: [bold]modelworks keys create alice --name laptop --days 90[/bold]
    """
    from modelworks.assistant.accounts import DEFAULT_SCOPES
    from modelworks.assistant.gateway import described

    with _accounts() as accounts:
        lasts_s = days * 86400 if days is not None else None
        key, whole = accounts.create_key(user, name, scopes=scope or DEFAULT_SCOPES, lasts_s=lasts_s)
    if as_json:
        print(json.dumps(described(key) | {"key": whole}, indent=1))
    else:
        print(whole)


@keys_app.command("list")
def _keys_list(
    user: Annotated[str | None, typer.Argument(metavar="USER", help="Whose; left out, everyone's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List keys, without their secrets.

    Example: [bold]modelworks keys list alice[/bold]
    """
    from modelworks.assistant.gateway import described

    with _accounts() as accounts:
        _printed("keys", [described(key) for key in accounts.keys(user)], as_json, "no keys yet")


@keys_app.command("revoke")
def _keys_revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, or its id as `keys list` shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Make a key worthless, from the next request on.

    Example: [bold]modelworks keys revoke 0123456789abcdef[/bold]
    """
    from modelworks.assistant.gateway import described

    with _accounts() as accounts:
        revoked = accounts.revoke_key(key)
    if as_json:
        print(json.dumps(described(revoked), indent=1))
    else:
        console.print(f"{revoked.prefix} of {revoked.user} is revoked", highlight=False)


@tiers_app.command("list")
def _tiers_list(as_json: JsonFlag = False) -> None:
    """List the tiers.

    Example: [bold]modelworks tiers list[/bold]
    """
    with _accounts() as accounts:
        _printed("tiers", [tier.model_dump() for tier in accounts.tiers().values()], as_json, "")


@tiers_app.command("set")
def _tiers_set(
    tier: Annotated[str, typer.Argument(metavar="TIER", help="Its name.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Its limits.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a tier, or change one; what isn't named stays, or is the default. It holds from the next request on.

    Example: [bold]modelworks tiers set research tokens_per_day=50M parallel=32[/bold]
    """
    with _accounts() as accounts:
        made = accounts.set_tier(tier, changes or [])
    print(json.dumps(made.model_dump(), indent=1)) if as_json else console.print(f"the tier {made.name} is set")


@tiers_app.command("rm")
def _tiers_rm(
    tier: Annotated[str, typer.Argument(metavar="TIER", help="Its name.")], as_json: JsonFlag = False
) -> None:
    """Remove a tier of your own; a changed free, premium or premium+ goes back to what it was.

    Example: [bold]modelworks tiers rm research[/bold]
    """
    with _accounts() as accounts:
        accounts.remove_tier(tier)
    print(json.dumps({"removed": tier})) if as_json else console.print(f"the tier {tier} is removed")


def usage(
    user: Annotated[str | None, typer.Argument(metavar="USER", help="Whose; left out, everyone's.")] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Of so many days until now.")] = 30.0,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The gateway's configuration, whose prices make the cost.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV for spreadsheets, with a line of names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what was used of which model, by user: requests, tokens, and with a configuration what they cost.

    Example: [bold]modelworks usage --days 7 --csv > usage.csv[/bold]
    """
    from modelworks.assistant.ledger import USAGE_COLUMNS, Ledger, priced
    from modelworks.serve.config import load_config, prices_of

    if as_csv and as_json:
        raise InputError("--csv with --json is not accepted: one of them is")
    prices = prices_of(load_config(config)) if config is not None else None
    with _accounts() as accounts:
        if user is not None:
            accounts.user(user)
        rows = Ledger(accounts.database).usage(days, user)
    if prices is not None:
        rows = priced(rows, prices)
    if as_csv:
        columns = [*USAGE_COLUMNS, *(["cost"] if prices is not None else [])]
        written = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        written.writeheader()
        written.writerows(rows)
    else:
        _printed("usage", rows, as_json, "nothing was used")


def prune(
    conversations: Annotated[
        float | None, typer.Option(min=0.001, metavar="DAYS", help="Those that nobody has gone on with for so long.")
    ] = None,
    requests: Annotated[
        float | None, typer.Option(min=0.001, metavar="DAYS", help="Records of requests that ended as long ago.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what is older than so many days. Requests that a limit still counts stay.

    A gateway does so by itself every hour, if its configuration says how long things are kept.

    Example: [bold]modelworks prune --conversations 90 --requests 365[/bold]
    """
    from modelworks.assistant.ledger import DAY_S
    from modelworks.assistant.ledger import prune as remove

    if conversations is None and requests is None:
        raise InputError("there is nothing to remove: --conversations DAYS, --requests DAYS, or both are needed")
    limits = [days * DAY_S if days is not None else None for days in (conversations, requests)]
    with _accounts() as accounts:
        removed = remove(accounts.database, time.time(), *limits)
        accounts.note("prune", " ".join(f"{name}={count}" for name, count in removed.items()))
    if as_json:
        print(json.dumps(removed))
    else:
        console.print(f"{removed['conversations']:,} conversations and {removed['requests']:,} requests are removed")


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes.")], as_json: JsonFlag = False
) -> None:
    """Copy the database (conversations, users, usage) into a file, while servers run.

    Example: [bold]modelworks backup modelworks-2026-11-28.db[/bold]
    """
    from modelworks.assistant.backup import back_up
    from modelworks.assistant.database import default_database

    size = back_up(default_database(), file)
    with _accounts() as accounts:
        accounts.note("back up", file.name)
    if as_json:
        print(json.dumps({"file": str(file), "bytes": size}))
    else:
        console.print(f"{file}: {size:,} bytes", highlight=False, soft_wrap=True)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy that `modelworks backup` made.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put a copy in the place of the database: what came after the copy is gone.

    Example: [bold]modelworks restore modelworks-2026-11-28.db --yes[/bold]
    """
    from modelworks.assistant.backup import restore as put_back
    from modelworks.assistant.database import default_database

    if not yes and not typer.confirm("What came after the copy will be gone. Go on?"):
        raise typer.Exit(1)
    put_back(file, default_database())
    with _accounts() as accounts:
        accounts.note("restore", file.name)
    print(json.dumps({"restored": str(file)})) if as_json else console.print(f"{file} is restored", soft_wrap=True)
