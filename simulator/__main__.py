"""`python -m simulator`: AWS on a port, and MangaAssist living in it, until SIGTERM or Ctrl-C.

Where things are and what time it is comes from the same environment as the product's processes: `RUNBOOKS_REDIS_URL`,
`RUNBOOKS_AWS_REGION`, `RUNBOOKS_EVENT_TABLE`, `RUNBOOKS_ECS_CLUSTER`, `RUNBOOKS_ECS_SERVICE`, `RUNBOOKS_POLICY_FILE`
and `RUNBOOKS_REHEARSAL_REAL_START`, `_BUSINESS_START`, `_SPEED`.
"""

import argparse
import gc
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from domain.clock import RehearsalClock
from domain.policy import Policy
from simulator import batch_latency, scaling_lag
from simulator.aws import AwsConfig, AwsSimulator, NotReady
from simulator.aws.server import Route
from simulator.requests import MOST_PER_SECOND, HttpBatcher, Requests, live
from simulator.stages import Stages
from simulator.world import Row, World, WorldOptions, metric_period

_CLOCK = {
    "real_start": "RUNBOOKS_REHEARSAL_REAL_START",
    "business_start": "RUNBOOKS_REHEARSAL_BUSINESS_START",
    "speed": "RUNBOOKS_REHEARSAL_SPEED",
}
_PLACES = {
    "redis_url": "RUNBOOKS_REDIS_URL",
    "aws_region": "RUNBOOKS_AWS_REGION",
    "event_table": "RUNBOOKS_EVENT_TABLE",
    "ecs_cluster": "RUNBOOKS_ECS_CLUSTER",
    "ecs_service": "RUNBOOKS_ECS_SERVICE",
}

SCALING_LAG = "scaling-lag"
BATCH_LATENCY = "batch-latency"

_log = logging.getLogger("simulator")


class SpikeRequest(BaseModel):
    """Body of `POST /_simulator/traffic`."""

    model_config = ConfigDict(extra="forbid")

    multiplier: float = Field(default=5, gt=0, le=100)
    minutes: float = Field(default=27, gt=0, le=24 * 60)
    """Until it fades, in business time."""


class RequestsRequest(BaseModel):
    """Body of `POST /_simulator/requests`."""

    model_config = ConfigDict(extra="forbid")

    requests_per_second: float = Field(gt=0, le=MOST_PER_SECOND)
    """Of real time."""


def clock_of(env: Mapping[str, str]) -> RehearsalClock:
    """The business clock that `env` sets; identity without.

    Raises:
        ValueError: a value that is no such moment or speed.
    """
    given = {field: env[name] for field, name in _CLOCK.items() if name in env}
    if not {"real_start", "business_start"} <= given.keys():
        return RehearsalClock()
    try:
        return RehearsalClock.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{_CLOCK[str(first['loc'][0])]}: {first['input']!r}: {first['msg']}") from error


def policy_of(env: Mapping[str, str]) -> Policy:
    """The policy that the product's processes read: MangaAssist is configured by it, too.

    Raises:
        ValueError: the file cannot be read or is no policy.
    """
    path = env.get("RUNBOOKS_POLICY_FILE")
    if not path:
        return Policy()
    try:
        return Policy.model_validate(YAML(typ="safe").load(Path(path)) or {})
    except (OSError, YAMLError) as error:
        raise ValueError(f"RUNBOOKS_POLICY_FILE: {path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulator", description=__doc__)

    def option(name: str, default: Any, kind: Any, help: str, choices: Sequence[str] | None = None) -> None:
        variable = f"RUNBOOKS_SIMULATOR_{name.upper().replace('-', '_')}"
        parser.add_argument(
            f"--{name}",
            default=os.environ.get(variable, default),
            type=kind,
            choices=choices,
            help=f"{help} (default {default}, or ${variable})",
        )

    option("host", "127.0.0.1", str, "address to listen on")
    option("port", 5566, int, "port to listen on; 0 takes a free one")
    option(
        "scenario",
        "release-spike",
        str,
        "what the night brings",
        choices=["release-spike", "calm", SCALING_LAG, BATCH_LATENCY],
    )
    option("seed", 1, int, "of the traffic's noise")
    option("peak-multiplier", 5.0, float, "of the release spike")
    option("spike-minutes", 27.0, float, "business minutes from the spike's start until it fades")
    option("usual-load", None, float, "tokens/s sent at any hour before spikes; without it the day has its curve")
    option(
        "batcher-url", None, str, "a batcher that real requests are made to, and measured; without it all is modelled"
    )
    option("event-row", Row.UNDERSIZED.value, str, "what the calendar says of the release", choices=list(Row))
    return parser


