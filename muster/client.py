"""Python client of the coordinator's HTTP API.

    with Client.find() as client:
        job = client.submit(Path("job.toml").read_text())
        while client.job(job.id).state != "finished": ...

Every method raises `UserError` with one line that says what to do: no coordinator, wrong token, a faulty job file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec

from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.views import DeviceView, JobView, Problem, ReleaseView
from shared.errors import SettingsError, UserError

T = TypeVar("T")
DEFAULT_STATE_DIR = "/var/lib/muster-coordinator"
ENDED = frozenset({"finished", "failed", "cancelled"})
"""States a job never leaves."""


class Unreachable(UserError):
    """No coordinator answers (any more)."""


class Client:
    """A connection to one coordinator; a context manager."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0) -> None:
        self._url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self._url, headers={"Authorization": f"Bearer {token}"}, timeout=timeout_s, trust_env=False
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{url}: not an address: {error}") from error

    @classmethod
    def find(cls, *, url: str = "", token_file: str = "", config: str = "") -> Client:
        """The coordinator at `url` with the token in `token_file`; what is not given is looked up.

        First in `MUSTER_URL` and `MUSTER_TOKEN_FILE`, then in the `api.json` that a coordinator of this machine writes
        into its state folder: that of the settings file `config`, else the standard one.
        """
        url = url or os.environ.get("MUSTER_URL", "")
        token_file = token_file or os.environ.get("MUSTER_TOKEN_FILE", "")
        if url and not token_file and not config:
            raise UserError(
                "--url goes with --token-file: name a file with the API's token (or set MUSTER_TOKEN_FILE); the "
                "coordinator keeps it as `token` in its state_dir"
            )
        if not url or not token_file:
            known_url, known_token_file = _local(config)
            url, token_file = url or known_url, token_file or known_token_file
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UserError(f"token file {token_file}: {reason}; name another with --token-file") from error
        return cls(url, token)

    def health(self) -> dict[str, object]:
        """Whether the coordinator reaches its broker, and its counters."""
        return _decode(self._call("GET", "/v1/health"), dict[str, object])

    def submit(self, toml: str, source: str = "job") -> JobView:
        """Queue the job written in `toml`. Raises `SettingsError` with every fault of it, under the name `source`."""
        return _decode(self._call("POST", "/v1/jobs", {"toml": toml}, source), JobView)

    def jobs(self) -> list[JobView]:
        """Every job, without its rounds."""
        return _decode(self._call("GET", "/v1/jobs"), list[JobView])

    def job(self, job: str) -> JobView:
        """One job with all its rounds."""
        return _decode(self._call("GET", f"/v1/jobs/{job}"), JobView)

    def cancel(self, job: str) -> JobView:
        """Cancel a job."""
        return _decode(self._call("POST", f"/v1/jobs/{job}/cancel"), JobView)

    def resume(self, job: str) -> JobView:
        """Go on with a paused job."""
        return _decode(self._call("POST", f"/v1/jobs/{job}/resume"), JobView)

    def devices(self) -> list[DeviceView]:
        """Every device the coordinator knows."""
        return _decode(self._call("GET", "/v1/devices"), list[DeviceView])

    def forget(self, device: str) -> None:
        """Take a device out of the fleet, after it was stopped and its certificate was revoked."""
        self._call("DELETE", f"/v1/devices/{device}")

    def export(self, job: str, folder: Path) -> Path:
        """Fetch the job's PEFT folder as `folder`, which must not exist or be empty; whole or not at all."""
        with writing(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder}: exists already and is not an empty folder")
        archive = self._call("GET", f"/v1/jobs/{job}/export")
        with beside(folder) as temporary:
            unpacked = temporary / "export"
            unpacked.mkdir()
            _unpack(archive, unpacked)
            tops = list(unpacked.iterdir())
            (tops[0] if len(tops) == 1 and tops[0].is_dir() else unpacked).replace(folder)
        return folder

    def release(self, ask: ReleaseAsk) -> ReleaseView:
        """Begin the release of a job's adapter to the devices."""
        return _decode(self._call("POST", "/v1/releases", msgspec.to_builtins(ask)), ReleaseView)

    def releases(self) -> list[ReleaseView]:
        """Every release, without its devices."""
        return _decode(self._call("GET", "/v1/releases"), list[ReleaseView])

    def release_status(self, name: str = "last") -> ReleaseView:
        """One release with its devices, by its id or its job's; "last": the latest."""
        return _decode(self._call("GET", f"/v1/releases/{name}"), ReleaseView)

    def roll_back(self, name: str = "last") -> ReleaseView:
        """Give the devices back what they had before a release; "last": before the one that stands."""
        return _decode(self._call("POST", f"/v1/releases/{name}/rollback"), ReleaseView)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, path: str, body: object = None, source: str = "job") -> bytes:
        try:
            answer = self._http.request(method, path, json=body) if body else self._http.request(method, path)
        except httpx.TransportError as error:
            hint = "is muster-coordinator running there? name another with --url"
            raise Unreachable(f"no coordinator answers at {self._url} ({error}): {hint}") from error
        if answer.is_success:
            return answer.content
        try:
            problem = msgspec.json.decode(answer.content, type=Problem)
        except msgspec.MsgspecError:
            raise UserError(f"{self._url} answered {answer.status_code}: is it a Muster coordinator?") from None
        if problem.faults:
            raise SettingsError(source, problem.faults)
        raise UserError(problem.error)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong with the files in here is said in one line: `folder` can't be made."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: can't be made: {error.strerror or error}; choose another folder") from error


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, so that what is made in it can be renamed to it. Raises `UserError`."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".muster-export-") as temporary:
            yield Path(temporary)


def _decode(content: bytes, wanted: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=wanted)
    except msgspec.MsgspecError as error:
        raise UserError(f"the coordinator's answer is of another version: {error}") from error


def _local(config: str) -> tuple[str, str]:
    """(URL, token file) as the coordinator on this machine wrote them down."""
    state_dir = DEFAULT_STATE_DIR
    if config:
        from coordinator.settings import CoordinatorSettings
        from shared.settings import load

        state_dir = load(Path(config), CoordinatorSettings).state_dir
    path = Path(state_dir) / "api.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["url"]), str(found["token_file"])
    except (OSError, ValueError, KeyError, TypeError):
        hint = "start muster-coordinator, or give --url and --token-file, or --config of its settings file"
        raise UserError(f"no coordinator found ({path} can't be read): {hint}") from None


def _unpack(archive: bytes, folder: Path) -> None:
    """Only plain files and folders below `folder`; `tarfile`'s own filter exists only in newer patch releases."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar.getmembers():
                target = (folder / member.name).resolve()
                if not target.is_relative_to(folder.resolve()):
                    raise UserError(f"the export holds {member.name!r}, outside its folder: refused")
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                elif member.isfile() and (source := tar.extractfile(member)):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read())
                else:
                    raise UserError(f"the export holds {member.name!r}, which is no plain file: refused")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"the export can't be unpacked: {error}") from error
