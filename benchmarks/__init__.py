"""The benchmarks: how fast is an attention, and how much memory does it take?

A figure is published only beside the check it passed, and only beside those it was measured with:

cases       named, frozen questions: a shape, a mask, and who is asked in which direction
judge       attention in float64, row by row, apart from everything that is timed
check       a subject's answer at full size, against the judge, on sampled rows
*_calls     a subject as something that can be timed: one run, to its end
timing      who follows whom; medians, quartiles and ratios
memory      the most that a call takes beside its arguments and results
subjects    who can be asked
worker      one room: subjects of frameworks that can share a process; rooms, seen from outside
runner      every case through every subject, turn by turn
results     the measurements as JSON
targets     what is promised, and whether it holds
report      the terminal's tables; page, docs/BENCHMARKS.md and its picture
terminal    a run as it is seen there

and of a GPU, apart from the CPU's:

gpu         from beginning to end: judged, checked by a sanitizer, timed; its results as JSON
gpu_cases   the cases, and what is promised there
gpu_calls   torch's subjects on a CUDA device
gpu_page    docs/GPU.md
tune        kernel configurations, measured
"""

if __name__ == "benchmarks":
    raise ImportError(
        "`benchmarks` must be imported as attn_core.benchmarks. Got a bare import of "
        "`benchmarks`; install the package (pip install -e .) instead of putting its source "
        "folder on sys.path."
    )
