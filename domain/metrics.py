"""The one vocabulary of metrics: what the data plane publishes, alarms watch, evidence reads and plots show.

Names are the runbooks' own. Sources: the detection tables of scenarios 1 to 5; AWS's pages on Bedrock and ECS
Container Insights metrics. `RunningTaskCount` is a Container Insights metric, not one of `AWS/ECS`.
"""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

MANGA_ASSIST = "MangaAssist"
BEDROCK = "AWS/Bedrock"
CONTAINER_INSIGHTS = "ECS/ContainerInsights"


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
    CONTROL_PLANE_HEARTBEAT = "ControlPlaneHeartbeat"
    PROVISIONING_FAILURES = "ProvisioningFailures"
    QUEUE_WAIT_TIME = "QueueWaitTime"
    BATCH_FILL_RATE = "BatchFillRate"
    BATCH_SIZE = "BatchSize"
    BATCH_WINDOW = "BatchWindow"
    BATCH_LATENCY = "BatchInvocationLatency"
    TOKENS_PER_INTENT = "TokensPerIntent"
    BATCHER_THROTTLES = "BatcherThrottles"
    COALESCED_REQUESTS = "CoalescedRequests"
    SHED_REQUESTS = "ShedRequests"
    PACKING_SUSPENDED = "PackingSuspended"


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


_ALL = (
    Metric(
        namespace=BEDROCK,
        name=MetricName.INVOCATION_THROTTLES,
        unit="Count",
        dimensions=("ModelId",),
        statistic="Sum",
        meaning="calls refused with ThrottlingException, retries included; not counted in Invocations",
    ),
    Metric(
        namespace=BEDROCK,
        name=MetricName.INVOCATIONS,
        unit="Count",
        dimensions=("ModelId",),
        statistic="Sum",
        meaning="calls answered",
    ),
    Metric(
        namespace=BEDROCK,
        name=MetricName.INVOCATION_LATENCY,
        unit="Milliseconds",
        dimensions=("ModelId",),
        statistic="p99",
        meaning="from the call to the last token",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.TOKENS_PER_SECOND,
        unit="Count/Second",
        dimensions=("Model",),
        statistic="Average",
        meaning="tokens/s sent to the model after cache and routing, client retries included",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.OFFERED_TOKENS_PER_SECOND,
        unit="Count/Second",
        dimensions=("Intent",),
        statistic="Average",
        meaning="tokens/s users ask for of one intent, before cache, routing and retries",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.CAPACITY_TOKENS_PER_SECOND,
        unit="Count/Second",
        dimensions=("Model",),
        statistic="Average",
        meaning="tokens/s the data plane can have answered: routed provisioned units plus on-demand quota",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.INVOCATIONS_PER_TASK,
        unit="Count/Second",
        statistic="Average",
        meaning="calls to Bedrock that one ECS task makes, refused ones included",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BEDROCK_QUEUE_DEPTH,
        unit="Count",
        statistic="Maximum",
        meaning="requests waiting for Bedrock",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.REQUEST_LATENCY_P99,
        unit="Milliseconds",
        statistic="Maximum",
        meaning="P99 from the user's message to the answer",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.FALLBACK_RATE,
        unit="Percent",
        statistic="Average",
        meaning="answers that were the fallback text",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.CACHE_HIT_RATE,
        unit="Percent",
        statistic="Average",
        meaning="requests answered from the response cache",
    ),
    Metric(
        namespace=CONTAINER_INSIGHTS,
        name=MetricName.RUNNING_TASK_COUNT,
        unit="Count",
        dimensions=("ClusterName", "ServiceName"),
        statistic="Average",
        meaning="running ECS tasks of the orchestrator",
    ),
    Metric(
        namespace=CONTAINER_INSIGHTS,
        name=MetricName.DESIRED_TASK_COUNT,
        unit="Count",
        dimensions=("ClusterName", "ServiceName"),
        statistic="Average",
        meaning="desired ECS tasks of the orchestrator",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.CONTROL_PLANE_HEARTBEAT,
        unit="Count",
        statistic="Sum",
        meaning="health checks of the runbooks' own stack that came to their end",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.PROVISIONING_FAILURES,
        unit="Count",
        dimensions=("Model",),
        statistic="Maximum",
        meaning="provisioned models that AWS failed to create, and writers of capacity that cannot do what they should",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.QUEUE_WAIT_TIME,
        unit="Milliseconds",
        dimensions=("Model",),
        statistic="p99",
        meaning="a request's wait in the batcher, for mates and for a slot",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BATCH_FILL_RATE,
        unit="Count",
        dimensions=("Model",),
        statistic="Average",
        meaning="requests in a batch; its sample count is the batches",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BATCH_SIZE,
        unit="Count",
        dimensions=("Model",),
        statistic="Maximum",
        meaning="requests that make a batch full",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BATCH_WINDOW,
        unit="Milliseconds",
        dimensions=("Model",),
        statistic="Maximum",
        meaning="the longest that a request waits for mates; why it changed is in the batcher's log and /v1/state",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BATCH_LATENCY,
        unit="Milliseconds",
        dimensions=("Model", "Intent"),
        statistic="p99",
        meaning="from a slot to the answers of a batch with requests of the intent, retries included",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.TOKENS_PER_INTENT,
        unit="Count",
        dimensions=("Intent", "Direction"),
        statistic="Average",
        meaning="input or output tokens of an answer, by the response's own usage",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.BATCHER_THROTTLES,
        unit="Count",
        dimensions=("Model",),
        statistic="Sum",
        meaning="the batcher's calls that Bedrock refused, retries included",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.COALESCED_REQUESTS,
        unit="Count",
        dimensions=("Intent",),
        statistic="Sum",
        meaning="requests that shared the call of an equal one",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.SHED_REQUESTS,
        unit="Count",
        dimensions=("Reason",),
        statistic="Sum",
        meaning="requests that the batcher gave no answer",
    ),
    Metric(
        namespace=MANGA_ASSIST,
        name=MetricName.PACKING_SUSPENDED,
        unit="Count",
        dimensions=("Intent",),
        statistic="Maximum",
        meaning="1 while an intent is not packed because too many packed answers were lost",
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
        MetricName.BATCH_LATENCY,
        MetricName.TOKENS_PER_INTENT,
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
