"""Proves who acts: a signed token's subject, never a name somebody typed."""

from pathlib import Path

import jwt

ALGORITHM = "HS256"
AUDIENCE = "runbooks"
_SHORTEST_KEY_BYTES = 32


class TokenRefused(Exception):
    """The token proves nothing; the message says why."""


def read_key(path: Path) -> bytes:
    """The signing key in that file, without surrounding white space.

    Raises:
        TokenRefused: it cannot be read or is shorter than 32 bytes.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise TokenRefused(f"token key file {path}: {error.strerror}") from error
    if len(key) < _SHORTEST_KEY_BYTES:
        raise TokenRefused(f"token key file {path}: {len(key)} bytes, at least {_SHORTEST_KEY_BYTES} are needed")
    return key


def verify(token: str, key: bytes) -> str:
    """The verified subject of `token`.

    Raises:
        TokenRefused: wrong signature, expired, made for something else, incomplete or no token at all.
    """
    try:
        claims = jwt.decode(
            token.strip(),
            key,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            options={"require": ["sub", "exp", "aud"]},
        )
    except jwt.ExpiredSignatureError as error:
        raise TokenRefused("the token has expired: get a new one") from error
    except jwt.InvalidSignatureError as error:
        raise TokenRefused("the token was signed with another key") from error
    except jwt.InvalidTokenError as error:
        raise TokenRefused(f"not a usable token: {error}") from error
    subject = claims["sub"]
    if not subject:
        raise TokenRefused("not a usable token: its subject is empty")
    return str(subject)
