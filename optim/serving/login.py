"""Logins: reading accounts, checking passwords, and slowing down guesses."""

import asyncio
import hashlib
import hmac
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from latentsync.errors import UserError

FREE_FAILURES = 5  # wrong passwords from an address before it has to wait
MAX_WAIT = 60.0  # seconds that an address has to wait
FORGET_SECONDS = 900.0  # after which the wrong passwords of an address no longer count
# Every wrong password of the last minute, from any address, delays each login by DELAY_PER_FAILURE seconds, up to
# MAX_DELAY. This slows a guesser with many addresses, and the owner can still log in.
DELAY_PER_FAILURE, MAX_DELAY, RECENT_SECONDS = 0.05, 3.0, 60.0
MAX_ADDRESSES = 10_000  # remembered at once


def parse_accounts(text: str, source: str, separator: str = ",") -> list[tuple[str, str]]:
    """Parse `NAME:PASSWORD` entries into (name, password) pairs.

    source: where the text is from, for the error. Raises UserError.
    """
    entries = [entry.strip("\r").partition(":") for entry in text.split(separator) if entry.strip()]
    accounts = [(name, password) for name, _, password in entries]
    if not accounts or not all(name and password for name, password in accounts):
        several = "separated by commas" if separator == "," else "one on each line"
        raise UserError(f"{source} cannot be parsed: give NAME:PASSWORD, several {several}.")
    return accounts


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Read accounts from a file with a NAME:PASSWORD on each line. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The file '{path}' of --auth-file cannot be read ({reason}): give another.") from None
    return parse_accounts(text, f"The file '{path}' of --auth-file", "\n")


def password_checker(accounts: list[tuple[str, str]]) -> Callable[[str, str], bool]:
    """Return a function that checks a name and a password against the accounts in constant time."""

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()

    digests = [(digest(name.strip()), digest(password)) for name, password in accounts]

    def check(name: str, password: str) -> bool:
        name_digest, password_digest = digest(name.strip()), digest(password)
        valid = False
        for account_name, account_password in digests:  # always all of them, for the constant time
            same_name = hmac.compare_digest(account_name, name_digest)
            valid |= same_name & hmac.compare_digest(account_password, password_digest)
        return valid

    return check


@dataclass
class _Address:
    failures: int = 0
    last_failure: float = 0.0
    in_progress: bool = False  # a login from this address is being checked


@dataclass
class Throttle:
    """Slows down password guessing without locking anybody out: waits are short, and failures are forgotten.

    Used by one event loop. clock: returns seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _addresses: dict[str, _Address] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=1000))  # times of wrong passwords

    def seconds_to_wait(self, address: str) -> float:
        """Seconds for which logins from an address are refused; 0 if it may try now."""
        entry = self._addresses.get(address)
        if entry is None:
            return 0.0
        if entry.in_progress:
            return 1.0
        now = self.clock()
        if now - entry.last_failure > FORGET_SECONDS:
            del self._addresses[address]
            return 0.0
        excess = entry.failures - FREE_FAILURES
        wait = min(2.0 ** min(excess, 10), MAX_WAIT) if excess >= 0 else 0.0
        return max(0.0, entry.last_failure + wait - now)

    def delay(self) -> float:
        """Seconds by which every login is delayed at present."""
        now = self.clock()
        recent = sum(now - failure < RECENT_SECONDS for failure in self._recent)
        return min(DELAY_PER_FAILURE * max(0, recent - FREE_FAILURES), MAX_DELAY)

    @asynccontextmanager
    async def attempt(self, address: str) -> AsyncIterator[None]:
        """Hold the one login that an address may have in progress, after the delay."""
        entry = self._addresses.setdefault(address, _Address(last_failure=self.clock()))
        while len(self._addresses) > MAX_ADDRESSES:
            del self._addresses[next(iter(self._addresses))]
        entry.in_progress = True
        try:
            await asyncio.sleep(self.delay())
            yield
        finally:
            entry.in_progress = False

    def record(self, address: str, succeeded: bool) -> None:
        """Count the outcome of a login."""
        if succeeded:
            self._addresses.pop(address, None)
            return
        now = self.clock()
        entry = self._addresses.setdefault(address, _Address())
        entry.failures, entry.last_failure = entry.failures + 1, now
        self._recent.append(now)
