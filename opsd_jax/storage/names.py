"""Names of the directories that a run creates, other than the directories of its stages."""

UNTRAINED = "untrained"  # the evaluation of the initial parameters
REPORT = "report"
EVALUATIONS = "evaluations"  # of the command `evaluate`
PARAMS = "params"  # in the directory of a stage: its result
RESERVED = (UNTRAINED, REPORT, EVALUATIONS)  # no stage may have one of these names
