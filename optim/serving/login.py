"""Names and passwords: where they come from, how they are compared, and how guessing is slowed down."""

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

FREE_FAILURES = 5  # wrong passwords of an address before it has to wait
LONGEST_WAIT = 60.0  # seconds that an address has to wait, at most
FORGOTTEN_AFTER = 900.0  # seconds after which a wrong password no longer counts
# Every wrong password of the last minute, from whatever address, delays each login by so many seconds, up to a limit: a
# guesser with many addresses is slowed, and the owner always gets an answer.
GLOBAL_DELAY, LONGEST_DELAY, GLOBAL_SECONDS = 0.05, 3.0, 60.0
REMEMBERED = 10_000  # addresses


def parse_accounts(text: str, source: str, separator: str = ",") -> list[tuple[str, str]]:
    """Pairs of name and password from `NAME:PASSWORD`, several with separators. Raises UserError, naming the source."""
    parts = [part.strip("\r") for part in text.split(separator) if part.strip()]
    found = [tuple(part.split(":", 1)) for part in parts]
    if not found or any(len(pair) != 2 or not all(pair) for pair in found):
        between = "commas between them" if separator == "," else "a line each"
        raise UserError(f"{source} is not understood: give NAME:PASSWORD, several with {between}.")
    return found


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Accounts of a file with a NAME:PASSWORD in each line. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"The file '{path}' of --auth-file cannot be read ({reason}): give another.") from None
    return parse_accounts(text, f"The file '{path}' of --auth-file", "\n")


def checker(accounts: list[tuple[str, str]]) -> Callable[[str, str], bool]:
    """Tells whether name and password belong together, in a time that tells nothing of either."""

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()

    known = [(digest(name.strip()), digest(password)) for name, password in accounts]

    def check(name: str, password: str) -> bool:
        found = False
        for each_name, each_password in known:  # all of them, whichever fits
            same = hmac.compare_digest(each_name, digest(name.strip()))
            found |= same & hmac.compare_digest(each_password, digest(password))
        return found

    return check


@dataclass
class _Address:
    failures: int = 0
    last: float = 0.0
    trying: bool = False


@dataclass
class Throttle:
    """Slows down who guesses passwords. Nobody is locked out: waits are short, and the count is forgotten.

    Used by one event loop; clock: seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _addresses: dict[str, _Address] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=1000))  # times of wrong passwords

    def refused_for(self, address: str) -> float:
        """Seconds for which logins of an address are refused; 0: it may try."""
        found = self._addresses.get(address)
        if found is None:
            return 0.0
        now = self.clock()
        if found.trying:
            return 1.0
        if now - found.last > FORGOTTEN_AFTER:
            del self._addresses[address]
            return 0.0
        excess = found.failures - FREE_FAILURES
        wait = min(2.0 ** min(excess, 10), LONGEST_WAIT) if excess >= 0 else 0.0
        return max(0.0, found.last + wait - now)

    def delay(self) -> float:
        """Seconds that every login has to wait now."""
        now = self.clock()
        recent = sum(now - each < GLOBAL_SECONDS for each in self._recent)
        return min(GLOBAL_DELAY * max(0, recent - FREE_FAILURES), LONGEST_DELAY)

    @asynccontextmanager
    async def attempt(self, address: str) -> AsyncIterator[None]:
        """One login of an address at a time, after the delay."""
        found = self._addresses.setdefault(address, _Address(last=self.clock()))
        while len(self._addresses) > REMEMBERED:
            del self._addresses[next(iter(self._addresses))]
        found.trying = True
        try:
            await asyncio.sleep(self.delay())
            yield
        finally:
            found.trying = False

    def record(self, address: str, right: bool) -> None:
        """Remember how a login ended."""
        if right:
            self._addresses.pop(address, None)
            return
        now = self.clock()
        found = self._addresses.setdefault(address, _Address())
        found.failures, found.last = found.failures + 1, now
        self._recent.append(now)
