"""`python -m simulator.aws --port N`: the AWS endpoint alone, until SIGTERM or Ctrl-C."""

import argparse
import logging
import signal
import threading

from simulator.aws.server import AwsSimulator
from simulator.aws.world import AwsConfig


def main() -> None:
    """Serve until told to stop; exits 1 when the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m simulator.aws", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5566, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--region", default="ap-northeast-1")
    parser.add_argument("--speed", type=float, default=60, help="business seconds per real second")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = AwsConfig(host=options.host, port=options.port, region=options.region, speed=options.speed)
    try:
        simulator = AwsSimulator(config).start()
    except OSError as error:
        raise SystemExit(f"port {options.port} on {options.host} cannot be used: {error}") from error
    print(f"AWS simulator at {simulator.endpoint_url}", flush=True)
    stop.wait()
    simulator.stop()


if __name__ == "__main__":
    main()
