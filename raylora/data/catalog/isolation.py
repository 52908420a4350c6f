"""What the process shares with everybody in it, put back after a fetch: a first use must not differ from a second."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Restore the process's global state on leaving, whatever happened inside.

    These are the random states of Python, NumPy and torch (its GPUs' too, once CUDA is in use), torch's default dtype,
    number of threads and grad mode, and ``os.environ``. A conversion builds models, which draws random numbers; left
    drawn, the same seed would give one run on an empty cache and another on a full one.

    It is no lock: what other threads set meanwhile is put back too.
    """
    import numpy as np
    import torch

    environment = dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        np.random.set_state(numpy)
        random.setstate(python)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
