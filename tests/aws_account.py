"""A simulated AWS account as contract tests see it: boto3 over HTTP, and the control path."""

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import boto3
from botocore.config import Config

from domain.calendar import EVENT_TABLE_KEY

T = TypeVar("T")


class Account:
    """boto3 clients and the control path of one simulator. Nothing is retried."""

    region = "ap-northeast-1"

    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """A client of `service`."""
        if service not in self._clients:
            config = Config(retries={"total_max_attempts": 1}, read_timeout=20)
            session = boto3.session.Session("test", "test", region_name=self.region)
            made: Any = session.client(service, endpoint_url=self.endpoint_url, config=config)  # type: ignore[call-overload]
            self._clients[service] = made
        return self._clients[service]

    def control(self, method: str, path: str, body: object = None) -> Any:
        """A call to `/_simulator/`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint_url}/_simulator/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def event_table(self, name: str) -> None:
        """A new table for the event calendar."""
        self.client("dynamodb").create_table(
            TableName=name,
            KeySchema=[{"AttributeName": EVENT_TABLE_KEY, "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": EVENT_TABLE_KEY, "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )

    def queue(self, name: str) -> tuple[str, str]:
        """A new queue's URL and ARN."""
        url = self.client("sqs").create_queue(QueueName=name)["QueueUrl"]
        return url, f"arn:aws:sqs:{self.region}:123456789012:{name}"

    def messages(self, url: str, count: int) -> list[Any]:
        """The next `count` bodies in a queue, decoded; fails when they do not come."""
        bodies: list[Any] = []
        deadline = time.monotonic() + 40
        while len(bodies) < count:
            assert time.monotonic() < deadline, f"{len(bodies)} of {count} messages came: {bodies}"
            answer = self.client("sqs").receive_message(QueueUrl=url, WaitTimeSeconds=1, MaxNumberOfMessages=10)
            for message in answer.get("Messages", []):
                bodies.append(json.loads(message["Body"]))
                self.client("sqs").delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return bodies


def eventually(read: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """What `read` gives once it is `wanted`; fails after 40 s."""
    deadline = time.monotonic() + 40
    while not wanted(found := read()):
        assert time.monotonic() < deadline, f"still {found!r}"
        time.sleep(0.02)
    return found
