"""`modelworks serve --config --log`, with one route more, which tells what the process holds.

python tests/serve/observed_gateway.py serve.toml log.jsonl
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter

from modelworks.assistant.gateway import access_if_wanted, account_routes, administration_routes
from modelworks.serve.listen import gateway
from modelworks.serve.log import log_to
from modelworks.serve.store import Store

routes = APIRouter()


@routes.get("/held")
async def held() -> dict[str, Any]:
    """Tasks, files and sockets, objects and memory of this process."""
    gc.collect()
    process = psutil.Process()
    tasks = Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]
    return {
        "tasks": dict(tasks),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "objects": len(gc.get_objects()),
        "memory": process.memory_info().rss,
    }


if __name__ == "__main__":
    log_to(sys.argv[2])
    access = access_if_wanted()
    accounts = [account_routes(access), administration_routes(access)] if access else []
    gateway(Path(sys.argv[1]), Store(), host="127.0.0.1", port=0, access=access, routers=[*accounts, routes])
