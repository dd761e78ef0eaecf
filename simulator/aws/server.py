"""The AWS endpoint: moto's WSGI application behind a server that keeps connections alive, and a control path beside it.

`AwsSimulator` runs it in threads of this process; `python -m simulator.aws` runs it alone. moto keeps its state in
module globals, so a process has one account at a time: a second simulator in the same process is refused.
"""

import io
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from urllib.parse import unquote

from moto.bedrock.models import bedrock_backends
from moto.core.base_backend import BackendDict
from moto.core.model_instances import reset_model_data
from moto.ecs.models import ecs_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from pydantic import BaseModel, ValidationError
from werkzeug.serving import ThreadedWSGIServer

from simulator.aws import bedrock, bedrock_runtime, cloudtrail, cloudwatch, dispatch, ecs, iam, sns, sqs
from simulator.aws.errors import AwsError
from simulator.aws.faults import Fault
from simulator.aws.trail import TrailEvent
from simulator.aws.world import ACCOUNT_ID, ENVIRON_KEY, AwsConfig, CapacitySettings, World

log = logging.getLogger(__name__)

CONTROL = "/_simulator/"
_RESET = "/moto-api/reset"
_SCOPE = re.compile(r"Credential=[^/]+/[^/]+/([^/]+)/([^/]+)/aws4_request")
Route = Callable[[str, Any], Any]
"""Answers a control request: (HTTP method, decoded JSON body or None) to something JSON can say.

ValueError makes it a 400, NotReady a 503.
"""


class NotReady(Exception):
    """A control path that cannot answer yet; the message says what is awaited."""


class _Handler(MotoRequestHandler):
    """werkzeug's handler closes the connection after each answer; this one keeps it and answers in one packet."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: "_Server"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def handle_expect_100(self) -> bool:
        answered = super().handle_expect_100()
        self.wfile.flush()
        return answered

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: a rehearsal makes thousands of requests."""

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        body = self._read_body(environ)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        answer: list[Any] = ["500 Internal Server Error", []]

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
            answer[:] = [status, headers]
            return lambda _: None

        try:
            result = self.server.app(environ, start_response)
            content = b"".join(result)
        except ConnectionError:
            self.close_connection = True
            return
        except NotImplementedError as error:
            answer[:] = ["501 Not Implemented", [("Content-Type", "text/plain")]]
            content = str(error).encode()
        except Exception as error:
            log.exception("%s %s failed", self.command, self.path)
            answer[:] = ["500 Internal Server Error", [("Content-Type", "text/plain")]]
            content = f"{type(error).__name__}: {error}".encode()
        self._send(answer[0], answer[1], content)

    def _read_body(self, environ: dict[str, Any]) -> bytes:
        if environ.get("wsgi.input_terminated"):
            chunked: bytes = environ["wsgi.input"].read()
            return chunked
        return self.rfile.read(int(environ.get("CONTENT_LENGTH") or 0))

    def _send(self, status: str, headers: Iterable[tuple[str, str]], content: bytes) -> None:
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadedWSGIServer):
    """Knows its open connections, so that stopping cuts them."""

    def __init__(self, host: str, port: int, app: Any) -> None:
        self.connections: set[socket.socket] = set()
        # Bound here: werkzeug ends the process when the port is taken.
        with socket.create_server((host, port), backlog=128) as listener:
            super().__init__(host, port, app, handler=_Handler, fd=listener.fileno())
        self.port = self.server_address[1]

    def cut(self) -> None:
        """Close every connection that clients keep."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Dispatcher(DomainDispatcherApplication):
    """moto's dispatcher, remembering which application a signing name means instead of searching every time."""

    def __init__(self) -> None:
        super().__init__(create_backend_app)
        self._known: dict[tuple[str, str, str], Any] = {}

    def get_application(self, environ: dict[str, Any]) -> Any:
        key = _application_key(environ)
        if key is None:
            return super().get_application(environ)
        if key not in self._known:
            self._known[key] = super().get_application(environ)
        return self._known[key]


def _application_key(environ: dict[str, Any]) -> tuple[str, str, str] | None:
    """What determines moto's application: region, signing name, and where a name has several, which of them."""
    scope = _SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
    path = environ["PATH_INFO"]
    if scope is None or path.startswith("/moto-api"):
        return None
    region, service = scope.groups()
    if service in ("cloudtrail", "ecs", "events", "iam", "monitoring", "sns", "sqs", "sts"):
        return region, service, ""
    if service == "dynamodb":
        return region, service, environ.get("HTTP_X_AMZ_TARGET", "").split(".")[0]
    if service == "bedrock" and path.startswith("/provisioned-model-throughput"):
        return region, service, "provisioned"
    if service == "bedrock" and path.startswith("/model/"):
        return region, service, "runtime"
    return None


