"""SLURM's requeue: a job that is about to lose its nodes saves, and asks to be started again.

SLURM says so with SIGUSR1 (``#SBATCH --signal=USR1@180``), to all ranks. Lightning's own handler saves at once, in the
middle of a step, each rank at another one, and what it saves is no state that a run can go on from exactly. So the
signal is taken as the other signals are (:mod:`recipes._stop`): at the next complete step ``last.ckpt`` is written,
and then the first rank asks SLURM, through what Lightning's ``SLURMEnvironment`` is told (``auto_requeue``).
"""

from __future__ import annotations

import logging
import os
import subprocess
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment

log = logging.getLogger(__name__)


def in_job() -> bool:
    """Whether SLURM started this process as a rank of a job (``srun`` in a job script)."""
    return SLURMEnvironment.detect()


def job_id() -> str:
    """As ``scontrol`` takes it; of a job array the task's."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def why_not(trainer: Any, goes_on: bool, saved: bool) -> str:
    """Why the job isn't to be requeued; empty where it is.

    Args:
        trainer: Lightning's, or None where there is none yet.
        goes_on: whether the command goes on from where it stopped when it is run again.
        saved: whether there is a checkpoint to go on from.
    """
    environment = getattr(getattr(trainer, "_accelerator_connector", None), "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment) and not environment.auto_requeue:
        return "auto_requeue is off"
    if not goes_on:
        return "without 'fit --ckpt_path last?' it would begin anew, each time"
    if not saved and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
        return "it was requeued before, and still hadn't saved anything: it needs more time"
    return ""


def requeue() -> bool:
    """Ask SLURM to start this job again; it ends what is left of it. True where SLURM has taken it."""
    job = job_id()
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = "" if asked.returncode == 0 else " ".join((asked.stderr or asked.stdout).split())
        taken = asked.returncode == 0
    except (OSError, subprocess.SubprocessError) as error:
        problem, taken = str(error), False
    if taken:
        log.info(f"SLURM requeues job {job}, which goes on from there")
    else:
        log.warning(f"SLURM doesn't requeue job {job} ({problem}): submit it again, and it goes on from there")
    return taken
