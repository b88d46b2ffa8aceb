"""Open one exported bundle, unchanged, with every consumer that the docs name.

    python -m tests.consumers            install the consumers, run them, write build/consumers.json
    python -m tests.consumers --docs     write the table of docs/consumers.md from that file

Each consumer has an environment of its own in .cache/consumers, and a program in ``workers/`` that
imports nothing of this project. It gets a job (:class:`tests.consumers.jobs.Job`) and returns the
greedy tokens of each case, which must be those of our own runtime.
"""
