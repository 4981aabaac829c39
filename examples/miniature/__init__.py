"""The paper's claim in miniature: a study that can be rerun; docs/study.md has what came out.

    python -m examples.miniature.run --quick      # a reduced table from scratch
    python -m examples.miniature.run              # the whole study, hours

``data`` writes the same problems in several layouts, ``train`` trains one model from one configuration file,
``evaluate`` decodes with the library's public API, ``report`` renews the pages from the results: ``study`` looks
results up, ``tables`` and ``figures`` show them, ``paper`` puts the paper's numbers beside them.
"""
