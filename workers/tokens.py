"""Proves who acts: the subject of a signed token, or of an opaque one that the roster knows by its hash."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import jwt

from domain.people import Roster

ALGORITHM = "HS256"
AUDIENCE = "runbooks"
_SHORTEST_KEY_BYTES = 32
_DOTS_IN_A_SIGNED_TOKEN = 2


class TokenRefused(Exception):
    """The token proves nothing; the message says why."""


class KeyUnusable(TokenRefused):
    """No token can be verified here."""


def read_key(path: Path) -> bytes:
    """The signing key in that file, without surrounding white space.

    Raises:
        KeyUnusable: it cannot be read or is shorter than 32 bytes.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise KeyUnusable(f"token key file {path}: {error.strerror}") from error
    if len(key) < _SHORTEST_KEY_BYTES:
        raise KeyUnusable(f"token key file {path}: {len(key)} bytes, at least {_SHORTEST_KEY_BYTES} are needed")
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


def identify(token: str, key_file: Path | None, roster: Callable[[], Roster]) -> str:
    """The verified subject of a signed or an opaque token.

    An opaque token is a long random text (`openssl rand -hex 32`), so that a plain hash of it gives nothing away.
    `roster` is asked only for one; its errors pass.

    Raises:
        TokenRefused: as `verify` and `read_key`; or nobody knows the token, or no key is configured.
    """
    token = token.strip()
    if token.count(".") != _DOTS_IN_A_SIGNED_TOKEN:
        subject = roster().api_tokens.get(sha256(token.encode()).hexdigest())
        if not subject:
            raise TokenRefused("not a usable token: it is not signed, and the roster does not know it")
        return subject
    if key_file is None:
        raise KeyUnusable("signed tokens cannot be verified: RUNBOOKS_TOKEN_KEY_FILE names no key")
    return verify(token, read_key(key_file))
