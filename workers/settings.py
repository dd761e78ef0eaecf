"""How a process is told where everything is: environment variables with the prefix `RUNBOOKS_`."""

from pathlib import Path

from pydantic import AwareDatetime, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from domain.capacity import MANAGED_BY
from domain.clock import RehearsalClock
from domain.messages import TASK_QUEUE


class Settings(BaseSettings):
    """Where a process finds its servers, files and names; AWS credentials come from boto3's own chain."""

    model_config = SettingsConfigDict(env_prefix="RUNBOOKS_", frozen=True)

    temporal_address: str = "127.0.0.1:7233"
    temporal_namespace: str = "default"
    temporal_ui_url: str = "http://127.0.0.1:8233"
    task_queue: str = TASK_QUEUE
    redis_url: str = "redis://127.0.0.1:6379/0"
    aws_endpoint_url: str | None = None
    """An AWS endpoint to use instead of AWS's own: the simulator's."""
    aws_region: str = "ap-northeast-1"
    owner: str = Field(default=MANAGED_BY, pattern=r"^[A-Za-z0-9_.:/=+@-]{1,100}$")
    """Value of the tag `managed-by` on what we buy: only what carries it is ours to release. Two deployments in one
    account and region need two, or each releases what the other has bought."""
    alarm_queue_url: str | None = None
    dead_letter_queue_url: str | None = None
    event_table: str = "mangaassist-events"
    ecs_cluster: str = "mangaassist"
    ecs_service: str = "orchestrator"
    page_topic_arn: str | None = None
    """SNS topic of the on-call tool; without one, pages stand in the notification log alone."""
    policy_file: Path | None = None
    """YAML with overrides of the policy's defaults; none: the defaults."""
    roster_file: Path | None = None
    """YAML with who may do what; none: nobody may decide anything."""
    token_key_file: Path | None = None
    """Key that people's tokens are verified with."""
    token_file: Path | None = None
    """The token of the person who runs the command line."""
    state_dir: Path = Path(".runbooks")
    """Reports and the notification log."""
    api_reads_per_minute: int = Field(default=600, ge=1)
    """What one caller of the ops API may ask; a change of something counts apart."""
    api_changes_per_minute: int = Field(default=30, ge=1)
    api_refusals_per_minute: int = Field(default=30, ge=1)
    """From one address without a good token."""
    rehearsal_real_start: AwareDatetime | None = None
    rehearsal_business_start: AwareDatetime | None = None
    rehearsal_speed: float = Field(default=1.0, ge=1, le=3600)

    @property
    def clock(self) -> RehearsalClock:
        """The business clock; identity unless a rehearsal sets it."""
        if self.rehearsal_real_start is None or self.rehearsal_business_start is None:
            return RehearsalClock()
        return RehearsalClock(
            real_start=self.rehearsal_real_start,
            business_start=self.rehearsal_business_start,
            speed=self.rehearsal_speed,
        )
