"""How long things are kept: what is older than the configuration says is removed, every hour."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from modelworks.assistant.database import Database
from modelworks.assistant.ledger import prune
from modelworks.serve.config import load_config
from modelworks.spec.errors import InputError, OperationError

EVERY_S = 3600.0
_LOG = logging.getLogger("modelworks.retention")


async def keep(database: Database, config_file: Path) -> None:
    """Remove what is too old now and every hour, as the file says then; until the task is cancelled."""
    while True:
        try:
            removed = await asyncio.to_thread(prune_as, database, config_file)
            if any(removed.values()):
                _LOG.info("removed what was too old", extra={"fields": removed})
        except (InputError, OperationError) as error:
            _LOG.error("what is too old stays: %s", error)
        await asyncio.sleep(EVERY_S)


def prune_as(database: Database, config_file: Path) -> dict[str, int]:
    """Remove what is older than a configuration says; returns how many conversations and requests."""
    wanted = load_config(config_file).retention
    if wanted.conversations is None and wanted.requests is None:
        return {"conversations": 0, "requests": 0}
    return prune(database, time.time(), wanted.conversations, wanted.requests)
