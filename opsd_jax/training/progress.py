"""The progress bar of a run. It shows the step, metrics, tokens per second and time left."""

from __future__ import annotations

import sys
from typing import Any

import tqdm

from opsd_jax.parallel import hosts
from opsd_jax.training.speed import MBU, MFU

# Metric -> how the bar shows it.
SHOWN = {
    "loss": "loss {:.3f}",
    "token_accuracy": "token accuracy {:.1%}",
    "reward": "reward {:.2f}",
    "length": "length {:.1f}",
    "token_divergence": "divergence {:.3f}",
    "active_rows": "rows {:.0f}",
    "empty": "empty",
    "nonfinite": "not finite",
}
UTILISATIONS = {"MFU": MFU, "MBU": MBU}  # of the devices, as the bar names them
FLAGS = ("empty", "nonfinite")  # metrics that are shown only if they are not 0


class Progress:
    """Context manager that shows a progress bar on the standard error of the first host.

    If standard error is not a terminal, it prints a line every 20 seconds.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, name: str, total: int, unit: str) -> None:
        """Starts a new bar, which replaces the previous one.

        Args:
          name: label of the bar, such as the name of a stage.
          total: number of units at the end.
          unit: what the bar counts, such as "step".
        """
        self._close()
        self._bar = tqdm.tqdm(
            total=total,
            desc=f"{name:>16}",
            unit=unit,
            dynamic_ncols=True,
            disable=not hosts.is_first(),
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        self._bar.set_postfix_str("compiling")

    def reach(self, done: int) -> None:
        """Moves the bar to `done` completed units."""
        self.advance(done - self._bar.n)

    def advance(self, units: int) -> None:
        """Moves the bar by `units` completed units."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(units)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Advances the bar after a training step, and shows the step's metrics.

        Args:
          step: number of the step, from 0.
          values: metrics of the step, `tokens` and `seconds` among them.
        """
        shown = [
            text.format(values[name])
            for name, text in SHOWN.items()
            if name in values and (name not in FLAGS or values[name])
        ]
        if "verifier_wait_seconds" in values:
            shown.append(f"verifier {values['verifier_wait_seconds'] / values['seconds']:.1%}")
        shown.append(f"{values['tokens'] / values['seconds']:,.0f} tokens/s")
        shown += [f"{name} {values[of]:.1%}" for name, of in UTILISATIONS.items() if of in values]
        if self._bar.n == 0 and step:
            # The run resumed at this step: the bar's rate must not count the earlier ones.
            self._bar.initial = self._bar.n = step
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step + 1 - self._bar.n)

    def finish(self, text: str = "") -> None:
        """Closes the bar. If `text` is not empty, shows it in place of the metrics."""
        if text:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.refresh()
        self._close()

    def _close(self) -> None:
        """Closes the bar if one is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        self._close()
