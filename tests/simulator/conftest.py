"""Fixtures of the simulator's contract tests."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from simulator.aws import AwsConfig, AwsSimulator
from tests.aws_account import Account


@pytest.fixture(scope="session")
def aws_simulator() -> Iterator[AwsSimulator]:
    """One simulator for all tests of a process: moto has one account in it. Sixty times as fast as life."""
    config = AwsConfig(
        provisioning_lag=timedelta(seconds=18), task_start=timedelta(seconds=18), alarm_tick=timedelta(milliseconds=50)
    )
    with AwsSimulator(config) as simulator:
        yield simulator


@pytest.fixture(scope="session")
def _clients(aws_simulator: AwsSimulator) -> Account:
    return Account(aws_simulator.endpoint_url)


@pytest.fixture
def account(aws_simulator: AwsSimulator, _clients: Account) -> Account:
    """An empty account."""
    aws_simulator.reset()
    return _clients
