"""A simulated AWS account over HTTP: moto, and what moto lacks or gets wrong for this product."""

from simulator.aws.server import AwsSimulator, NotReady
from simulator.aws.world import AwsConfig

__all__ = ["AwsConfig", "AwsSimulator", "NotReady"]
