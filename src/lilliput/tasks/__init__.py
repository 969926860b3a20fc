"""Tasks: what a model can do, before and after; local files or EleutherAI's evaluation harness."""

from lilliput.tasks.result import TaskResult
from lilliput.tasks.run import check_tasks, run_tasks

__all__ = ["TaskResult", "check_tasks", "run_tasks"]
