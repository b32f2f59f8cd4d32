"""An executor that is a decoder behind an endpoint: it goes on from the text that an `LMExecutor` reads, by a line."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxlab.eaglet.executors import Context, RemoteExecutor
from jaxlab.eaglet.prompts import ExecutorPrompt, executor_prompt


class ServedExecutor(RemoteExecutor):
    """Writes its actions, for an endpoint draws and does not score: what the environment lists is not looked at.

    It asks for completions of plain text, without a chat template, so a decoder that was cloned as an `LMExecutor` acts
    the same once it is served. The contexts of a call are asked for at once.

    Example:
        executor = ServedExecutor("http://localhost:8000/v1", "agent")
        print(evaluate(GridQuestEnv, executor, tasks, planner=Planner.load()).success)
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        prompt: ExecutorPrompt = executor_prompt,
        concurrency: int = 16,
        **client: Any,
    ):
        """Connects to nothing yet.

        Args:
          base_url: of the endpoint, up to and with the version.
          model: its name there.
          name: of the executor; default: the model's.
          max_tokens: of a command.
          temperature: of the draw; 0 writes the likeliest.
          prompt: a context as text. All of it is sent: a context that the model has no room for is refused.
          concurrency: requests under way at once.
          **client: further arguments of `jaxlab.inference.Client`.
        """
        super().__init__(base_url, model, name=name, concurrency=concurrency, **client)
        self._max_tokens, self._temperature, self._prompt = max_tokens, temperature, prompt
        self._concurrency = concurrency

    def act(self, context: Context) -> str:
        """The next action.

        Raises:
          EndpointError: the endpoint cannot be used, after its retries.
        """
        answer = self.client.complete(
            "".join(self._prompt(context)),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self.seed_of(context),
            stop="\n",
        )
        return answer.text.strip()

    def act_batch(self, contexts: Sequence[Context]) -> list[str]:
        """The next action in each context; raises what `act` does."""
        if len(contexts) < 2:
            return [self.act(context) for context in contexts]
        _ = self.client  # made once, not by each thread
        with ThreadPoolExecutor(min(len(contexts), self._concurrency)) as threads:
            return list(threads.map(self.act, contexts))
