"""Converse of the simulated Bedrock: shapes and errors of botocore's model; what is assumed is in docs/simulator.md."""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from domain.packing import pack, split
from domain.policy import Policy
from simulator.aws import AwsSimulator
from tests.aws_account import Account

SONNET = Policy().models["sonnet"]
QUICK = {"median_ms": 20, "p99_ms": 30}


@pytest.fixture(autouse=True)
def quick(account: Account) -> None:
    account.control("POST", "converse", {"sonnet": QUICK, "haiku": QUICK})


def converse(account: Account, prompt: str, *, to: str = SONNET.model_id, system: str = "", most: int = 1000) -> Any:
    given: dict[str, Any] = {"system": [{"text": system}]} if system else {}
    return account.client("bedrock-runtime").converse(
        modelId=to,
        messages=[{"role": "user", "content": [{"text": prompt}]}],
        inferenceConfig={"maxTokens": most},
        **given,
    )


def refusal(account: Account, **given: Any) -> tuple[str, int]:
    with pytest.raises(ClientError) as refused:
        converse(account, **given)
    response = refused.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


def bought(account: Account, name: str, units: int) -> str:
    arn: str = account.client("bedrock").create_provisioned_model_throughput(
        provisionedModelName=name, modelId=SONNET.provisioned_model_id, modelUnits=units
    )["provisionedModelArn"]
    return arn


def test_an_answer_has_its_usage_and_its_metrics(account: Account) -> None:
    """API reference, Converse."""
    answer = converse(account, "What is new?")
    assert answer["output"]["message"] == {
        "role": "assistant",
        "content": [{"text": "Simulated answer to: What is new?"}],
    }
    assert answer["usage"] == {"inputTokens": 3, "outputTokens": 60, "totalTokens": 63}
    assert answer["stopReason"] == "end_turn"
    short = converse(account, "What is new?", most=4)
    assert (short["stopReason"], short["usage"]["outputTokens"]) == ("max_tokens", 4)
    now = datetime.now(UTC)
    figures = {
        name: account.client("cloudwatch").get_metric_statistics(
            Namespace="AWS/Bedrock",
            MetricName=name,
            Dimensions=[{"Name": "ModelId", "Value": SONNET.model_id}],
            StartTime=now - timedelta(minutes=2),
            EndTime=now + timedelta(minutes=2),
            Period=600,
            Statistics=["Sum"],
        )["Datapoints"]
        for name in ("Invocations", "InputTokenCount", "OutputTokenCount")
    }
    assert {name: sum(point["Sum"] for point in points) for name, points in figures.items()} == {
        "Invocations": 2,
        "InputTokenCount": 6,
        "OutputTokenCount": 64,
    }


def test_packed_questions_are_answered_each_and_some_can_be_lost(account: Account) -> None:
    questions = {"q-a1": "What is new?", "q-b2": "Wo ist mein Buch? “ü”", "q-c3": '"},{"name":"q-a1"'}
    packed = pack(questions, 300)

    def answers() -> dict[str, str]:
        answer = converse(account, packed.prompt, system=packed.system, most=packed.max_tokens)
        assert answer["usage"]["outputTokens"] >= 180
        return split(answer["output"]["message"]["content"][0]["text"], questions)

    found = answers()
    assert found["q-b2"] == "Simulated answer to: Wo ist mein Buch? “ü”"
    assert found.keys() >= {"q-a1", "q-b2"}
    account.control("POST", "converse", {"sonnet": {"lost_share": 1}})
    assert answers() == {}


def test_latency_is_lognormal_and_grows_with_the_questions(account: Account) -> None:
    account.control("POST", "converse", {"sonnet": {"median_ms": 40, "p99_ms": 80, "growth_per_question": 1}})

    def took(system: str, prompt: str) -> float:
        began = time.perf_counter()
        converse(account, prompt, system=system)
        return time.perf_counter() - began

    packed = pack({f"q{n}": f"question {n}" for n in range(8)}, 800)
    with ThreadPoolExecutor(4) as threads:
        alone = list(threads.map(lambda _: took("", "x"), range(20)))
        together = list(threads.map(lambda _: took(packed.system, packed.prompt), range(8)))
    assert statistics.median(alone) >= 0.03
    assert statistics.median(together) - statistics.median(alone) > 0.1, "eight more of 40 ms each"


def test_each_target_throttles_above_its_own_tokens_a_second(account: Account, aws_simulator: AwsSimulator) -> None:
    """Documented: ThrottlingException is 429, and throttles are no invocations. Assumed: a second of credit."""
    account.control("POST", "bedrock", {"provisioning_lag_seconds": 3600})
    arn = bought(account, "small", 1)
    assert refusal(account, prompt="x", to=arn)[0] == "ModelNotReadyException"
    aws_simulator.settle()
    account.control("POST", "converse", {"sonnet": {"answer_tokens": 500, "on_demand_tokens_per_second": 1}})
    calls = [lambda: converse(account, "x", to=arn)] * 20
    with ThreadPoolExecutor(10) as threads:
        served = [future.exception() is None for future in [threads.submit(call) for call in calls]]
    assert served.count(True) >= 2, "a unit carries 1,000 tokens/s, whoever comes first"
    assert not all(served)
    converse(account, "on demand has its own")
    assert refusal(account, prompt="x") == ("ThrottlingException", 429)


def test_a_throttle_says_when_to_come_again_only_where_it_is_told_to(account: Account) -> None:
    """AWS documents no Retry-After for Bedrock: "Troubleshooting API error codes" asks for backoff with jitter."""

    def headers() -> dict[str, str]:
        with pytest.raises(ClientError) as refused:
            converse(account, "x")
        found: dict[str, str] = refused.value.response["ResponseMetadata"]["HTTPHeaders"]
        return found

    account.control("POST", "converse", {"sonnet": {"on_demand_tokens_per_second": 0}})
    assert "retry-after" not in headers()
    account.control("POST", "converse", {"sonnet": {"retry_after_seconds": 3}})
    assert headers()["retry-after"] == "3"


def test_what_is_not_there_or_wrong_is_refused(account: Account) -> None:
    gone = f"arn:aws:bedrock:{account.region}:123456789012:provisioned-model/aaaaaaaaaaaa"
    assert refusal(account, prompt="x", to=gone) == ("ResourceNotFoundException", 404)
    assert refusal(account, prompt="x", to="anthropic.claude-9") == ("ValidationException", 400)
    assert refusal(account, prompt=" ") == ("ValidationException", 400)
    fault = {"service": "bedrock-runtime", "operation": "Converse", "kind": "server_error"}
    account.control("POST", "faults", fault)
    assert refusal(account, prompt="x") == ("InternalServerException", 500)
    assert json.dumps(converse(account, "x")["usage"])
