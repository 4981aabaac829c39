"""Meters of a decode: AR-ness, likelihood, parallelism; and pictures of them (``viz``)."""

from nap_decode.measure.arness import ARness, ARnessMeter
from nap_decode.measure.likelihood import LogLikelihood, chain_log_likelihood, log_likelihood_bound
from nap_decode.measure.parallelism import accuracy_under_parallelism

__all__ = [
    "ARness",
    "ARnessMeter",
    "LogLikelihood",
    "accuracy_under_parallelism",
    "chain_log_likelihood",
    "log_likelihood_bound",
]
