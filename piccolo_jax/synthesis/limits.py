"""How fast requests may go out, and how many tokens they may cost."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

_LONGEST_NAP = 0.2  # seconds; what is waited for can come nearer meanwhile


class Gate:
    """Lets requests through one by one, spaced as the limits demand, and none during a pause.

    Requests per minute are spaced evenly. So are tokens: a request takes the time that its tokens
    stand for, as estimated when it goes out and corrected when it is answered. 0 means no limit.
    """

    def __init__(
        self,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._request_at = self._token_at = self._pause_ends = clock()
        self._lock = asyncio.Lock()  # waiters pass in the order in which they came

    async def enter(self, tokens: int) -> None:
        """Waits until a request of about so many tokens may go out."""
        async with self._lock:
            while (wait := self._opens_at() - self._clock()) > 0:
                await self._sleep(min(wait, _LONGEST_NAP))
            now = self._clock()
            self._request_at = max(self._request_at, now) + self._per_request
            self._token_at = max(self._token_at, now) + tokens * self._per_token

    def correct(self, tokens: int) -> None:
        """Adds tokens that a request took beyond its estimate; fewer than none gives some back."""
        self._token_at += tokens * self._per_token

    def pause(self, seconds: float) -> None:
        """Lets nothing through for so long."""
        self._pause_ends = max(self._pause_ends, self._clock() + seconds)

    def _opens_at(self) -> float:
        return max(self._request_at, self._token_at, self._pause_ends)


class Cost(Protocol):
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    lost_tokens: int
    estimated: bool


@dataclasses.dataclass
class Spending:
    """Tokens spent so far, and the most that may be: requests go out while `left()`.

    Those in flight when the budget is reached are waited for, so it is exceeded by them at most.
    """

    budget: int = 0  # tokens, of prompts and answers together; 0: no limit
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0  # of prompts that timed out, which endpoints may bill
    estimated_tokens: int = 0  # those of answers whose tokens the endpoint did not report

    def add(self, cost: Cost) -> None:
        """Counts a request."""
        self.prompt_tokens += cost.prompt_tokens
        self.completion_tokens += cost.completion_tokens
        self.lost_tokens += cost.lost_tokens
        self.estimated_tokens += (cost.prompt_tokens + cost.completion_tokens) * cost.estimated

    @property
    def total(self) -> int:
        """What the budget counts."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens

    def left(self) -> bool:
        """Whether another request may go out."""
        return not self.budget or self.total < self.budget


def estimate_tokens(text: str) -> int:
    """A guess where nothing is reported: a token per 3 bytes, one Chinese character."""
    return -(-len(text.encode()) // 3)