class AwsSimulator:
    """A simulated AWS account. `with AwsSimulator(AwsConfig()) as aws:` serves `aws.endpoint_url` meanwhile.

    `routes` are further control paths, by their path behind `/_simulator/`; `ready` is one of ours that may be
    replaced (it answers `{"env": {}}`).
    """

    _running: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, config: AwsConfig | None = None, routes: Mapping[str, Route] | None = None) -> None:
        self.config = config or AwsConfig()
        self.world = World(self.config)
        self._routes: dict[str, Route] = {
            "ready": lambda method, body: {"env": {}},
            "faults": self._faults,
            "bedrock": self._bedrock,
            "converse": self._converse,
            "settle": self._settle,
            "trail": self._trail,
            **(routes or {}),
        }
        self._server: _Server | None = None
        self._threads: list[threading.Thread] = []

    @property
    def endpoint_url(self) -> str:
        """What boto3 takes as `endpoint_url`."""
        if self._server is None:
            raise RuntimeError("the AWS simulator is not started")
        return f"http://{self.config.host}:{self._server.port}"

    def start(self) -> "AwsSimulator":
        """Serve. Raises OSError when the port is taken, RuntimeError when this process has a simulator already."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this process runs an AWS simulator already; moto's state is one per process")
        try:
            _install()
            self.reset()
            self._server = _Server(self.config.host, self.config.port, self._application())
        except BaseException:
            self._running.release()
            raise
        serve = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="aws", daemon=True)
        self._threads = [serve, cloudwatch.AlarmEvaluator(self.world)]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Close the port and every connection, and forget everything."""
        if self._server is None:
            return
        self.world.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()
        for thread in self._threads:
            thread.join()
        self._server = None
        self.reset()
        self._running.release()

    def __enter__(self) -> "AwsSimulator":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """An empty account, as moto's own reset (`POST /moto-api/reset`) leaves it."""
        with self.world.resetting:
            BackendDict.reset()
            reset_model_data()
            self.world.reset()

    def settle(self) -> None:
        """What is being created is in service, and desired tasks run, now."""
        bedrock.settle(self._fleet(), self.world)
        ecs.settle(self.world, ecs_backends[ACCOUNT_ID][self.config.region])

    def _application(self) -> Callable[..., Iterable[bytes]]:
        moto = _Dispatcher()

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ[ENVIRON_KEY] = self.world
            path = environ["PATH_INFO"]
            if path.startswith(CONTROL):
                status, answer = self._control(environ["REQUEST_METHOD"], path.removeprefix(CONTROL), environ)
                start_response(status, [("Content-Type", "application/json")])
                return [json.dumps(answer).encode()]
            if path == _RESET:
                with self.world.resetting:
                    result: Iterable[bytes] = moto(environ, start_response)
                    self.world.reset()
                    return result
            return moto(environ, start_response)  # type: ignore[no-any-return]

        return application

    def _control(self, method: str, path: str, environ: dict[str, Any]) -> tuple[str, Any]:
        try:
            raw = environ["wsgi.input"].read()
            body = json.loads(raw) if raw else None
            if path.startswith("provisioned-model-throughput/"):
                answer = self._provisioned(method, unquote(path.split("/", 1)[1]), body)
            elif path in self._routes:
                answer = self._routes[path](method, body)
            else:
                return "404 Not Found", {"error": f"no control path {path!r}; there are {sorted(self._routes)}"}
        except ValidationError as error:
            return "400 Bad Request", {"error": json.loads(error.json(include_url=False, include_context=False))}
        except AwsError as error:
            return "404 Not Found", {"error": str(error)}
        except ValueError as error:
            return "400 Bad Request", {"error": str(error)}
        except NotReady as error:
            return "503 Service Unavailable", {"error": str(error)}
        return "200 OK", answer

    def _faults(self, method: str, body: Any) -> Any:
        if method == "POST":
            self.world.faults.add(Fault.model_validate(body))
        elif method == "DELETE":
            self.world.faults.clear()
        return _dumped(self.world.faults.pending())

    def _bedrock(self, method: str, body: Any) -> Any:
        if method == "POST":
            self.world.change_capacity(CapacitySettings.model_validate(body))
        lag = self.world.provisioning_lag.total_seconds()
        return {"quotas": self.world.quotas, "provisioning_lag_seconds": lag}

    def _converse(self, method: str, body: Any) -> Any:
        """By model, what changes: `{"sonnet": {"median_ms": 4500}}`."""
        if method == "POST":
            if not isinstance(body, dict) or not all(isinstance(changes, dict) for changes in body.values()):
                raise ValueError("an object of objects is allowed: what changes, by model")
            for name, changes in body.items():
                self.world.change_converse(name, changes)
        return {name: model.model_dump() for name, model in self.world.converse.items()}

    def _provisioned(self, method: str, identifier: str, body: Any) -> Any:
        if method == "DELETE":
            bedrock.remove(self._fleet(), self.world, identifier)
        else:
            bedrock.force(self._fleet(), self.world, identifier, bedrock.ForcedStatus.model_validate(body))
        return {}

    def _settle(self, method: str, body: Any) -> Any:
        if method == "POST":
            self.settle()
        return {}

    def _trail(self, method: str, body: Any) -> Any:
        if method == "POST":
            self.world.trail.add(TrailEvent.model_validate(body))
        return _dumped(self.world.trail.events())

    def _fleet(self) -> bedrock.Fleet:
        return bedrock.fleet_of(bedrock_backends[ACCOUNT_ID][self.config.region])


def _dumped(models: Iterable[BaseModel]) -> list[Any]:
    return [model.model_dump(mode="json") for model in models]


def _install() -> None:
    """Everything of ours that takes the place of moto's. Idempotent."""
    for module in (dispatch, bedrock, bedrock_runtime, cloudtrail, cloudwatch, ecs, iam, sns, sqs):
        module.install()
