"""What decoding reads from device memory, and how long the sampling takes."""

from __future__ import annotations

from typing import NamedTuple


class Decoding(NamedTuple):
    """The memory traffic and the time of rollouts. `docs/speed.md` defines both.

    Attributes:
      bytes: bytes that each device has to read from its memory: its part of the weights once per
        forward pass of decoding, and its part of the cached tokens of every active rollout.
      seconds: wall time from the first prefill until the host has the last tokens.
    """

    bytes: float = 0.0
    seconds: float = 0.0

    def since(self, before: Decoding) -> Decoding:
        """Returns the difference to an earlier total."""
        return Decoding(self.bytes - before.bytes, self.seconds - before.seconds)
