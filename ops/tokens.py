"""Makes the tokens that `workers/tokens.py` verifies. For rehearsals, and for whoever holds the signing key."""

from datetime import UTC, datetime, timedelta

import jwt

from workers.tokens import ALGORITHM, AUDIENCE


def issue(key: bytes, subject: str, lifetime: timedelta) -> str:
    """A token that proves its bearer to be `subject` until `lifetime` from now."""
    now = datetime.now(UTC)
    claims = {"sub": subject, "aud": AUDIENCE, "iat": now, "exp": now + lifetime}
    return jwt.encode(claims, key, algorithm=ALGORITHM)
