"""The HTTP API, version 1: a bearer token on every call, localhost by default; bodies are `coordinator.web.views`."""

from __future__ import annotations

import hmac
import io
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse

from coordinator.web import release_routes
from coordinator.web.answers import answer as _json
from coordinator.web.desk import Desk
from coordinator.web.refusals import Conflict, NotFound
from coordinator.web.shelf import NotOnShelf, Shelf
from coordinator.web.views import Problem
from shared.errors import SettingsError, UserError

MAX_JOB_BYTES = 256 * 1024
BASES = "/v1/bases/"
"""Open to all who know a digest (`coordinator.web.shelf`); every other path asks for the token."""


class _JobFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    toml: str


def create(desk: Desk, token: str, shelf: Shelf) -> FastAPI:
    """The application over `desk` and `shelf`; callers of the former must show `token`."""
    app = FastAPI(title="Muster", version="1", openapi_url=None, docs_url=None, redoc_url=None)
    expected = f"Bearer {token}".encode()

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        # Not `request.url`, part of which is what the client says of the host.
        if request.scope["path"].startswith(BASES) and request.method == "GET":
            return await call_next(request)
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            return _json(Problem(error="missing or wrong bearer token (see --token-file)"), 401)
        return await call_next(request)

    @app.exception_handler(UserError)
    async def refuse(_: Request, error: UserError) -> Response:
        return _refusal(error)

    _routes(app, desk, shelf)
    release_routes.add(app, desk)
    return app


def _routes(app: FastAPI, desk: Desk, shelf: Shelf) -> None:
    @app.get("/v1/health")
    def health() -> Response:
        return _json(desk.health())

    @app.post("/v1/jobs")
    async def submit(request: Request) -> Response:
        body = await request.body()
        if len(body) > MAX_JOB_BYTES:
            return _json(Problem(error=f"job file of {len(body)} bytes, the limit is {MAX_JOB_BYTES}"), 413)
        try:
            text = msgspec.json.decode(body, type=_JobFile).toml
        except msgspec.MsgspecError as error:
            return _json(Problem(error=f'expected {{"toml": "..."}}: {error}'), 400)
        from starlette.concurrency import run_in_threadpool

        return _json(await run_in_threadpool(desk.submit, text), 201)

    @app.get("/v1/jobs")
    def jobs() -> Response:
        return _json(desk.jobs())

    @app.get("/v1/jobs/{job_id}")
    def job(job_id: str) -> Response:
        return _json(desk.job(job_id))

    @app.post("/v1/jobs/{job_id}/cancel")
    def cancel(job_id: str) -> Response:
        return _json(desk.cancel(job_id))

    @app.post("/v1/jobs/{job_id}/resume")
    def resume(job_id: str) -> Response:
        return _json(desk.resume(job_id))

    @app.get("/v1/jobs/{job_id}/export")
    def export(job_id: str) -> Response:
        archive = _tar(desk.export_folder(job_id), job_id)
        return Response(archive, media_type="application/gzip")

    @app.get(f"{BASES}{{sha}}")
    def manifest(sha: str) -> Response:
        return FileResponse(shelf.file(sha), media_type="application/json")

    @app.get(f"{BASES}{{sha}}/{{name}}")
    def base_file(sha: str, name: str) -> Response:
        return FileResponse(shelf.file(sha, name), media_type="application/octet-stream")

    @app.get("/v1/devices")
    def devices() -> Response:
        return _json(desk.devices())

    @app.delete("/v1/devices/{device}")
    def forget(device: str) -> Response:
        desk.forget(device)
        return Response(status_code=204)


def _refusal(error: UserError) -> Response:
    status = 404 if isinstance(error, (NotFound, NotOnShelf)) else 409 if isinstance(error, Conflict) else 422
    faults = error.faults if isinstance(error, SettingsError) else []
    return _json(Problem(error=str(error), faults=faults), status)


def _tar(folder: Path, name: str) -> bytes:
    """`folder` as a tar.gz under the top level `name`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=f"{name}/{path.name}")
    return buffer.getvalue()
