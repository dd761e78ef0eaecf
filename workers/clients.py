"""AWS clients with deliberate timeouts and no retries of their own, kept warm."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workers.settings import Settings

if TYPE_CHECKING:
    from types_boto3_bedrock.client import BedrockClient
    from types_boto3_bedrock_runtime.client import BedrockRuntimeClient
    from types_boto3_cloudtrail.client import CloudTrailClient
    from types_boto3_cloudwatch.client import CloudWatchClient
    from types_boto3_dynamodb.client import DynamoDBClient
    from types_boto3_ecs.client import ECSClient
    from types_boto3_sns.client import SNSClient
    from types_boto3_sqs.client import SQSClient
    from types_boto3_sts.client import STSClient


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class AwsClients:
    """One client per service, made on first use. boto3 clients may be shared between threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._session = boto3.session.Session(region_name=settings.aws_region)
        self._clients: dict[str, Any] = {}

    def warm(self) -> None:
        """Connect to what stands between an alarm and its levers. Whatever fails now, the first use will tell."""
        with suppress(BotoCoreError, ClientError):
            self.cloudwatch().get_metric_data(MetricDataQueries=[], StartTime=_EPOCH, EndTime=_EPOCH)
        with suppress(BotoCoreError, ClientError):
            self.bedrock().list_provisioned_model_throughputs(maxResults=1)

    def _client(self, service: str, read_timeout_seconds: float = 4) -> Any:
        if service not in self._clients:
            self._clients[service] = self._new(service, read_timeout_seconds)
        return self._clients[service]

    def _new(self, service: str, read_timeout_seconds: float, connections: int = 32) -> Any:
        # A Temporal retry policy is the only one; read timeouts stay under the activities' own.
        config = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=read_timeout_seconds,
            max_pool_connections=connections,
            tcp_keepalive=True,
        )
        return self._session.client(service, endpoint_url=self._settings.aws_endpoint_url, config=config)  # type: ignore[call-overload]

    def client(self, service: str) -> Any:
        """The client of a service by its boto3 name."""
        return getattr(self, service)()

    def bedrock(self) -> "BedrockClient":
        """Management API of Bedrock."""
        client: BedrockClient = self._client("bedrock", read_timeout_seconds=8)
        return client

    def bedrock_runtime(self, connections: int = 32, read_timeout_seconds: float = 30) -> "BedrockRuntimeClient":
        """A client of its own for calls to models, as many at once as there are `connections`."""
        client: BedrockRuntimeClient = self._new("bedrock-runtime", read_timeout_seconds, connections)
        return client

    def cloudwatch(self) -> "CloudWatchClient":
        """Metrics and alarms."""
        client: CloudWatchClient = self._client("cloudwatch")
        return client

    def ecs(self) -> "ECSClient":
        """The orchestrator's service."""
        client: ECSClient = self._client("ecs")
        return client

    def dynamodb(self) -> "DynamoDBClient":
        """The event calendar."""
        client: DynamoDBClient = self._client("dynamodb")
        return client

    def cloudtrail(self) -> "CloudTrailClient":
        """Recent changes."""
        client: CloudTrailClient = self._client("cloudtrail")
        return client

    def sns(self) -> "SNSClient":
        """Pages."""
        client: SNSClient = self._client("sns")
        return client

    def sqs(self) -> "SQSClient":
        """Alarm messages: the read timeout outlasts a long poll."""
        client: SQSClient = self._client("sqs", read_timeout_seconds=30)
        return client

    def sts(self) -> "STSClient":
        """Who calls."""
        client: STSClient = self._client("sts")
        return client

    def iam(self) -> Any:
        """What the caller's role may do."""
        return self._client("iam")
