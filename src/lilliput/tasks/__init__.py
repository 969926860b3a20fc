"""Tasks: what a model can do, before and after; local files or EleutherAI's evaluation harness."""

from lilliput.tasks.result import TaskResult
from lilliput.tasks.run import run_tasks

__all__ = ["TaskResult", "run_tasks"]
