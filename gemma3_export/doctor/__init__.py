"""Why CUDA does not come up, and the command that changes it: ``gemma3-export doctor``.

    from gemma3_export.doctor import examine

    report = examine("cuda:0")
    print(report.is_usable, *report.problems)

What can be read is read without an import; what has to be tried is tried in processes of its own.
"""

from gemma3_export.doctor.facts import Facts
from gemma3_export.doctor.problems import Problem
from gemma3_export.doctor.report import Report, examine

__all__ = ["Facts", "Problem", "Report", "examine"]
