"""What one client may take of a server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server; all defaults are ours.

    Attributes:
      body_bytes: of a request's body.
      body_s: for a request's body to arrive.
      header_s: for a request's first line and headers to arrive.
      header_bytes: of those.
      stall_s: for a client to take the next piece of a stream.
      answer_s: for a whole answer, from the body's last byte.
      answers: prompts times n of one request.
      requests: prompts times n of all requests under way; more are told to come again (429).
      connections: open at once; more are told so (503).
    """

    body_bytes: int = 4 * 2**20
    body_s: float = 10.0
    header_s: float = 10.0
    header_bytes: int = 32 * 2**10
    stall_s: float = 30.0
    answer_s: float = 600.0
    answers: int = 128
    requests: int = 1024
    connections: int = 2048

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}: expected more than 0, got {getattr(self, field.name)!r}")
