"""SNS: one signing key for all subscriptions. moto draws an RSA key at each one's first message, which takes long."""

from functools import cache

from cryptography.hazmat.primitives.asymmetric import rsa
from moto.sns.models import Subscription


@cache
def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    _key()
    Subscription.private_key = lambda self: _key()  # type: ignore[method-assign, assignment]
