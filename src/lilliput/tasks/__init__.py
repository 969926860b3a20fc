"""Tasks: what a model can do, before and after; local files or EleutherAI's evaluation harness."""

from lilliput.tasks.result import TaskResult, abilities
from lilliput.tasks.run import check_tasks, run_tasks

__all__ = ["TaskResult", "abilities", "check_tasks", "run_tasks"]
