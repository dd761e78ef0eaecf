"""Tokens: made in ops, verified in workers."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest

from domain.people import Role, Roster
from ops.tokens import issue
from workers.tokens import TokenRefused, identify, read_key, verify

KEY = b"k" * 32
IN_AN_HOUR = datetime.now(UTC) + timedelta(hours=1)
GOOD: dict[str, Any] = {"sub": "approver@example.com", "aud": "runbooks", "exp": IN_AN_HOUR}


def signed(key: bytes = KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm)


def test_the_subject_is_proved() -> None:
    assert verify(issue(KEY, "approver@example.com", timedelta(minutes=1)) + "\n", KEY) == "approver@example.com"


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (issue(KEY, "approver@example.com", timedelta(seconds=-1)), "has expired"),
        (signed(key=b"x" * 32), "signed with another key"),
        (signed(aud="another-product"), "[Aa]udience"),
        (signed(exp=None), "exp"),
        (signed(sub=None), "sub"),
        (signed(sub=""), "subject is empty"),
        (jwt.encode(GOOD, "", algorithm="none"), "not a usable token"),
        (signed(key=b"k" * 64, algorithm="HS512"), "not a usable token"),
        ("", "not a usable token"),
        ("approver@example.com", "not a usable token"),
    ],
)
def test_a_token_that_proves_nothing_is_refused_with_the_reason(token: str, why: str) -> None:
    with pytest.raises(TokenRefused, match=why):
        verify(token, KEY)


def test_a_key_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(TokenRefused, match="No such file"):
        read_key(path)
    path.write_bytes(b"short\n")
    with pytest.raises(TokenRefused, match="5 bytes, at least 32"):
        read_key(path)
    path.write_bytes(KEY + b"\n")
    assert read_key(path) == KEY


def test_an_opaque_token_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    key_file, opaque = tmp_path / "key", "0123456789abcdef" * 4
    key_file.write_bytes(KEY)
    roster = Roster(
        people={"robot@example.com": Role.ENGINEER},
        api_tokens={sha256(opaque.encode()).hexdigest(): "robot@example.com"},
    )
    assert identify(f"{opaque}\n", None, lambda: roster) == "robot@example.com"
    assert identify(issue(KEY, "approver@example.com", timedelta(minutes=1)), key_file, lambda: roster).startswith(
        "app"
    )
    for token, key, why in (
        (opaque[1:], key_file, "the roster does not know it"),
        (sha256(opaque.encode()).hexdigest(), key_file, "the roster does not know it"),
        (signed(), None, "names no key"),
        (signed(key=b"x" * 32), key_file, "another key"),
    ):
        with pytest.raises(TokenRefused, match=why):
            identify(token, key, lambda: roster)
