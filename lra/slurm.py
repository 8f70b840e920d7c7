"""Sweeps through Slurm: the wait for all of their jobs, however each of them ends."""

import logging
import shutil
import signal
from collections.abc import Callable

LOG = logging.getLogger("lra")

LOOK_SECONDS = 30
"""The longest between two looks which jobs have left the queue."""


def wait_for(launch: Callable[[], None]) -> bool:
    """Calls Hydra's Slurm launcher, which submits the jobs and returns when all have ended.

    The jobs are Slurm's: a signal ends the wait for them, but none of them.

    Returns:
        Whether a Ctrl-C has ended the wait.

    Raises:
        ValueError: If nothing can be submitted here, or Slurm refuses the jobs.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm submits jobs with sbatch, which is not on PATH here: type the command on "
            "a machine of the cluster that has it, or leave launch= out."
        )
    from submitit.core.utils import FailedJobError

    _be_patient()
    try:
        launch()
    except FailedJobError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"Slurm does not take the jobs: {told}") from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of somebody who saw no end yet
        LOG.warning(
            "No longer waiting. The jobs go on: squeue --me lists them, lra status tells how far "
            "they are, scancel ends them (each saves first). When they have ended, the same "
            "command does what is left."
        )
        return True
    return False


def _be_patient() -> None:
    """Makes submitit wait for every job, as long as it is in the queue.

    Left alone it gives up all of them for one that has ended without a word, and it asks the
    accounting, which not every cluster has, whether one has.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from submitit.core.utils import FailedJobError, UncompletedJobError
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Queue(SlurmInfoWatcher):
        """Tells whether jobs are in the queue."""

        def _make_command(self) -> list[str]:
            return ["squeue", "--me", "--array", "--noheader", "--format=%i"]

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            queued = (string if isinstance(string, str) else string.decode()).split()
            states = {True: {"State": "RUNNING"}, False: {"State": "ENDED"}}
            return {job: states[job in queued] for job in self._registered}

    results = SlurmJob.results

    def waited_for(job: SlurmJob) -> list[JobReturn]:
        try:
            [ended] = results(job)
            if ended.status == JobStatus.COMPLETED:
                return [ended]
            told = str(ended._return_value)
        except (FailedJobError, UncompletedJobError) as error:
            told = str(error)
        LOG.warning("Slurm job %s: %s", job.job_id, told.strip())
        return [JobReturn(status=JobStatus.COMPLETED)]

    SlurmJob.watcher = Queue(delay_s=LOOK_SECONDS)
    SlurmJob.results = waited_for
