"""Tasks of fine-tuning: registered, switched by a model's ``tasks``, worded in ``properties/prompts``."""

from recbole_llm.tasks import behaviour, language
from recbole_llm.tasks.base import Samples, Task, TaskTexts, active_tasks, known_tasks, number, register

__all__ = ["Samples", "Task", "TaskTexts", "active_tasks", "behaviour", "known_tasks", "language", "number", "register"]
