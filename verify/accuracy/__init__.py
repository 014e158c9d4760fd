"""The accuracy gate: tasks of lm-eval on the served output and on its served source."""
