"""The training loop and what it holds: processes, learner, module and schedule."""
