"""What a decode costs: beside its bare forward passes, and beside the loop that other decoders publish.

One run measures four loops of the same steps on the same canvas, one after the other in every repetition, so
that whatever else the machine does hits all alike; ratios are taken inside a repetition, and their median told:

* *bare*: the least that these steps can cost.  At each step the body on the whole canvas, and the output layer on
  as many rows as there are slots to decide about.  Nothing is looked at.
* *full*: the model as it is called by itself, logits for all positions, as often.
* *textbook*: :func:`textbook_loop`.
* *ours*: :meth:`~nap_decode.Sampler.decode`, from a canvas to its output, checks and trace included.

Memory and synchronisations are counted in runs of their own, which nobody times.
"""

from nap_decode.bench.command import add_arguments, run
from nap_decode.bench.comparison import BenchmarkResult, Loop, benchmark
from nap_decode.bench.growth import LadderResult, ladder
from nap_decode.bench.observation import environment
from nap_decode.bench.workload import SHAPES, Shape, Workload

__all__ = [
    "SHAPES",
    "BenchmarkResult",
    "LadderResult",
    "Loop",
    "Shape",
    "Workload",
    "add_arguments",
    "benchmark",
    "environment",
    "ladder",
    "run",
]
