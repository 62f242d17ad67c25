"""Whether two mathematical answers are equal: read, compared at a bounded cost, judged in a process
of its own.
"""
