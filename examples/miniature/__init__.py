"""The paper's claim in miniature: a study that can be rerun, see the files.

    python -m examples.miniature.run --quick      # a reduced table from scratch
    python -m examples.miniature.run              # the whole study, hours

``data`` writes the same problems in several layouts, ``train`` trains one model from one configuration file,
``evaluate`` decodes with the library's public API, ``report`` makes the tables and figures from the results.
"""
