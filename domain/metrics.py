"""The one vocabulary of metrics: what the data plane publishes, alarms watch, evidence reads and plots show.

Names are the runbooks' own. Sources: the detection tables of scenarios 1 to 5; AWS's pages on Bedrock, ECS Container
Insights, ElastiCache, OpenSearch Service, DynamoDB and WebSocket API metrics. `RunningTaskCount` is a Container
Insights metric, not one of `AWS/ECS`.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

MANGA_ASSIST = "MangaAssist"
BEDROCK = "AWS/Bedrock"
CONTAINER_INSIGHTS = "ECS/ContainerInsights"
ECS = "AWS/ECS"
ELASTICACHE = "AWS/ElastiCache"
OPENSEARCH = "AWS/ES"
DYNAMODB = "AWS/DynamoDB"
API_GATEWAY = "AWS/ApiGateway"


class MetricName(StrEnum):
    """Every metric the product reads or writes, by its CloudWatch name."""

    INVOCATION_THROTTLES = "InvocationThrottles"
    INVOCATIONS = "Invocations"
    INVOCATION_LATENCY = "InvocationLatency"
    TOKENS_PER_SECOND = "TokensPerSecond"
    OFFERED_TOKENS_PER_SECOND = "OfferedTokensPerSecond"
    CAPACITY_TOKENS_PER_SECOND = "CapacityTokensPerSecond"
    INVOCATIONS_PER_TASK = "InvocationsPerTask"
    BEDROCK_QUEUE_DEPTH = "BedrockQueueDepth"
    REQUEST_LATENCY_P99 = "RequestLatencyP99"
    FALLBACK_RATE = "FallbackRate"
    CACHE_HIT_RATE = "CacheHitRate"
    RUNNING_TASK_COUNT = "RunningTaskCount"
    DESIRED_TASK_COUNT = "DesiredTaskCount"
    CPU_UTILIZATION = "CPUUtilization"
    CONTROL_PLANE_HEARTBEAT = "ControlPlaneHeartbeat"
    PROVISIONING_FAILURES = "ProvisioningFailures"
    QUEUE_WAIT_TIME = "QueueWaitTime"
    BATCH_FILL_RATE = "BatchFillRate"
    BATCH_SIZE = "BatchSize"
    BATCH_WINDOW = "BatchWindow"
    BATCH_WINDOW_CHANGES = "BatchWindowChanges"
    BATCH_LATENCY = "BatchInvocationLatency"
    TOKENS_PER_INTENT = "TokensPerIntent"
    BATCHER_CALLS = "BatcherCalls"
    BATCHER_THROTTLES = "BatcherThrottles"
    COALESCED_REQUESTS = "CoalescedRequests"
    SHED_REQUESTS = "ShedRequests"
    PACKING_SUSPENDED = "PackingSuspended"
    STAGE_LATENCY = "StageLatency"
    REDIS_READ_LATENCY = "SuccessfulReadRequestLatency"
    REDIS_CONNECTIONS = "CurrConnections"
    OPENSEARCH_LATENCY = "SearchLatency"
    DYNAMODB_LATENCY = "SuccessfulRequestLatency"
    INTEGRATION_LATENCY = "IntegrationLatency"


class Metric(BaseModel):
    """One CloudWatch metric: where it stands, in which unit, read with which statistic."""

    model_config = ConfigDict(frozen=True)

    namespace: str
    name: MetricName
    unit: str
    """A CloudWatch unit."""
    dimensions: tuple[str, ...] = ()
    """Dimension names, in order. Empty: one series for the whole service."""
    statistic: str
    """The statistic that alarms and evidence read, e.g. `Sum`, `Average`, `Maximum`."""
    meaning: str


def _bedrock(name: MetricName, unit: str, statistic: str, meaning: str) -> Metric:
    return Metric(
        namespace=BEDROCK, name=name, unit=unit, dimensions=("ModelId",), statistic=statistic, meaning=meaning
    )


def _tasks(name: MetricName, meaning: str) -> Metric:
    where = ("ClusterName", "ServiceName")
    return Metric(
        namespace=CONTAINER_INSIGHTS, name=name, unit="Count", dimensions=where, statistic="Average", meaning=meaning
    )


def _manga(name: MetricName, unit: str, statistic: str, meaning: str, *dimensions: str) -> Metric:
    return Metric(
        namespace=MANGA_ASSIST, name=name, unit=unit, dimensions=dimensions, statistic=statistic, meaning=meaning
    )


_ALL = (
    _bedrock(
        MetricName.INVOCATION_THROTTLES,
        "Count",
        "Sum",
        "calls refused with ThrottlingException, retries included; not counted in Invocations",
    ),
    _bedrock(MetricName.INVOCATIONS, "Count", "Sum", "calls answered"),
    _bedrock(MetricName.INVOCATION_LATENCY, "Milliseconds", "p99", "from the call to the last token"),
    _manga(
        MetricName.TOKENS_PER_SECOND,
        "Count/Second",
        "Average",
        "tokens/s sent to the model after cache and routing, client retries included",
        "Model",
    ),
    _manga(
        MetricName.OFFERED_TOKENS_PER_SECOND,
        "Count/Second",
        "Average",
        "tokens/s users ask for of one intent, before cache, routing and retries",
        "Intent",
    ),
    _manga(
        MetricName.CAPACITY_TOKENS_PER_SECOND,
        "Count/Second",
        "Average",
        "tokens/s the data plane can have answered: routed provisioned units plus on-demand quota",
        "Model",
    ),
    _manga(
        MetricName.INVOCATIONS_PER_TASK,
        "Count/Second",
        "Average",
        "calls to Bedrock that one ECS task makes, refused ones included",
    ),
    _manga(MetricName.BEDROCK_QUEUE_DEPTH, "Count", "Maximum", "requests waiting for Bedrock"),
    _manga(MetricName.REQUEST_LATENCY_P99, "Milliseconds", "Maximum", "P99 from the user's message to the answer"),
    _manga(MetricName.FALLBACK_RATE, "Percent", "Average", "answers that were the fallback text"),
    _manga(MetricName.CACHE_HIT_RATE, "Percent", "Average", "requests answered from the response cache"),
    _tasks(MetricName.RUNNING_TASK_COUNT, "running ECS tasks of the orchestrator"),
    _tasks(MetricName.DESIRED_TASK_COUNT, "desired ECS tasks of the orchestrator"),
    # AWS: "Amazon ECS CloudWatch metrics".
    Metric(
        namespace=ECS,
        name=MetricName.CPU_UTILIZATION,
        unit="Percent",
        dimensions=("ClusterName", "ServiceName"),
        statistic="Average",
        meaning="CPU that the orchestrator's tasks use, of what they reserve",
    ),
    _manga(
        MetricName.CONTROL_PLANE_HEARTBEAT,
        "Count",
        "Sum",
        "health checks of the runbooks' own stack that came to their end",
    ),
    _manga(
        MetricName.PROVISIONING_FAILURES,
        "Count",
        "Maximum",
        "provisioned models that AWS failed to create, and writers of capacity that cannot do what they should",
        "Model",
    ),
    _manga(
        MetricName.QUEUE_WAIT_TIME,
        "Milliseconds",
        "p99",
        "a request's wait in the batcher, for mates and for a slot",
        "Model",
    ),
    _manga(
        MetricName.BATCH_FILL_RATE, "Count", "Average", "requests in a batch; its sample count is the batches", "Model"
    ),
    _manga(MetricName.BATCH_SIZE, "Count", "Maximum", "requests that make a batch full", "Model"),
    _manga(
        MetricName.BATCH_WINDOW,
        "Milliseconds",
        "Maximum",
        "the longest that a request waits for mates; why it changed is in the batcher's log and /v1/state",
        "Model",
    ),
    _manga(
        MetricName.BATCH_LATENCY,
        "Milliseconds",
        "p99",
        "from a slot to the answers of a batch with requests of the intent, retries included",
        "Model",
        "Intent",
    ),
    _manga(
        MetricName.TOKENS_PER_INTENT,
        "Count",
        "Average",
        "input or output tokens of an answer, by the response's own usage",
        "Intent",
        "Direction",
    ),
    _manga(
        MetricName.BATCH_WINDOW_CHANGES,
        "Count",
        "Sum",
        "changes of the window: by the `controller`, or by the `knob` where that caps it",
        "Model",
        "Cause",
    ),
    _manga(MetricName.BATCHER_CALLS, "Count", "Sum", "the batcher's calls to Bedrock, refused ones included", "Model"),
    _manga(
        MetricName.BATCHER_THROTTLES,
        "Count",
        "Sum",
        "the batcher's calls that Bedrock refused, retries included",
        "Model",
    ),
    _manga(MetricName.COALESCED_REQUESTS, "Count", "Sum", "requests that shared the call of an equal one", "Intent"),
    _manga(MetricName.SHED_REQUESTS, "Count", "Sum", "requests that the batcher gave no answer", "Reason"),
    _manga(
        MetricName.PACKING_SUSPENDED,
        "Count",
        "Maximum",
        "1 while an intent is not packed because too many packed answers were lost",
        "Intent",
    ),
    _manga(
        MetricName.STAGE_LATENCY,
        "Milliseconds",
        "p99",
        "a stage of an answer's way; the stages are `latency.stages` of the policy",
        "Stage",
    ),
    # AWS: "Metrics for Valkey and Redis OSS" (ElastiCache); per node.
    Metric(
        namespace=ELASTICACHE,
        name=MetricName.REDIS_READ_LATENCY,
        unit="Microseconds",
        dimensions=("CacheClusterId",),
        statistic="p99",
        meaning="reads that Redis answered",
    ),
    Metric(
        namespace=ELASTICACHE,
        name=MetricName.REDIS_CONNECTIONS,
        unit="Count",
        dimensions=("CacheClusterId",),
        statistic="Maximum",
        meaning="client connections to Redis; a node takes 65,000",
    ),
    # AWS: "Monitoring OpenSearch cluster metrics with Amazon CloudWatch".
    Metric(
        namespace=OPENSEARCH,
        name=MetricName.OPENSEARCH_LATENCY,
        unit="Milliseconds",
        dimensions=("DomainName", "ClientId"),
        statistic="Average",
        meaning="a shard's search",
    ),
    # AWS: "DynamoDB metrics and dimensions". Within DynamoDB, the network left out; it has no percentiles.
    Metric(
        namespace=DYNAMODB,
        name=MetricName.DYNAMODB_LATENCY,
        unit="Milliseconds",
        dimensions=("TableName", "Operation"),
        statistic="Average",
        meaning="requests that DynamoDB answered",
    ),
    # AWS: "Monitor WebSocket API execution with CloudWatch metrics".
    Metric(
        namespace=API_GATEWAY,
        name=MetricName.INTEGRATION_LATENCY,
        unit="Milliseconds",
        dimensions=("ApiId", "Stage"),
        statistic="Average",
        meaning="from API Gateway's request to the integration to its response",
    ),
)

OURS = frozenset((MetricName.CONTROL_PLANE_HEARTBEAT, MetricName.PROVISIONING_FAILURES))
"""What the control plane publishes about itself; the others come from AWS and from the chatbot."""

BATCHERS = frozenset(
    (
        MetricName.QUEUE_WAIT_TIME,
        MetricName.BATCH_FILL_RATE,
        MetricName.BATCH_SIZE,
        MetricName.BATCH_WINDOW,
        MetricName.BATCH_WINDOW_CHANGES,
        MetricName.BATCH_LATENCY,
        MetricName.TOKENS_PER_INTENT,
        MetricName.BATCHER_CALLS,
        MetricName.BATCHER_THROTTLES,
        MetricName.COALESCED_REQUESTS,
        MetricName.SHED_REQUESTS,
        MetricName.PACKING_SUSPENDED,
        MetricName.CACHE_HIT_RATE,
        MetricName.BEDROCK_QUEUE_DEPTH,
    )
)
"""What the batcher publishes. Without one, the chatbot publishes the last two."""

CATALOGUE: dict[MetricName, Metric] = {metric.name: metric for metric in _ALL}