class _Control:
    """MangaAssist's part of `/_simulator/`."""

    def __init__(self, stages: Stages, requests: Requests | None) -> None:
        self._stages = stages
        self._requests = requests
        self._world: World | None = None
        self._made: dict[str, Any] = {}

    def opens(self, world: World, made: dict[str, Any]) -> None:
        """From now on it is ready."""
        self._world, self._made = world, made

    def ready(self, method: str, body: Any) -> Any:
        """`GET /_simulator/ready`: an error until everything stands, then what was made."""
        self._there()
        return self._made

    def traffic(self, method: str, body: Any) -> Any:
        """`POST /_simulator/traffic` starts a spike now, `DELETE` lets all of them fade; answers the spikes."""
        world = self._there()
        if method == "POST":
            request = SpikeRequest.model_validate(body or {})
            world.start_spike(request.multiplier, request.minutes)
        elif method == "DELETE":
            world.stop_spikes()
        return [
            {
                "starts_at": spike.starts_at.isoformat(),
                "multiplier": spike.multiplier,
                "minutes": spike.lasts / timedelta(minutes=1),
            }
            for spike in world.spikes
        ]

    def latency(self, method: str, body: Any) -> Any:
        """`POST /_simulator/latency` makes systems and stages slow, `DELETE` heals them; answers how slow they are."""
        if method == "POST":
            if not isinstance(body, dict):
                raise ValueError('an object is allowed: how many times as slow as usual, e.g. {"redis": 200}')
            self._stages.slow(body)
        elif method == "DELETE":
            self._stages.heal()
        return self._stages.times

    def requests(self, method: str, body: Any) -> Any:
        """What the real requests took since `DELETE /_simulator/requests`; `POST` changes their rate."""
        if self._requests is None:
            raise ValueError("there are no real requests: the simulator was started without --batcher-url")
        if method == "POST":
            self._requests.rate = RequestsRequest.model_validate(body or {}).requests_per_second
        elif method == "DELETE":
            self._requests.forget()
        return self._requests.summary()

    def _there(self) -> World:
        if self._world is None:
            raise NotReady("MangaAssist is still being set up")
        return self._world


def _seed(world: World, stop: threading.Event) -> dict[str, Any] | None:
    """Make the world as soon as Redis answers; None if told to stop before."""
    while True:
        try:
            return world.seed()
        except redis.RedisError as error:
            _log.warning("Redis does not answer, trying again: %s", error)
            if stop.wait(1):
                return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until told to stop; exits with 2 and a sentence when an option or a variable is wrong."""
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    places = {field: os.environ[name] for field, name in _PLACES.items() if name in os.environ}
    try:
        clock = clock_of(os.environ)
        policy = policy_of(os.environ)
        metric_period(policy, clock.speed)
        region = places.get("aws_region", WorldOptions.aws_region)
        stages = Stages(policy.latency)
        batcher = HttpBatcher(given.batcher_url) if given.batcher_url else None
        requests = Requests(policy, stages, batcher, given.seed) if batcher else None
        if given.scenario == BATCH_LATENCY and requests is None:
            raise ValueError(f"scenario {BATCH_LATENCY}: needs --batcher-url, or $RUNBOOKS_SIMULATOR_BATCHER_URL")
        control = _Control(stages, requests)
        if given.scenario == BATCH_LATENCY and policy.batcher.max_lost_share < batch_latency.MAX_LOST_SHARE:
            _log.warning(
                "batcher.max_lost_share: %g: the batcher will stop packing by itself; this scenario is set for %g",
                policy.batcher.max_lost_share,
                batch_latency.MAX_LOST_SHARE,
            )
        quotas = {model.provisioned_model_id: model.ceiling_units for model in policy.models.values()}
        config = AwsConfig(host=given.host, port=given.port, speed=clock.speed, region=region, model_unit_quotas=quotas)
        if given.scenario == BATCH_LATENCY:
            config = config.model_copy(update={"converse": batch_latency.converse()})
        routes: dict[str, Route] = {
            "ready": control.ready,
            "traffic": control.traffic,
            "latency": control.latency,
            "requests": control.requests,
        }
        aws = AwsSimulator(config, routes)
    except ValueError as error:
        parser.error(str(error))
    with aws:
        options = WorldOptions(
            aws_endpoint_url=aws.endpoint_url.replace("//0.0.0.0:", "//127.0.0.1:"),
            seed=given.seed,
            release_spike=given.scenario == "release-spike",
            scaling_lag=given.scenario == SCALING_LAG,
            batch_latency=given.scenario == BATCH_LATENCY,
            peak_multiplier=given.peak_multiplier,
            spike_minutes=given.spike_minutes,
            usual_tokens_per_second=given.usual_load,
            event_row=Row(given.event_row),
            **places,
        )
        world = World(options, clock, policy, stages=stages, requests=requests)
        made = _seed(world, stop)
        if made is None:
            return
        aws.world.trail.clear()  # all of that was done long ago
        if options.scaling_lag:
            aws.world.faults.add(scaling_lag.fault())
            aws.world.trail.add(
                scaling_lag.role_change(datetime.now(UTC) - scaling_lag.ROLE_CHANGED_BEFORE / clock.speed)
            )
        gc.freeze()  # what is loaded stays: the collector's pauses would be part of every answer
        control.opens(world, made)
        _log.info("AWS at %s, business time %s", aws.endpoint_url, clock.business(datetime.now(UTC)).isoformat())
        if requests is not None and batcher is not None:
            threading.Thread(target=live, args=(requests, batcher, stop), name="requests", daemon=True).start()
        world.run(stop)


if __name__ == "__main__":
    main()
