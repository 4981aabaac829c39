from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings
from models import tiny_model
from transformers.utils import logging

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are too small to be worth more
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started this in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny():
    """See :func:`models.tiny_model`; 24 ids, of which the mask is 1."""
    return tiny_model()


@pytest.fixture(scope="session")
def embedded():
    from nap_decode import demo

    return demo.load()
