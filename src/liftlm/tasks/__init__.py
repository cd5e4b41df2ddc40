"""Tasks: questions and answers written from a document (LIFT, section 3.2), by one of several writers."""

from __future__ import annotations

from liftlm.tasks.task import Task, read_tasks_file, write_tasks_file

__all__ = ["Task", "read_tasks_file", "write_tasks_file"]
