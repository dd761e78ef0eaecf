"""The AWS endpoint itself: what it takes from moto, how it serves, starts and stops."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import moto
import pytest
from moto.bedrock import urls as bedrock_urls
from moto.core.responses import BaseResponse

from domain.policy import Policy
from simulator.aws import AwsConfig, AwsSimulator
from simulator.aws.bedrock import ProvisionedBedrockResponse
from tests.aws_account import Account


def test_moto_is_the_version_whose_private_parts_are_used(aws_simulator: AwsSimulator) -> None:
    """A newer moto may work: run all contract tests, then change the pin here and in pyproject.toml together."""
    assert moto.__version__ == "5.2.5"
    handlers = {getattr(handler, "__self__", None) for handler in bedrock_urls.url_paths.values()}
    assert ProvisionedBedrockResponse in handlers
    assert BaseResponse._dispatch.__module__ == "simulator.aws.dispatch"


def test_connections_are_kept(account: Account) -> None:
    """Several answers over one connection, in whole, with their length."""
    connection = http.client.HTTPConnection(str(urlsplit(account.endpoint_url).netloc), timeout=20)
    connection.connect()
    kept = connection.sock
    for _ in range(3):
        connection.request("GET", "/_simulator/ready")
        assert json.load(connection.getresponse()) == {"env": {}}
        assert connection.sock is kept
    connection.close()


def test_a_message_wakes_one_of_two_pollers(account: Account) -> None:
    """SQS developer guide, "visibility timeout": what one consumer has, another does not get meanwhile."""
    url, _ = account.queue("alarms")
    sqs = account.client("sqs")
    with ThreadPoolExecutor(2) as pool:
        polls = [pool.submit(sqs.receive_message, QueueUrl=url, WaitTimeSeconds=10) for _ in range(2)]
        for number in range(2):
            sqs.send_message(QueueUrl=url, MessageBody=str(number))
        received = [message["Body"] for poll in polls for message in poll.result().get("Messages", [])]
    assert sorted(received) == ["0", "1"]


def test_motos_reset_empties_everything(account: Account) -> None:
    """`POST /moto-api/reset`, also for what is ours."""
    model = Policy().models["sonnet"]
    account.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName="base", modelUnits=model.ceiling_units, modelId=model.provisioned_model_id
    )
    account.client("cloudwatch").put_metric_data(Namespace="n", MetricData=[{"MetricName": "m", "Value": 1}])
    account.control("POST", "faults", {"service": "sns", "kind": "throttling"})
    account.control("POST", "bedrock", {"quotas": {model.provisioned_model_id: 0}})
    address = urlsplit(account.endpoint_url)
    connection = http.client.HTTPConnection(str(address.netloc), timeout=20)
    connection.request("POST", "/moto-api/reset")
    assert connection.getresponse().status == 200
    connection.close()
    assert account.client("bedrock").list_provisioned_model_throughputs()["provisionedModelSummaries"] == []
    assert account.client("cloudwatch").list_metrics()["Metrics"] == []
    assert account.control("GET", "faults") == []
    assert account.control("GET", "trail") == []
    assert account.control("GET", "bedrock")["quotas"][model.provisioned_model_id] == model.ceiling_units


def test_one_simulator_in_a_process(aws_simulator: AwsSimulator) -> None:
    """moto's state is global: a second one would be the same account."""
    with pytest.raises(RuntimeError, match="one per process"):
        AwsSimulator(AwsConfig()).start()


def test_the_process_starts_serves_and_ends() -> None:
    """`python -m simulator.aws`: says where it is, ends on SIGTERM although a client keeps its connection."""
    command = [sys.executable, "-m", "simulator.aws", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = urlsplit(line.split()[-1])
        connection = http.client.HTTPConnection(str(address.netloc), timeout=20)
        connection.request("GET", "/_simulator/ready")
        assert connection.getresponse().read() == b'{"env": {}}'
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert connection.sock.recv(1) == b""
        connection.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=1)
    finally:
        process.kill()
        process.wait()


def test_a_taken_port_is_said() -> None:
    """Exit 1 and a sentence."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "simulator.aws", "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in ended.stderr


def test_a_killed_poller_takes_nothing(account: Account) -> None:
    """SQS developer guide, "long polling": it ends with its connection; what comes then is for the next poller."""
    url, _ = account.queue("alarms")
    sqs = account.client("sqs")
    poller = http.client.HTTPConnection(str(urlsplit(account.endpoint_url).netloc), timeout=20)
    headers = {
        "X-Amz-Target": "AmazonSQS.ReceiveMessage",
        "Content-Type": "application/x-amz-json-1.0",
        "Authorization": f"AWS4-HMAC-SHA256 Credential=test/20260101/{account.region}/sqs/aws4_request, Signature=0",
    }
    poller.request("POST", "/", json.dumps({"QueueUrl": url, "WaitTimeSeconds": 20}), headers)
    time.sleep(0.2)  # until it waits
    poller.close()
    sqs.send_message(QueueUrl=url, MessageBody="for the living")
    received = sqs.receive_message(QueueUrl=url, WaitTimeSeconds=2).get("Messages", [])
    assert [message["Body"] for message in received] == ["for the living"]
