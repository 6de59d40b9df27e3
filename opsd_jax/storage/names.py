"""Names of the directories in a work directory, besides those of the stages."""

UNTRAINED = "untrained"  # the evaluation of the initial parameters
REPORT = "report"
EVALUATIONS = "evaluations"  # of the command `evaluate`
PARAMS = "params"  # in the directory of a stage: its result
RESERVED = (UNTRAINED, REPORT, EVALUATIONS)  # no stage may have one of these names
