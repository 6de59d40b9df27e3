"""Grades answers with other projects' graders. `verifier.py --peers` runs it in their environments.

    python benchmarks/peers.py < ANSWERS > VERDICTS

The environment needs `lm-eval[math]`, or `lighteval` and `latex2sympy2_extended`. They need
different versions of the same parser, so one environment cannot have both. ANSWERS are JSON lines
with `gold` and `answer`. For each line of ANSWERS, VERDICTS has a JSON object: grader -> whether it
accepts the answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import pathlib
import runpy
import sys
from collections.abc import Callable

Grader = Callable[[str, str], bool]  # (gold, answer) -> whether the answer is right


def lm_eval_graders() -> dict[str, Grader]:
    """The metrics of lm-evaluation-harness's tasks hendrycks_math and minerva_math.

    The functions of the tasks are loaded from their files, because importing the package imports
    its models too.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        return {}
    tasks = pathlib.Path(package.origin).parent / "tasks"
    hendrycks, minerva = (
        runpy.run_path(str(tasks / name / "utils.py"))
        for name in ("hendrycks_math", "minerva_math")
    )

    def results(gold: str, answer: str) -> dict[str, int]:
        document = {
            "answer": minerva["normalize_final_answer"](gold),
            "solution": rf"\boxed{{{gold}}}",
        }
        text = f"Final Answer: The final answer is ${answer}$. I hope it is correct."
        return minerva["process_results"](document, [text])

    return {
        "lm-eval hendrycks_math": hendrycks["is_equiv"],
        "lm-eval minerva_math": lambda gold, answer: bool(results(gold, answer)["exact_match"]),
        "lm-eval math_verify": lambda gold, answer: bool(results(gold, answer)["math_verify"]),
    }


def lighteval_graders() -> dict[str, Grader]:
    """The metric of lighteval's tasks aime and math_500, which also reads golds in LaTeX here."""
    if importlib.util.find_spec("lighteval") is None:
        return {}
    load = lambda name: importlib.import_module(f"lighteval.{name}")
    extraction = load("metrics.utils.extractive_match_utils")
    doc, response = load("tasks.requests").Doc, load("models.model_output").ModelResponse
    targets = (
        extraction.ExprExtractionConfig(),
        extraction.LatexExtractionConfig(boxed_match_priority=0),
    )
    metric = load("metrics.dynamic_metrics").MultilingualExtractiveMatchMetric(
        fallback_mode="first_match",
        precision=5,
        gold_extraction_target=targets,
        pred_extraction_target=targets,
    )

    def grade(gold: str, answer: str) -> bool:
        document = doc(query="", choices=[rf"$\boxed{{{gold}}}$"], gold_index=0)
        return bool(metric.compute(document, response(text=[rf"$\boxed{{{answer}}}$"])))

    return {"lighteval": grade}


def main() -> None:
    """Reads answers from the standard input, and writes the verdicts to the standard output."""
    logging.disable(logging.CRITICAL)
    graders = lm_eval_graders() | lighteval_graders()
    for line in sys.stdin:
        row = json.loads(line)
        verdicts = {}
        for name, grade in graders.items():
            try:
                verdicts[name] = bool(grade(row["gold"], row["answer"]))
            except Exception:
                verdicts[name] = False  # the task would end
        print(json.dumps(verdicts), flush=True)


if __name__ == "__main__":
    main()
