"""The HTTP API of releases: `/v1/releases`. Bodies are `coordinator.web.views`, faults as everywhere in the API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response

from coordinator.web.answers import answer
from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.views import Problem

if TYPE_CHECKING:
    from coordinator.web.desk import Desk

MAX_ASK_BYTES = 256 * 1024


def add(app: FastAPI, desk: Desk) -> None:
    """Put the routes on `app`, behind its guard."""

    @app.post("/v1/releases")
    async def start(request: Request) -> Response:
        body = await request.body()
        if len(body) > MAX_ASK_BYTES:
            return answer(Problem(error=f"{len(body)} bytes, the limit is {MAX_ASK_BYTES}"), 413)
        try:
            ask = msgspec.json.decode(body, type=ReleaseAsk)
        except msgspec.MsgspecError as error:
            return answer(Problem(error=f"not a release: {error}"), 400)
        from starlette.concurrency import run_in_threadpool

        return answer(await run_in_threadpool(desk.releases.start, ask), 201)

    @app.get("/v1/releases")
    def releases() -> Response:
        return answer(desk.releases.all())

    @app.get("/v1/releases/{name}")
    def release(name: str) -> Response:
        return answer(desk.releases.one(name))

    @app.post("/v1/releases/{name}/rollback")
    def rollback(name: str) -> Response:
        return answer(desk.releases.roll_back(name))
