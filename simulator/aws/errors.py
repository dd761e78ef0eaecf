"""An error as AWS answers it."""

from moto.core.exceptions import ServiceException


class AwsError(ServiceException):
    """Code and message; the HTTP status comes from the service's model.

    Not raised as moto's own class: that one is looked up by the module it stands in.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
