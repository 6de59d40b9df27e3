"""Names of the directories and files that a run creates."""

import re

# What a stage, a source or a benchmark may be called, because its name becomes part of a file name.
NAME = re.compile(r"[\w-]{1,80}")
NAMES = "a name of letters, digits, _ and -, of at most 80 characters"

UNTRAINED = "untrained"  # the evaluation of the initial parameters
REPORT = "report"
EVALUATIONS = "evaluations"  # of the command `evaluate`
CHECKPOINTS = "checkpoints"  # in the directory of a stage
PARAMS = "params"  # in the directory of a stage: its result
RESERVED = (UNTRAINED, REPORT, EVALUATIONS)  # no stage may have one of these names
