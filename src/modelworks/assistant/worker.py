"""One of several processes of a gateway; `serve.workers` starts them."""

from __future__ import annotations

import signal
from pathlib import Path

from fastapi import FastAPI

from modelworks.assistant.gateway import access_if_wanted, account_routes, administration_routes
from modelworks.assistant.kept import DatabaseStorage
from modelworks.serve.listen import Configured, also_for_xai
from modelworks.serve.log import log_to
from modelworks.serve.store import Store
from modelworks.serve.workers import WorkerPlan, end_with_parent


def create() -> FastAPI:
    """The application of one worker, as its environment says."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the application runs, which reads the file anyway
    end_with_parent()
    plan = WorkerPlan.given()
    if plan.log is not None:
        log_to(plan.log)
    access = access_if_wanted(Path(plan.config))
    routers = [account_routes(access), administration_routes(access)] if access else []
    storage = DatabaseStorage(access.accounts.database if access else None)
    configured = Configured(Path(plan.config), Store(), plan.workers)
    app = configured.app(plan.hosts, access, storage, routers)
    also_for_xai(app, plan.xai, configured.config.drain_s)
    return app
