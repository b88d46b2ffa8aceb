"""Hostile inputs, kills, signals, races and full disks, made from seeds and judged by one rule.

children   commands in children that are forked from a process with everything imported
outcomes   the rule: a right result, or one line of error, in time, and nothing else left behind
cases      make, run and judge a case; every case can be replayed from its format and seed
bytes_and_json, files
           changes of bytes, JSON and files that several formats share
weights, models, ...
           generators: each makes one hostile variant of a tiny valid input
schedules  what happens at the n-th change of the output folder: kill, signal, a file appears
__main__   run thousands and print a table (`make test-faults`)
"""
