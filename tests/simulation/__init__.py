"""Whole runs on simulated workers: the driver is the real one, Ray and the clock are stand-ins.

The world (:mod:`clock`, :mod:`results`, :mod:`actors`, :mod:`machines`, :mod:`world`) knows no test; :mod:`driving`
puts it under the driver. Two commands stand on it: ``python -m tests.simulation`` looks for a schedule of events that
breaks an invariant, ``python -m tests.simulation.scale`` says what a run takes on up to 4,096 workers, and why.
"""
