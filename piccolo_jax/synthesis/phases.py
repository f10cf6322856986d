"""The two phases: topics of retrieval tasks, then training examples of each topic."""

import asyncio
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import tqdm

from piccolo_jax import metrics
from piccolo_jax.data.overlap import normalise
from piccolo_jax.errors import UserError
from piccolo_jax.synthesis import answers
from piccolo_jax.synthesis.client import Endpoint, Messages, NoAnswerError
from piccolo_jax.synthesis.journal import Journal, Phase, Progress, Record
from piccolo_jax.synthesis.prompts import Prompts

_DRY_ROUNDS = 2  # rounds without a new topic after which no more are asked for
_FAILURES = 3  # requests in a row that got no answer, after which the run ends


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked for: every prompt follows from this, a request's number and the topics."""

    count: int  # examples
    seed: int
    prompts: dict[str, Prompts]  # by language; example number n is of topic n // per_topic
    per_topic: int = 10
    topics_per_request: int = 20
    topics: tuple[str, ...] = ()  # given by the user, instead of the first phase

    @property
    def languages(self) -> tuple[str, ...]:
        """Topics take turns in these."""
        return tuple(self.prompts)

    def language_of(self, topic: int) -> str:
        """The language of a topic, or of a request for topics."""
        return self.languages[topic % len(self.languages)]

    def attributes(self, number: int) -> dict[str, str]:
        """The attributes of an example."""
        topic, generation = divmod(number, self.per_topic)
        prompts = self.prompts[self.language_of(topic)]
        return prompts.draw_attributes(self.seed, topic, generation, self.per_topic)

    def example_language(self, number: int) -> str:
        """The language of an example."""
        return self.language_of(number // self.per_topic)


@dataclasses.dataclass(frozen=True)
class _Request:
    phase: Phase
    number: int
    prompt: str
    prompts: Prompts
    topic: str = ""


class Synthesis:
    """A plan, the journal of what has been answered, and the endpoint to ask for the rest.

    `stopped` says why not everything was asked; empty if it was.
    """

    def __init__(self, plan: Plan, journal: Journal, endpoint: Endpoint, concurrency: int):
        self.plan, self.journal, self.endpoint = plan, journal, endpoint
        self.concurrency = concurrency
        self.stopped = ""
        self._failed_in_a_row = 0

    async def run(self) -> None:
        """Asks for all that isn't answered yet, as long as there is budget.

        Raises UserError if the endpoint can't be used, or gives no topics.
        """
        topics = await self._topics()
        if self.stopped:
            return
        pending = [n for n in range(self.plan.count) if not self._progress(n).settled]
        await self._ask_all(
            (self._example_request(n, topics) for n in pending), self.plan.count,
            self.plan.count - len(pending), "examples",
        )  # fmt: skip

    def _progress(self, number: int) -> Progress:
        return self.journal.of("examples", number)

    def _example_request(self, number: int, topics: dict[str, list[str]]) -> _Request:
        index = number // self.plan.per_topic
        language = self.plan.language_of(index)
        own = topics[language]
        topic = own[index // len(self.plan.languages) % len(own)]
        prompts = self.plan.prompts[language]
        prompt = prompts.ask_example(topic, self.plan.attributes(number))
        return _Request("examples", number, prompt, prompts, topic)

    async def _topics(self) -> dict[str, list[str]]:
        """Topics by language, as many as the plan needs or the model knows.

        They are in the order of the requests that gave them, so asking for more adds to the end.
        """
        if self.plan.topics:
            return {language: list(self.plan.topics) for language in self.plan.languages}
        topics: dict[str, list[str]] = {}
        for place, language in enumerate(self.plan.languages):
            total = -(-self.plan.count // self.plan.per_topic)
            needed = len(range(place, total, len(self.plan.languages)))
            topics[language] = await self._topics_in(language, place, needed)
            if self.stopped:
                break
            if needed and not topics[language]:
                raise UserError(
                    f"{self.endpoint.place}: {self.endpoint.options.model} gave no usable topics in"
                    f" {language}; see {self.journal.path}, or give some by --topics=FILE"
                )
            if len(topics[language]) < needed:
                metrics.say(
                    f"{language}: {len(topics[language])} topics instead of {needed}; they are used"
                    " several times"
                )
        return topics

    async def _topics_in(self, language: str, place: int, needed: int) -> list[str]:
        """Up to `needed` topics; rounds of requests until there are so many, or no new ones."""
        # Once examples are asked for, an answer that comes late would move their topics: what got
        # no answer in an earlier run is left out, and others are asked instead.
        numbers = (
            n
            for n in itertools.count(place, len(self.plan.languages))
            if not self.journal.of("topics", n).failed
        )
        asked: list[int] = []
        topics: list[str] = []
        dry = 0
        while len(topics) < needed and dry < _DRY_ROUNDS and not self.stopped:
            rounds = -(-(needed - len(topics)) // self.plan.topics_per_request)
            batch = list(itertools.islice(numbers, rounds))
            pending = [n for n in batch if not self.journal.of("topics", n).settled]
            await self._ask_all(
                (self._topics_request(n, language) for n in pending), len(batch),
                len(batch) - len(pending), f"topics ({language})",
            )  # fmt: skip
            asked += batch
            found = self._topics_of(asked)
            if len(found) > len(topics):
                dry = 0
            else:  # a round that got no answer at all says nothing of the model
                dry += any(self.journal.of("topics", n).settled for n in batch)
            topics = found
        return topics[:needed]

    def _topics_request(self, number: int, language: str) -> _Request:
        prompts = self.plan.prompts[language]
        prompt = prompts.ask_topics(self.plan.seed, number, self.plan.topics_per_request)
        return _Request("topics", number, prompt, prompts)

    def _topics_of(self, numbers: Iterable[int]) -> list[str]:
        found: dict[str, str] = {}
        for number in numbers:
            value = self.journal.of("topics", number).value
            if isinstance(value, answers.Topics):
                for topic in value.topics:
                    found.setdefault(normalise(topic), topic)
        return list(found.values())

    async def _ask_all(
        self, requests: Iterator[_Request], total: int, done: int, name: str
    ) -> None:
        """Asks several at a time. The first error that ends the run cancels what is in flight."""
        with tqdm.tqdm(total=total, initial=done, desc=name) as bar:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.concurrency):
                        workers.create_task(self._work(requests, bar))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _work(self, requests: Iterator[_Request], bar: tqdm.tqdm) -> None:
        for request in requests:
            await self._ask(request)
            if self.stopped:
                return
            bar.set_postfix_str(f"{self.journal.spending.total:,} tokens", refresh=False)
            bar.update()

    async def _ask(self, request: _Request) -> None:
        """Asks until an answer can be used, at most twice more, or the budget is spent."""
        progress = self.journal.of(request.phase, request.number)
        while not progress.settled:
            if not self.journal.spending.left():
                self.stopped = f"the budget of {self.journal.spending.budget:,} tokens is spent"
                return
            record: dict[str, Any] = {
                "phase": request.phase, "number": request.number, "attempt": progress.attempts,
                "topic": request.topic,
            }  # fmt: skip
            try:
                answer = await self.endpoint.ask(_messages(request, progress))
            except NoAnswerError as error:
                outcome: dict[str, Any] = {
                    "problem": str(error), "refused": error.refused,
                    "lost_tokens": error.lost_tokens,
                }  # fmt: skip
                self.journal.append(Record.model_validate({**record, **outcome}))
                self._count_failure(error)
                return
            self._failed_in_a_row = 0
            outcome = dataclasses.asdict(answer)
            progress = self.journal.append(Record.model_validate({**record, **outcome}))

    def _count_failure(self, error: NoAnswerError) -> None:
        self._failed_in_a_row += not error.refused
        if self._failed_in_a_row >= _FAILURES:
            raise UserError(
                f"{self.endpoint.place}: {_FAILURES} requests in a row got no answer, the last:"
                f" {error}; the same command goes on where this one stopped"
            )


def _messages(request: _Request, progress: Progress) -> Messages:
    """The request, and if its last answer can't be used, that answer and what is wrong with it."""
    messages = [{"role": "user", "content": request.prompt}]
    if progress.content.strip():
        again = request.prompts.ask_again(progress.problem)
        messages.append({"role": "assistant", "content": progress.content})
        messages.append({"role": "user", "content": again})
    return messages
