"""One step around every operation that moto serves: faults before and after it, the audit trail behind it."""

import json
import re
from typing import Any

from moto.core.errors import COMMON_ERROR_CODES
from moto.core.responses import ActionResult, BaseResponse

from simulator.aws import iam
from simulator.aws.errors import AwsError
from simulator.aws.faults import Fault, FaultKind
from simulator.aws.trail import RESIDENT_KEY
from simulator.aws.world import ACCOUNT_ID, ENVIRON_KEY, World

_QUERY_SERVICES = frozenset({"cloudwatch", "iam", "sns", "sts"})
"""Their access-denied code has no `Exception` at its end."""


_ERROR_CODE = re.compile(r'"__type": "(?:[^"#]*#)?(?P<json>\w+)|<Code>(?P<xml>[\w.]+)')


class ConnectionDropped(ConnectionError):
    """No answer is sent; the connection is closed."""


def dispatch(self: BaseResponse, request: Any, full_url: str | None = None, headers: Any = None) -> Any:
    """Stands in for `BaseResponse._dispatch`."""
    self.setup_class(request, full_url, headers)
    world: World | None = request.environ.get(ENVIRON_KEY)
    if world is None:
        return self.call_action()
    service = self.boto3_service_name
    operation = self._get_action() or ""
    fault = None if self.access_key == RESIDENT_KEY else world.faults.take(service, operation)
    if fault is not None and fault.delay_ms:
        world.stopping.wait(fault.delay_ms / 1000)
    if fault is not None and fault.kind is not FaultKind.LOST_ANSWER:
        answer = _refusal(self, world, fault, service, operation)
    elif denied := iam.refused(self, service, operation, _parameters(self)):
        who, need = denied
        answer = _access_denied(self, who, service, need.action, need.resource)
    else:
        answer = self.call_action()
    if world.trail.records(service, operation):
        world.trail.record(service, operation, self.access_key, _parameters(self), _error_code(answer))
    if fault is not None and fault.kind is FaultKind.LOST_ANSWER:
        raise ConnectionDropped("answer lost on purpose")
    return answer


def _refusal(response: BaseResponse, world: World, fault: Fault, service: str, operation: str) -> Any:
    if fault.kind is FaultKind.TIMEOUT:
        raise ConnectionDropped("timed out on purpose")
    if fault.kind is FaultKind.THROTTLING:
        error = AwsError("ThrottlingException", "Rate exceeded")
        return response.serialized(ActionResult(error))
    if fault.kind is FaultKind.NOT_FOUND:
        error = AwsError("ResourceNotFoundException", "The model was not found, on purpose.")
        return response.serialized(ActionResult(error))
    if fault.kind is FaultKind.SERVER_ERROR:
        error = AwsError("InternalServerException", "The service failed on purpose.")
        _, answered, body = response.serialized(ActionResult(error))
        return 500, answered, body
    action = f"{iam.prefix(service)}:{operation}"
    return _access_denied(response, world.settings.principal_arn, service, action, _resource(response, service))


def _access_denied(response: BaseResponse, who: str, service: str, action: str, resource: str) -> Any:
    code = "AccessDenied" if service in _QUERY_SERVICES else "AccessDeniedException"
    message = (
        f"User: {who} is not authorized to perform: {action} on resource: {resource} "
        f"because no identity-based policy allows the {action} action"
    )
    status, answered, body = response.serialized(ActionResult(AwsError(code, message)))
    return 403 if service in _QUERY_SERVICES else status, answered, body


def _resource(response: BaseResponse, service: str) -> str:
    parameters = _parameters(response)
    if service == "bedrock" and "modelId" in parameters:
        return f"arn:aws:bedrock:{response.region}::foundation-model/{parameters['modelId']}"
    for value in parameters.values():
        if isinstance(value, str) and value.startswith("arn:"):
            return value
    return f"arn:aws:{service}:{response.region}:{ACCOUNT_ID}:*"


def _parameters(response: BaseResponse) -> dict[str, Any]:
    """The call's parameters, as far as moto parsed them or its body is JSON."""
    parsed = getattr(response, "params", None)
    if parsed is None:
        try:
            parsed = json.loads(response.body or "{}")
        except ValueError:
            parsed = {}
    return {**response.uri_match, **parsed}


def _error_code(answer: Any) -> str | None:
    status, _, body = answer
    if int(status) < 400:
        return None
    match = _ERROR_CODE.search(body if isinstance(body, str) else body.decode(errors="replace"))
    return match["json"] or match["xml"] if match else f"HTTP {status}"


def install() -> None:
    """Put it around every response class that does not dispatch by itself. Before the server starts."""
    for code in ("AccessDenied", "AccessDeniedException", "InternalServerException", "ThrottlingException"):
        if code not in COMMON_ERROR_CODES:  # else moto warns where a service's model does not have it
            COMMON_ERROR_CODES.append(code)
    BaseResponse._dispatch = dispatch  # type: ignore[method-assign]
