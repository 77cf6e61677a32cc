"""Batch runs: prompts from files, answers to a file, all said in one TOML file; a run that was stopped is continued.

Everything is checked before the model is loaded. Each answer is on the disk before the next is waited for, as one line
of JSON; a line that was cut off by a crash is dropped and its item run again.
"""

from engine.batch.items import Item
from engine.batch.job import Job, check_job, load_job, run_job
from engine.batch.results import ResultFile
from engine.batch.settings import BatchSettings

__all__ = ["BatchSettings", "Item", "Job", "ResultFile", "check_job", "load_job", "run_job"]
