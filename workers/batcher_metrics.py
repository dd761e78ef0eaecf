"""The batcher's metrics to CloudWatch, once a period."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from dataplane.meter import BatchMeter, Totals
from dataplane.metric_data import calls_of, metric_data
from domain.metrics import MANGA_ASSIST
from workers.outages import Outage

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient

_LEAST_SECONDS = 0.5
"""Between two calls, however fast a rehearsal runs."""


class Publisher:
    """What a period's call did not deliver is not sent again: Prometheus has the totals."""

    def __init__(self, meter: BatchMeter, cloudwatch: "CloudWatchClient", every: timedelta, period: timedelta) -> None:
        """`period`: of the alarms that look at them."""
        self._meter = meter
        self._cloudwatch = cloudwatch
        self._seconds = max(every.total_seconds(), _LEAST_SECONDS)
        self._resolution = 60 if period >= timedelta(minutes=1) else 1
        self._sent = Totals()
        self._outage = Outage("CloudWatch")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.publish()

    async def publish(self) -> None:
        """What was counted since the last time."""
        now = self._meter.totals()
        data = metric_data(self._meter, now.since(self._sent), datetime.now(UTC), self._resolution)
        self._sent = now
        try:
            for call in calls_of(data):
                await asyncio.to_thread(self._cloudwatch.put_metric_data, Namespace=MANGA_ASSIST, MetricData=call)  # type: ignore[arg-type]
            self._outage.worked()
        except (BotoCoreError, ClientError) as error:
            self._outage.failed(error)
