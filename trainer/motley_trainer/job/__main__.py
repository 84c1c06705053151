"""A job's process."""

import sys

from motley_trainer.job.process import exit_as_told
from motley_trainer.job.run import run

if __name__ == "__main__":
    sys.exit(exit_as_told(run, sys.argv[1:]))
